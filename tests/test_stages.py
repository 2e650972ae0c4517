"""Stages: one method on the result of another, in one recipe or on a saved checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import ALL_KINDS, IDS, calibration, interrupt, logits, make_model, recipe, token_ids
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_compress
from hf_compress import (
    CalibrationConfig,
    CodebookConfig,
    CompressionConfig,
    LayerSharingConfig,
    ModularDecompositionConfig,
    PruningConfig,
)
from hf_compress.engine.freed import pages_of_files, return_pages
from hf_compress.layout import layout_of

SECOND: dict[str, Callable[[], Any]] = {
    "codebook": lambda: CodebookConfig(bits=3, rows_per_codebook=8),
    "mixed bits": lambda: CodebookConfig(bits="auto", average_bits=3, learning="none"),
    "pruning": lambda: PruningConfig(sparsity=0.6, scope="layer"),
    "int8": lambda: PruningConfig(sparsity=0.6, criterion="magnitude", values="int8"),
    "bnb 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb 4 bit, double": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "bnb 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "wanda": lambda: PruningConfig(sparsity=0.5, criterion="wanda"),
}

TYPES = {
    **dict.fromkeys(("pruning", "int8", "wanda"), "sparse_linear"),
    **dict.fromkeys(("bnb 4 bit", "bnb 4 bit, double"), "bnb_linear4bit"),
    "bnb 8 bit": "bnb_linear8bit",
}


def first(**fields: Any) -> ModularDecompositionConfig:
    return ModularDecompositionConfig(**{"reduction": 0.25, "kinds": ALL_KINDS, **fields})


def staged(family: str, second: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    config = CompressionConfig(stages=[first(**fields), SECOND[second]()], calibration=calibration())
    return hf_compress.compress(make_model(family, dtype), config)


# With biases; with norms of query and key; with a softcap; without a rotary embedding.
@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "gemma2", "opt"])
@pytest.mark.parametrize("second", sorted(SECOND))
def test_a_second_method_on_a_decomposed_model(family: str, second: str, tmp_path: Path) -> None:
    model = staged(family, second, torch.bfloat16)
    types = {entry["type"] for entry in layout_of(model)}
    packed = next(iter(types - {"attention"}))
    assert len(types) == 2
    assert packed == TYPES.get(second, "codebook_linear")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(again), logits(model))
    again = again.float()  # in bfloat16 two tokens are often equally likely
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = again.generate(IDS[:, :8], **options)
    assert torch.equal(cached, again.generate(IDS[:, :8], use_cache=False, **options))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_saves_twice_trains_adapters_and_goes_back(bits: int, double: bool, tmp_path: Path) -> None:
    fields = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "bnb_4bit_use_double_quant": double}
    config = CompressionConfig(stages=[first(), BitsAndBytesConfig(**fields)], calibration=calibration())
    model = hf_compress.compress(make_model("llama"), config)
    assert getattr(model, f"is_loaded_in_{bits}bit")
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert getattr(again, f"is_loaded_in_{bits}bit")
    torch.testing.assert_close(logits(again), logits(model))
    again.save_pretrained(tmp_path / "two")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two")]
    assert files[0] == files[1]

    adapted = peft.get_peft_model(again, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    assert any("bnb" in type(module).__module__ for module in adapted.modules())
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=token_ids(4, 16), labels=token_ids(4, 16)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]

    before = logits(model)
    model.dequantize()
    assert layout_of(model) == []
    torch.testing.assert_close(logits(model), before, rtol=0.1, atol=0.1)  # 8 bits quantize the inputs as well


def test_bitsandbytes_alone_and_what_it_refuses(tmp_path: Path) -> None:
    config = CompressionConfig(stages=[BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["layers.0"])])
    plan = hf_compress.plan(make_model("llama"), config)
    model = hf_compress.compress(make_model("llama"), config)
    assert not any(row.block == 0 for row in model.compression_report.modules)
    assert model.compression_report.bytes_after == pytest.approx(plan.bytes_on_disk, rel=0.01)
    for fields in ({}, {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}):
        with pytest.raises(hf_compress.ConfigurationError, match=r"load_in_4bit|not supported"):
            CompressionConfig(stages=[BitsAndBytesConfig(**fields)])
    model.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; import hf_compress\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'hf_compress[bitsandbytes]'" in failed.stderr


@pytest.mark.parametrize("second", ["codebook", "pruning"])
def test_dequantizing_gives_the_same_function(second: str) -> None:
    model = staged("llama", second, torch.float64)
    before = logits(model)
    model.dequantize()
    assert layout_of(model) == []
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", ["codebook", "pruning"])
def test_a_refused_dequantization_changes_nothing(second: str) -> None:
    model = staged("qwen3", second)
    before = layout_of(model)
    with pytest.raises(hf_compress.CompressionError, match="norm"):
        model.dequantize()
    assert layout_of(model) == before


def test_pruning_a_decomposed_and_pruned_model_again() -> None:
    model = staged("llama", "pruning")
    hf_compress.compress(model, PruningConfig(sparsity=0.9, criterion="magnitude"))
    assert model.compression_report.notes["sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_a_failure_before_the_work_leaves_a_decomposed_model_as_it_was(tmp_path: Path) -> None:
    model = hf_compress.compress(make_model("llama"), first(calibration=calibration()))
    report = model.compression_report
    with pytest.raises(hf_compress.CalibrationError, match="tokenizer"):
        hf_compress.compress(model, CodebookConfig(bits=3, calibration=CalibrationConfig(["some text"] * 9)))
    assert model.compression_report is report
    model.save_pretrained(tmp_path)
    hf_compress.compress(model, CodebookConfig(bits=3, calibration=calibration()))
    assert len(model.config.quantization_config.recipe["stages"]) == 2


@pytest.mark.parametrize("second", ["codebook", "pruning"])
def test_a_saved_checkpoint_is_compressed_further(second: str, tmp_path: Path) -> None:
    whole = staged("llama", second)
    half = hf_compress.compress(make_model("llama"), first(calibration=calibration()))
    half.save_pretrained(tmp_path / "half")
    config = SECOND[second]().model_copy(update={"calibration": calibration()})
    more = AutoModelForCausalLM.from_pretrained(tmp_path / "half", compression_config=config)
    torch.testing.assert_close(logits(more), logits(whole), rtol=1e-4, atol=1e-4)
    more.save_pretrained(tmp_path / "more")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "more").config.quantization_config.recipe
    assert stored == whole.config.quantization_config.recipe
    assert [stage["method"] for stage in stored["stages"]] == [first().method, config.method]


def test_the_report_and_the_plan_count_both_stages(tmp_path: Path) -> None:
    config = CompressionConfig(
        stages=[first(kinds=["mlp"]), CodebookConfig(bits=3, learning="none")], calibration=calibration()
    )
    dense = make_model("llama", torch.bfloat16)
    plan = hf_compress.plan(dense, config)
    report = hf_compress.compress(dense, config).compression_report
    assert report.block_linear_reduction == pytest.approx(0.25, abs=0.03)
    assert report.bytes_after == pytest.approx(plan.bytes_on_disk, rel=0.05)  # rows of a tiny model end in padding
    assert {row.kind for row in report.modules} >= {"mlp", "query_key", "value_output"}


def test_an_interrupted_second_stage_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    config = CompressionConfig(stages=[first(), SECOND["codebook"]()], calibration=calibration())
    whole = hf_compress.compress(make_model("llama"), config)
    method = hf_compress.methods.codebook.LearnedCodebooks
    compress_block = method.compress_block

    def fail(self: Any, block: int, statistics: Any) -> Any:
        return compress_block(self, block, statistics) if block < 2 else interrupt()

    monkeypatch.setattr(method, "compress_block", fail)
    with pytest.raises(KeyboardInterrupt):
        hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    monkeypatch.undo()
    resumed = hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_a_pruned_and_coded_model_trains() -> None:
    model = staged("llama", "pruning").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(token_ids(4, 16), labels=token_ids(4, 16)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


STACKS: dict[str, Callable[[], list[Any]]] = {
    **{f"decomposition and {name}": lambda make=make: [first(), make()] for name, make in SECOND.items()},
    "int8 values": lambda: [SECOND["int8"]()],
    "sharing and codebook": lambda: [LayerSharingConfig(unique_layers=2, lora_rank=2), SECOND["codebook"]()],
}


@pytest.mark.parametrize("stack", sorted(STACKS))
def test_lora_wins_quality_back_after_every_stack(stack: str, tmp_path: Path) -> None:
    student = hf_compress.compress(
        make_model("llama"), CompressionConfig(stages=STACKS[stack](), calibration=calibration())
    )
    student.save_pretrained(tmp_path / "base")
    teacher = make_model("llama")
    # Random tokens have nothing in common with others: what is learned shows on those that are trained on.
    source, ids = calibration(num_samples=16, num_held_out=0), token_ids()
    before = (logits(student, ids) - logits(teacher, ids)).square().mean()
    options = {"max_steps": 12, "use_cpu": True, "disable_tqdm": True, "learning_rate": 3e-3, "kl_weight": 1.0}
    result = hf_compress.recover(student, teacher, source, method="lora", lora_rank=4, **options)
    # The weights of all these are codes, positions or shared: the adapter stays beside them.
    assert isinstance(result, peft.PeftModel)
    assert (logits(result, ids) - logits(teacher, ids)).square().mean() < 0.85 * before
    result.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(result), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([CodebookConfig(bits=3, learning="none"), recipe()], r"stage 2 \(Modular.*codebook_linear"),
        ([CodebookConfig(bits=3, learning="none"), PruningConfig(sparsity=0.5, criterion="magnitude")], "stage 2"),
        ([PruningConfig(sparsity=0.5, criterion="magnitude"), CodebookConfig(bits=3, learning="none")], "stage 2"),
        ([LayerSharingConfig(unique_layers=2), PruningConfig(sparsity=0.5, criterion="magnitude")], "shared_linear"),
        ([CodebookConfig(bits=3, learning="none"), LayerSharingConfig(unique_layers=2)], "codebook_linear"),
        ([recipe(portable=True), CodebookConfig(bits=3, learning="none")], "portable=True"),
    ],
)
def test_orders_that_do_not_work_are_refused_before_work(stages: list[Any], message: str) -> None:
    model = make_model("llama")
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        hf_compress.compress(model, CompressionConfig(stages=stages, calibration=calibration()))
    assert layout_of(model) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's own")
def test_replaced_weights_leave_no_pages_of_their_file(tmp_path: Path) -> None:
    """And whoever still reads them finds what was there."""

    def mapped() -> int:
        return int(re.search(r"RssFile:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    weights = torch.arange(2**23, dtype=torch.float32)
    save_file({"small": torch.ones(3), "weights": weights}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        read = file.get_tensor("weights")
        assert torch.equal(read, weights)
        before = mapped()
        return_pages(pages_of_files([read, torch.ones(2**20)]))
        assert mapped() < before - 2**24
        assert torch.equal(read, weights)
