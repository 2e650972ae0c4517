"""Learned codebooks on blocks that are shared: a matrix is coded once, for all loops that use it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IDS, calibration, interrupt, logits, make_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import hf_compress
from hf_compress import CodebookConfig, CompressionConfig, LayerSharingConfig
from hf_compress.layout import build_module, layout_of

SHARED: dict[str, dict[str, Any]] = {
    "corrected": {"unique_layers": 2, "lora_rank": 2},
    "one block": {"unique_layers": 1, "share_norms": True},
    "MLPs in a row": {"unique_layers": 2, "order": "sequence", "share": ["mlp"]},
}


def shared_and_coded(family: str, sharing: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    coding = CodebookConfig(**{"bits": 3, "rows_per_codebook": 8, **fields})
    config = CompressionConfig(stages=[LayerSharingConfig(**SHARED[sharing]), coding], calibration=calibration())
    return hf_compress.compress(make_model(family, dtype), config)


@pytest.mark.parametrize("family", ["llama_bias", "gemma2", "opt"])
@pytest.mark.parametrize("sharing", sorted(SHARED))
def test_shared_matrices_are_coded_once(family: str, sharing: str, tmp_path: Path) -> None:
    model = shared_and_coded(family, sharing, torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(again), logits(model))
    assert layout_of(again) == layout_of(model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    down = [name for name in stored if re.search(r"\.(down_proj|fc2)\.weight$", name)]
    kept = SHARED[sharing]["unique_layers"]
    assert sorted(stored[name].dtype != torch.uint8 for name in down) == [False] * (4 - kept) + [True] * kept
    assert {stored[name].dtype for name in down} == {torch.int32, torch.uint8}
    assert all(stored[name].numel() == 1 for name in down if stored[name].dtype == torch.uint8)

    stages = [LayerSharingConfig(**SHARED[sharing]), CodebookConfig(bits=3, rows_per_codebook=8)]
    config = CompressionConfig(stages=stages)
    expected = hf_compress.plan(make_model(family, torch.bfloat16), config, measure_time=False)
    assert expected.bytes_on_disk == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert expected.parameters_after == model.compression_report.parameters_after
    again = again.float()  # in bfloat16 two tokens are often equally likely
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = again.generate(IDS[:, :8], **options)
    assert torch.equal(cached, again.generate(IDS[:, :8], use_cache=False, **options))


@pytest.mark.parametrize("sharing", sorted(SHARED))
def test_coding_leaves_what_loops_have_of_their_own(sharing: str) -> None:
    model = shared_and_coded("llama_bias", sharing)
    plain = hf_compress.compress(make_model("llama_bias"), LayerSharingConfig(**SHARED[sharing]))
    coded, before = dict(model.named_parameters()), dict(plain.named_parameters())
    assert {name for name in before if name not in coded} <= {name for name in before if name.endswith(".weight")}
    assert all(torch.equal(coded[name], before[name]) for name in coded)
    # The loops multiply with the codes: their answers are those of the decoded matrices.
    reference = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)


def test_trained_tables_of_a_shared_matrix_stay_in_float32(tmp_path: Path) -> None:
    model = shared_and_coded("llama", "corrected", torch.bfloat16, trainable_codebooks=True)
    reference = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), reference)
    assert again.model.layers[0].mlp.down_proj.codebooks.dtype == torch.float32
    again.dequantize()
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(again), reference, rtol=0.1, atol=0.2)


def test_a_shared_and_coded_model_takes_larger_steps(tmp_path: Path) -> None:
    model = shared_and_coded("llama", "one block")
    model.set_iterations(2)
    assert not torch.equal(logits(model), logits(shared_and_coded("llama", "one block")))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.set_iterations()
    assert torch.equal(logits(again), logits(shared_and_coded("llama", "one block")))


def test_a_saved_shared_model_is_coded(tmp_path: Path) -> None:
    model = hf_compress.compress(make_model("llama"), LayerSharingConfig(**SHARED["one block"]))
    model.save_pretrained(tmp_path / "shared")
    config = CodebookConfig(bits=3, rows_per_codebook=8, calibration=calibration())
    coded = AutoModelForCausalLM.from_pretrained(tmp_path / "shared", compression_config=config)
    whole = shared_and_coded("llama", "one block")
    assert torch.equal(logits(coded), logits(whole))
    coded.save_pretrained(tmp_path / "coded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    assert torch.equal(logits(again), logits(whole))
    assert again.config.quantization_config.recipe == whole.config.quantization_config.recipe

    model.set_iterations(2)
    with pytest.raises(hf_compress.ConfigurationError, match=r"set_iterations\(model\) first"):
        hf_compress.compress(model, config)
    assert "CodebookSharedLinear" not in repr(model)


def test_tuning_a_block_that_is_shared_keeps_its_correction() -> None:
    plain, tuned = (shared_and_coded("llama", "corrected", bits=2, block_epochs=epochs) for epochs in (0, 2))
    changed = [
        name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, plain.state_dict()[name])
    ]
    assert any(name.endswith("codebooks") for name in changed)
    assert not any("lora" in name for name in changed)
    layer = tuned.model.layers[0].mlp.down_proj
    states = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer.with_weight(states, layer.matrix()), layer(states), rtol=1e-4, atol=1e-4)


def test_codes_of_a_shared_matrix_are_for_the_inputs_of_all_its_loops(monkeypatch: Any) -> None:
    method = hf_compress.methods.codebook.LearnedCodebooks
    compress_block, survey, grams, batches = method.compress_block, method.survey, {}, []

    def keep_batches(self: Any, session: Any) -> None:
        batches.extend(session.batches)
        survey(self, session)

    def keep_grams(self: Any, block: int, statistics: Any) -> Any:
        if not grams:
            grams.update({path: gram.clone() for path, gram in statistics.grams.items()})
        return compress_block(self, block, statistics)

    monkeypatch.setattr(method, "survey", keep_batches)
    monkeypatch.setattr(method, "compress_block", keep_grams)
    shared_and_coded("llama", "one block")
    model = hf_compress.compress(make_model("llama"), LayerSharingConfig(**SHARED["one block"]))
    seen: dict[str, torch.Tensor] = {}

    def add(path: str, states: torch.Tensor) -> None:
        rows = states.flatten(end_dim=-2).double()
        seen[path] = seen.get(path, torch.zeros(())) + rows.T @ rows

    inner = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    for layer in model.model.layers:
        for path in inner:
            layer.get_submodule(path).register_forward_pre_hook(lambda _, inputs, path=path: add(path, inputs[0]))
    for batch in batches:
        logits(model, batch["input_ids"])
    for path in inner:
        torch.testing.assert_close(grams[f"model.layers.0.{path}"], seen[path], rtol=1e-3, atol=1e-3)


def test_an_interrupted_coding_of_shared_blocks_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    stages = [LayerSharingConfig(**SHARED["MLPs in a row"]), CodebookConfig(bits=3, rows_per_codebook=8)]
    config = CompressionConfig(stages=stages, calibration=calibration())
    method = hf_compress.methods.codebook.LearnedCodebooks
    compress_block = method.compress_block

    def fail(self: Any, block: int, statistics: Any) -> Any:
        return compress_block(self, block, statistics) if block < 2 else interrupt()

    monkeypatch.setattr(method, "compress_block", fail)
    with pytest.raises(KeyboardInterrupt):
        hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    monkeypatch.undo()
    resumed = hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    whole = shared_and_coded("llama", "MLPs in a row")
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_without_the_package_loading_stops(tmp_path: Path) -> None:
    """Plain Transformers must raise, never fill the model with random weights."""
    shared_and_coded("llama", "one block").save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['hf_compress'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "mismatch" in result.stderr


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("rank", 1000, "rank"), ("bits", 5, "bits"), ("bias", None, "bias"), ("extra", 1, "unknown fields")],
)
def test_a_damaged_layout_is_refused(field: str, value: Any, message: str) -> None:
    model = shared_and_coded("llama", "corrected")
    entry = next(entry for entry in layout_of(model) if entry["type"] == "codebook_shared_linear")
    with pytest.raises(hf_compress.CheckpointError, match=message):
        build_module(
            make_model("llama").get_submodule(entry["path"]), {**entry, "spec": {**entry["spec"], field: value}}
        )
