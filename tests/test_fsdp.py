"""Compressed models that are trained while FSDP2 divides them over processes, and what cannot be divided."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ALL_KINDS, FAMILIES, make_model, recipe
from peft import PeftModel
from safetensors import safe_open
from support import sharded
from support.processes import Processes
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import hf_compress
from hf_compress import CodebookConfig, ConfigurationError, LayerSharingConfig, PruningConfig
from hf_compress.engine.placement import require_whole
from hf_compress.errors import CheckpointError

CODES = {"mlp": 3, "query_key": 3, "value_output": 3}
RECIPES: dict[str, Any] = {
    "modular": recipe(kinds=ALL_KINDS),
    # Linear layers of other sizes and nothing else.
    "plain": recipe(kinds=["mlp"]),
    "codebook_lora": CodebookConfig(bits=3, learning="none"),
    # The table and the head that is tied to it have codes: FSDP2 changes the classes of both.
    "codebook_embedding": CodebookConfig(bits={**CODES, "embedding": 4}, learning="none"),
    "trainable_codebooks": CodebookConfig(bits=3, learning="none", trainable_codebooks=True),
    "sparse": PruningConfig(sparsity=0.9, criterion="magnitude", scope="layer"),
    "sharing": LayerSharingConfig(unique_layers=2, lora_rank=2),
}
TRAINED = [name for name in RECIPES if name != "plain"]
DIVIDED = ["modular", "codebook_embedding"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compressed models, and a dense one."""
    found = tmp_path_factory.mktemp("fsdp")
    make_model("llama").save_pretrained(found / "dense")
    for name, stage in RECIPES.items():
        model = make_model("llama")
        if name == "codebook_embedding":
            config = FAMILIES["llama"]()
            config.tie_word_embeddings = True
            model = LlamaForCausalLM(config)
        hf_compress.compress(model, stage).save_pretrained(found / name)
    return found


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    first, second = Processes().run(2, sharded.everything, folder, TRAINED, DIVIDED)
    assert isinstance(first, dict), first
    # Only the first process would have written a file that it has to refuse.
    assert first == {**second, "refusals": first["refusals"]}
    return first


def losses_of_one_process(folder: Path, name: str) -> list[float]:
    model = sharded.load(folder, name)
    return sharded.fit(model, sharded.optimizer_of(model, sharded.RATES.get(name, sharded.RATE)))


def reloaded(folder: Path, name: str, suffix: str) -> Any:
    if name not in sharded.ADAPTED:
        return AutoModelForCausalLM.from_pretrained(folder / f"{name}-{suffix}")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / name), folder / f"{name}-{suffix}")


@pytest.mark.parametrize("name", TRAINED)
def test_the_losses_are_those_of_one_process(name: str, folder: Path, results: dict[str, Any]) -> None:
    assert results["trained"][name]["parts"] == {"DTensor"}, "nothing was divided"
    losses = results["trained"][name]["losses"]
    assert losses == pytest.approx(losses_of_one_process(folder, name), rel=1e-5)
    assert len(set(losses)) == sharded.STEPS


@pytest.mark.parametrize("name", TRAINED)
def test_what_was_saved_computes_the_same(name: str, folder: Path, results: dict[str, Any]) -> None:
    found = sharded.logits_of(reloaded(folder, name, "trained"))
    expected = torch.tensor(results["trained"][name]["logits"])
    # Sparse layers are trained in the model's dtype and kept in float16.
    tolerance = 2e-3 if name == "sparse" else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    before = sharded.logits_of(sharded.load(folder, name))
    assert float((before - expected).abs().max() / expected.abs().max()) > 2 * tolerance, "training changed nothing"


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in sharded.ADAPTED])
def test_the_file_has_the_layout_and_the_formats_of_the_one_it_came_from(
    name: str, folder: Path, results: dict[str, Any]
) -> None:
    first, second = (
        json.loads((folder / place / "config.json").read_text())["quantization_config"]["layout"]
        for place in (name, f"{name}-trained")
    )
    assert first == second
    assert formats(folder / name) == formats(folder / f"{name}-trained")


def formats(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
    return {name: (found.get_dtype(), found.get_shape()) for name, found in slices.items()}


def test_the_trainer_saves_resumes_and_writes_the_whole_model(folder: Path, results: dict[str, Any]) -> None:
    trained = results["by trainer"]
    assert trained["losses"] == pytest.approx(losses_of_one_process(folder, "modular"), rel=1e-4)
    found = sharded.logits_of(AutoModelForCausalLM.from_pretrained(folder / "modular-by-trainer"))
    torch.testing.assert_close(found, torch.tensor(trained["logits"]))


def test_ddp_does_not_send_codes_around(folder: Path, results: dict[str, Any]) -> None:
    assert results["replicated"] == pytest.approx(losses_of_one_process(folder, "codebook_lora"), rel=1e-5)


@pytest.mark.parametrize("name", DIVIDED)
def test_transformers_own_fsdp_divides_while_it_loads(name: str, folder: Path, results: dict[str, Any]) -> None:
    divided = results["divided"][name]
    assert divided["losses"] == pytest.approx(losses_of_one_process(folder, name), rel=1e-5)
    found = sharded.logits_of(AutoModelForCausalLM.from_pretrained(folder / f"{name}-divided"))
    torch.testing.assert_close(found, torch.tensor(divided["logits"]))


@pytest.mark.parametrize(
    ("case", "kind", "parts"),
    [
        ("no state dict", "CheckpointError", ["divided over processes by FSDP", "accelerator.get_state_dict"]),
        ("sharded state dict", "CheckpointError", ["divided over processes by FSDP", "accelerator.get_state_dict"]),
        ("parameters alone", "CheckpointError", ["lacks", "rotary_pairs", "accelerator.get_state_dict"]),
        ("sharing", "CompressionError", ["'model.layers.0.self_attn.q_proj'", "NO_WRAP"]),
        ("tensor parallel", "ConfigurationError", ["tp_size=2", "without tp_plan", "dequantize()"]),
        ("sparse, divided", "ConfigurationError", ["sparse_linear", "accelerator.prepare()"]),
        ("compress, tensor parallel", "ConfigurationError", ["tp_plan=", "save the result, and train that"]),
        ("compress, prepared", "ConfigurationError", ["DTensor", "before accelerator.prepare()"]),
        ("efficient loading", "ConfigurationError", ["cpu_ram_efficient_loading to false", "rotary pairs"]),
        ("efficient loading, compress", "ConfigurationError", ["cpu_ram_efficient_loading", "Set it to false"]),
    ],
)
def test_what_cannot_work_says_so(case: str, kind: str, parts: list[str], results: dict[str, Any]) -> None:
    message = results["refusals"][case]
    assert message.startswith(f"{kind}: ")
    assert all(part in message for part in parts), message


def test_efficient_loading_works_without_buffers(results: dict[str, Any]) -> None:
    assert results["refusals"]["efficient loading without buffers"] == "nothing"


@pytest.mark.usefixtures("results")
def test_a_refused_save_leaves_no_file(folder: Path) -> None:
    assert not [path for path in folder.glob("refused/**/*") if path.is_file()]


@pytest.fixture
def zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `TrainingArguments(deepspeed=...)`; DeepSpeed itself is not needed to see that it is on."""
    config = SimpleNamespace(is_zero3=lambda: True, config={})
    monkeypatch.setattr("transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref", lambda: config)


@pytest.mark.usefixtures("zero3")
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}])
def test_zero3_and_compression(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"ZeRO-3 is on, and a compression needs every weight whole"):
        AutoModelForCausalLM.from_pretrained(folder / "dense", compression_config=RECIPES["sparse"], **options)


def test_zero3_and_a_model_in_memory(request: pytest.FixtureRequest) -> None:
    model, other = make_model("llama"), make_model("llama")
    require_whole(model)
    model.lm_head.weight.ds_id = 3
    with pytest.raises(ConfigurationError, match=r"'lm_head.weight' is divided over processes by DeepSpeed ZeRO-3"):
        require_whole(model)
    request.getfixturevalue("zero3")
    with pytest.raises(ConfigurationError, match="ZeRO-3 is on"):
        require_whole(other)


@pytest.mark.usefixtures("zero3")
def test_zero3_and_a_compressed_checkpoint(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ZeRO-3 is on, and it cannot divide .* Train with FSDP2"):
        AutoModelForCausalLM.from_pretrained(folder / "plain")


def test_the_trainer_asks_before_it_starts(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    model, packed = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("plain", "modular"))
    Trainer(model, arguments)
    monkeypatch.setattr("hf_compress.engine.placement.is_fsdp_enabled", lambda: True)
    Trainer(model, arguments)
    with pytest.raises(ConfigurationError, match="cpu_ram_efficient_loading"):
        Trainer(packed, arguments)
    request.getfixturevalue("zero3")
    with pytest.raises(ConfigurationError, match="ZeRO-3"):
        Trainer(model, arguments)


def test_a_state_dict_of_the_caller_is_what_is_saved(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "modular")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] *= 2
    model.save_pretrained(tmp_path, state_dict=state)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(sharded.logits_of(found), 2 * sharded.logits_of(model))
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(sharded.logits_of(found), sharded.logits_of(model))


def test_a_state_dict_without_the_codes_is_refused(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "codebook_embedding")
    with pytest.raises(CheckpointError, match=r"lacks 'model.embed_tokens.weight'"):
        model.save_pretrained(tmp_path, True, dict(model.named_parameters()))
    assert not os.listdir(tmp_path)


def test_activation_checkpointing_leaves_no_trace_in_the_layout(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "modular")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(sharded.logits_of(found), sharded.logits_of(model))
