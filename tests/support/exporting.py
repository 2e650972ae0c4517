"""Models through ONNX, and what comes out beside what they say themselves."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from conftest import token_ids
from transformers import BertModel, PreTrainedModel


class Outputs(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        options = {} if isinstance(self.model, BertModel) else {"use_cache": False}
        output: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)[0]
        return output


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Another batch and length than the example's, and padding on the left."""
    ids = token_ids(3, 11, seed=9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


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
