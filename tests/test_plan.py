"""What a plan says against what the run then writes, for every method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from test_stages import calibration
from transformers import BertConfig, BertModel, BitsAndBytesConfig

import hf_compress
from hf_compress import (
    CalibrationConfig,
    CodebookConfig,
    CompressionConfig,
    LayerSharingConfig,
    ModularDecompositionConfig,
    PruningConfig,
)

FAMILIES = ("llama", "qwen2", "qwen3", "opt")
# Recipes that alone decide on the layout, and recipes whose sizes data have a say in.
EXACT: dict[str, list[Any]] = {
    "codebook": [CodebookConfig(bits=3, learning="none")],
    "codebook, kinds": [CodebookConfig(bits={"mlp": 2, "query_key": 4, "embedding": 4}, learning="none")],
    "codebook, three codes": [CodebookConfig(bits=1.58, learning="none")],
    "MLP evenly": [ModularDecompositionConfig(reduction=0.2, kinds=["mlp"], allocation="uniform")],
    "all kinds evenly": [
        ModularDecompositionConfig(
            reduction=0.25, kinds=["mlp", "query_key", "value_output"], allocation="uniform", max_module_reduction=0.9
        )
    ],
    "portable": [ModularDecompositionConfig(reduction=0.2, portable=True)],
    "sharing": [LayerSharingConfig(unique_layers=2, lora_rank=4)],
    "sharing, norms": [LayerSharingConfig(unique_layers=1, share_norms=True)],
    "sharing by data": [LayerSharingConfig(unique_layers=2, lora_rank=4, initialization="activation_aware")],
    "nf4": [BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)],
    "int8": [BitsAndBytesConfig(load_in_8bit=True)],
    "MLP evenly, codebook": [
        ModularDecompositionConfig(reduction=0.2, kinds=["mlp"], allocation="uniform"),
        CodebookConfig(bits=3, learning="none"),
    ],
}
ESTIMATED: dict[str, list[Any]] = {
    "bits by data, table": [CodebookConfig(bits="auto", average_bits=2.25, table_bits=4, learning="none")],
    "row by row": [PruningConfig(sparsity=0.7, criterion="magnitude", scope="row")],
    "half of them": [PruningConfig(sparsity=0.4, criterion="wanda")],
    "block influence": [ModularDecompositionConfig(reduction=0.2)],
    "block influence, attention": [ModularDecompositionConfig(reduction={"query_key": 0.4, "value_output": 0.3})],
    "bits by data": [CodebookConfig(bits="auto", average_bits=2.6, learning="feedback")],
    "magnitude": [PruningConfig(sparsity=0.9, criterion="magnitude")],
    "wanda": [PruningConfig(sparsity=0.5, criterion="wanda")],
    "int8 values": [PruningConfig(sparsity=0.95, criterion="magnitude", values="int8")],
    "structured": [PruningConfig(sparsity=0.3, criterion="magnitude", structured=True)],
    "influence, pruned": [
        ModularDecompositionConfig(reduction=0.2, kinds=["mlp"]),
        PruningConfig(sparsity=0.8, criterion="magnitude"),
    ],
}


def written(stages: list[Any], family: str, folder: Path) -> tuple[hf_compress.CompressionPlan, int]:
    """The plan, and the bytes of all tensors that the run writes."""
    recipe = CompressionConfig(stages=stages, calibration=calibration())
    make_model(family, torch.bfloat16).save_pretrained(folder / "dense")
    plan = hf_compress.plan(folder / "dense", recipe, measure_time=False)
    model = hf_compress.compress(make_model(family, torch.bfloat16), recipe)
    model.save_pretrained(folder / "out")
    tensors = load_file(folder / "out" / "model.safetensors").values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert size == model.compression_report.bytes_after
    if plan.bytes_on_disk == plan.bytes_at_most:
        assert plan.parameters_after == model.compression_report.parameters_after
        assert plan.block_linear_after == model.compression_report.block_linear_after
    return plan, size


@pytest.mark.parametrize("stages", [ESTIMATED["magnitude"], ESTIMATED["wanda"], EXACT["codebook"]])
def test_a_model_in_float32(stages: list[Any], tmp_path: Path) -> None:
    recipe = CompressionConfig(stages=stages, calibration=calibration())
    plan = hf_compress.plan(make_model("llama"), recipe, measure_time=False)
    model = hf_compress.compress(make_model("llama"), recipe)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors").values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert model.compression_report.bytes_after == size <= plan.bytes_at_most
    assert plan.bytes_on_disk == pytest.approx(size, rel=0.02)


def test_the_class_is_that_of_the_checkpoint_or_of_the_model(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=96
    )
    recipe = CodebookConfig(bits=3, learning="none")
    for model in (BertModel(config), BertModel(config, add_pooling_layer=False)):
        size = sum(parameter.numel() * 4 for parameter in model.parameters())
        assert hf_compress.plan(model, recipe).bytes_before == size
    BertModel(config).save_pretrained(tmp_path)
    plan = hf_compress.plan(tmp_path, recipe)
    assert plan.bytes_on_disk == hf_compress.compress(BertModel(config), recipe).compression_report.bytes_after
    half = hf_compress.plan(tmp_path, recipe, dtype="bfloat16")
    assert half.bytes_before * 2 == plan.bytes_before
    with pytest.raises(hf_compress.ConfigurationError, match="unknown dtype"):
        hf_compress.plan(tmp_path, recipe, dtype="int9")
    mixed = make_model("llama", torch.bfloat16)
    mixed.lm_head.float()
    expected = sum(parameter.numel() * parameter.element_size() for parameter in mixed.parameters())
    assert hf_compress.plan(mixed, recipe).bytes_before == expected


@pytest.mark.parametrize(
    "stages",
    [
        [CodebookConfig(bits=3), ModularDecompositionConfig(reduction=0.2)],
        [PruningConfig(sparsity=0.5, criterion="magnitude"), CodebookConfig(bits=3)],
        [ModularDecompositionConfig(reduction=0.2), PruningConfig(sparsity=0.3, structured=True)],
        [PruningConfig(sparsity=0.5, criterion="sensitivity", schedule="cubic", end_step=9)],
    ],
)
def test_what_compress_refuses_the_plan_refuses(stages: list[Any]) -> None:
    recipe = CompressionConfig(stages=stages, calibration=calibration())
    for call in (hf_compress.plan, hf_compress.compress):
        with pytest.raises(hf_compress.ConfigurationError):
            call(make_model("llama"), recipe)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXACT)
def test_what_the_recipe_decides_is_planned_to_the_byte(name: str, family: str, tmp_path: Path) -> None:
    plan, size = written(EXACT[name], family, tmp_path)
    assert plan.bytes_on_disk == plan.bytes_at_most == size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ESTIMATED)
def test_what_data_decide_is_estimated_under_a_ceiling(name: str, family: str, tmp_path: Path) -> None:
    plan, size = written(ESTIMATED[name], family, tmp_path)
    assert size <= plan.bytes_at_most
    assert plan.bytes_on_disk == pytest.approx(size, rel=0.02)


def test_rows_add_up(tmp_path: Path) -> None:
    plan = hf_compress.plan(make_model("llama"), CodebookConfig(bits={"mlp": 2, "embedding": 4}, learning="none"))
    assert {row.kind for row in plan.rows} == {"embedding", "mlp", "query_key", "value_output", "head"}
    saved = sum(row.bytes_before - row.bytes_after for row in plan.rows)
    assert saved == plan.bytes_before - plan.bytes_on_disk
    assert plan.bits_per_weight is not None and 2 < plan.bits_per_weight < 8
    assert all(row.bytes_after == row.bytes_before for row in plan.rows if row.kind == "query_key")
    text = str(plan)
    assert "value_output" in text and f"{plan.bytes_on_disk:,}" in text and "peak memory" in text


def test_a_model_in_memory_is_planned_for_and_left_alone() -> None:
    model = make_model("qwen2", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = hf_compress.plan(model, PruningConfig(sparsity=0.5, criterion="magnitude"))
    assert plan.bytes_before == sum(p.numel() * 2 for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "compression_report")


@pytest.mark.parametrize(
    "stages",
    [
        EXACT["codebook"],
        EXACT["sharing"],
        EXACT["sharing by data"],
        ESTIMATED["block influence"],
        ESTIMATED["magnitude"],
        EXACT["MLP evenly, codebook"],
    ],
)
def test_the_time_is_rehearsed(stages: list[Any]) -> None:
    recipe = CompressionConfig(stages=stages, calibration=calibration())
    plan = hf_compress.plan(make_model("llama"), recipe, measure_time=True)
    assert plan.seconds is not None and 0 < plan.seconds < 600
    assert "about" in str(plan)


def test_more_data_take_more_memory() -> None:
    def peak(**data: int) -> int:
        source = CalibrationConfig("text.txt", **data)
        config = ModularDecompositionConfig(reduction=0.2, calibration=source)
        return hf_compress.plan(make_model("llama"), config).peak_memory

    few, many = peak(num_samples=8), peak(num_samples=80)
    hidden = make_model("llama").config.hidden_size
    # The residual stream at one place; a batch replaces its input with its output.
    assert many - few == 72 * 2048 * hidden * 4


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    source = CalibrationConfig("text.txt", num_samples=512, sequence_length=2048)
    plan = hf_compress.plan(make_model("llama"), ModularDecompositionConfig(reduction=0.2, calibration=source))
    plan.require_memory(plan.peak_memory)
    smaller = plan.peak_for(dataclasses.replace(plan.workload, batch_size=1, num_samples=128))
    with pytest.raises(hf_compress.ConfigurationError, match="num_samples=128 and batch_size=1 would take"):
        plan.require_memory(smaller)
    with pytest.raises(hf_compress.ConfigurationError, match="no smaller calibration would fit"):
        plan.require_memory(2**20)


@pytest.mark.parametrize("kinds", ["auto", ["mlp"]])
def test_each_of_several_processes_holds_more_blocks_and_fewer_tokens(kinds: Any) -> None:
    config = ModularDecompositionConfig(
        reduction=0.25, kinds=kinds, calibration=calibration(num_samples=16, batch_size=4)
    )
    one, four, many = (
        hf_compress.plan(make_model("llama"), config, measure_time=False, processes=count) for count in (1, 4, 17)
    )
    block = one.block_linear_before // 4 * 4
    assert four.streamed_memory is not None and one.streamed_memory is not None
    assert four.streamed_memory_at_least > one.streamed_memory_at_least + (7 if kinds == "auto" else 1) * block
    assert four.workload == one.workload and four.on_paper().rows == one.on_paper().rows
    # 16 sequences do not go round 17: one does the work.
    assert many.streamed_memory == one.streamed_memory and many.peak_memory == one.peak_memory
