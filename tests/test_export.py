"""Compressed models through `torch.export` and ONNX: what the README's table of exports says, cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import calibration, logits, make_model, recipe, token_ids
from support.exporting import Outputs, assert_same, inputs, through_onnx
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import hf_compress
from hf_compress import CodebookConfig, LayerSharingConfig, PruningConfig

KINDS = ["mlp", "query_key", "value_output"]
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
RECIPES: dict[str, Callable[[], Any]] = {
    "decomposed MLPs": lambda: recipe(kinds=["mlp"]),
    "decomposed attention": lambda: recipe(kinds=KINDS),
    "codebooks": lambda: CodebookConfig(bits=3, learning="none", rows_per_codebook=8),
    "pruned": lambda: PruningConfig(sparsity=0.8, criterion="magnitude"),
    "heads and columns": lambda: PruningConfig(sparsity=0.3, criterion="magnitude", structured=True),
    "shared layers": lambda: LayerSharingConfig(unique_layers=2, lora_rank=2),
}
# Packed tensors go through operators of this package, which no other program has.
PACKED = ("codebooks", "pruned")

pytestmark = pytest.mark.usefixtures("unchecked_types")


def exportable(name: str) -> PreTrainedModel:
    """A compressed Llama; what is packed is made dense, and says what the packed one says."""
    model = hf_compress.compress(make_model("llama"), RECIPES[name]())
    if name in PACKED:
        before = logits(model)
        model = model.dequantize()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    return model.eval()


def exported(model: PreTrainedModel) -> torch.export.ExportedProgram:
    example, axes = token_ids(2, 20, seed=5), {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=100)}
    return torch.export.export(
        Outputs(model).eval(), (example, torch.ones_like(example)), dynamic_shapes=(axes, axes), strict=False
    )


@pytest.mark.parametrize("name", list(RECIPES))
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_torch_export(name: str) -> None:
    model = exportable(name)
    assert_same(exported(model).module()(*inputs()), model)


@pytest.mark.parametrize("name", list(RECIPES))
def test_onnx(name: str, tmp_path: Path) -> None:
    model = exportable(name)
    assert_same(through_onnx(model, tmp_path), model)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_packed_layers_are_exported_for_torch_alone(name: str) -> None:
    """Within a program that imports this package an exported program may hold them as they are."""
    model = hf_compress.compress(make_model("llama"), RECIPES[name]()).eval()
    assert_same(exported(model).module()(*inputs()), model)


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_an_encoder_and_fused_projections(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=96, **SIZES), add_pooling_layer=False)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=128))
    for number, dense in enumerate((bert, gpt2)):
        model = hf_compress.compress(dense.eval(), recipe(kinds=KINDS, calibration=calibration()))
        assert_same(exported(model).module()(*inputs()), model)
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_same(through_onnx(model, folder), model)
