"""Stages: one method on the result of another, in one recipe or on a saved checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_KINDS, IDS, calibration, interrupt, logits, make_model, recipe, token_ids
from transformers import AutoModelForCausalLM

import hf_compress
from hf_compress import (
    CodebookConfig,
    CompressionConfig,
    LayerSharingConfig,
    ModularDecompositionConfig,
    PruningConfig,
)
from hf_compress.layout import layout_of

SECOND: dict[str, Callable[[], Any]] = {
    "codebook": lambda: CodebookConfig(bits=3, rows_per_codebook=8),
    "mixed bits": lambda: CodebookConfig(bits="auto", average_bits=3, learning="none"),
    "pruning": lambda: PruningConfig(sparsity=0.6, scope="layer"),
    "int8": lambda: PruningConfig(sparsity=0.6, criterion="magnitude", values="int8"),
    "wanda": lambda: PruningConfig(sparsity=0.5, criterion="wanda"),
}


def first(**fields: Any) -> ModularDecompositionConfig:
    return ModularDecompositionConfig(**{"reduction": 0.25, "kinds": ALL_KINDS, **fields})


def staged(family: str, second: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    config = CompressionConfig(stages=[first(**fields), SECOND[second]()], calibration=calibration())
    return hf_compress.compress(make_model(family, dtype), config)


@pytest.mark.parametrize("second", sorted(SECOND))
def test_a_second_method_on_a_decomposed_model(family: str, second: str, tmp_path: Path) -> None:
    model = staged(family, second, torch.bfloat16)
    types = {entry["type"] for entry in layout_of(model)}
    assert types == {"attention", "sparse_linear" if second in ("pruning", "int8", "wanda") else "codebook_linear"}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(again), logits(model))
    again = again.float()  # in bfloat16 two tokens are often equally likely
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = again.generate(IDS[:, :8], **options)
    assert torch.equal(cached, again.generate(IDS[:, :8], use_cache=False, **options))


@pytest.mark.parametrize("second", ["codebook", "pruning"])
def test_dequantizing_gives_the_same_function(second: str) -> None:
    model = staged("llama", second, torch.float64)
    before = logits(model)
    model.dequantize()
    assert layout_of(model) == []
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([CodebookConfig(bits=3, learning="none"), recipe()], r"stage 2 \(Modular.*codebook_linear"),
        ([CodebookConfig(bits=3, learning="none"), PruningConfig(sparsity=0.5, criterion="magnitude")], "stage 2"),
        ([PruningConfig(sparsity=0.5, criterion="magnitude"), CodebookConfig(bits=3, learning="none")], "stage 2"),
        ([LayerSharingConfig(unique_layers=2), CodebookConfig(bits=3, learning="none")], "shared_linear"),
        ([recipe(portable=True), CodebookConfig(bits=3, learning="none")], "portable=True"),
    ],
)
def test_orders_that_do_not_work_are_refused_before_work(stages: list[Any], message: str) -> None:
    model = make_model("llama")
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        hf_compress.compress(model, CompressionConfig(stages=stages, calibration=calibration()))
    assert layout_of(model) == []
