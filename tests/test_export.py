"""Compressed models through `torch.export` and ONNX: what the README's table of exports says, cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from conftest import calibration, logits, make_model, recipe, token_ids
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


class Outputs(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        options = {} if isinstance(self.model, BertModel) else {"use_cache": False}
        output: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)[0]
        return output


def exportable(name: str) -> PreTrainedModel:
    """A compressed Llama; what is packed is made dense, and says what the packed one says."""
    model = hf_compress.compress(make_model("llama"), RECIPES[name]())
    if name in PACKED:
        before = logits(model)
        model = model.dequantize()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    return model.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Another batch and length than the example's, and padding on the left."""
    ids = token_ids(3, 11, seed=9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def exported(model: PreTrainedModel) -> torch.export.ExportedProgram:
    example, axes = token_ids(2, 20, seed=5), {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=100)}
    return torch.export.export(
        Outputs(model).eval(), (example, torch.ones_like(example)), dynamic_shapes=(axes, axes), strict=False
    )


def assert_same(found: torch.Tensor, model: PreTrainedModel) -> None:
    ids, mask = inputs()
    with torch.no_grad():
        expected = Outputs(model)(ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def through_onnx(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    example, axes = token_ids(2, 20, seed=5), {0: "batch", 1: "tokens"}
    torch.onnx.export(
        Outputs(model).eval(),
        (example, torch.ones_like(example)),
        folder / "model.onnx",
        dynamo=True,
        dynamic_shapes=(axes, axes),
        input_names=["input_ids", "attention_mask"],
        output_names=["logits"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids, mask = inputs()
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(found)


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
