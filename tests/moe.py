"""Recipes for models with experts, and what their experts see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import EXPERTS, calibration, recipe
from transformers import PreTrainedModel

from hf_compress import (
    CodebookConfig,
    CompressionConfig,
)
from hf_compress.anatomy import resolve_anatomy

every_family = pytest.mark.parametrize("name", sorted(EXPERTS))
MLPS: dict[str, Any] = {"kinds": ["mlp"], "allocation": "uniform"}
RECIPES: dict[str, Any] = {
    "modular": lambda: recipe(**MLPS),
    "modular, sequential": lambda: recipe(**MLPS, order="sequential"),
    "codebook": lambda: CodebookConfig(bits=3, rows_per_codebook=16, calibration=calibration()),
    "codebook, no data": lambda: CodebookConfig(bits=2, learning="none"),
    "codebook, tuned": lambda: CodebookConfig(bits=2, block_epochs=1, calibration=calibration()),
    "stack": lambda: CompressionConfig(
        stages=[recipe(**MLPS, calibration=None), CodebookConfig(bits=3)], calibration=calibration()
    ),
}
every_recipe = pytest.mark.parametrize("kind", RECIPES)


@contextmanager
def inputs_of(model: PreTrainedModel, block: int) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """What the experts of a block are called with."""
    seen: list[tuple[torch.Tensor, ...]] = []
    experts = resolve_anatomy(model).experts(block)
    assert experts is not None
    handle = experts.module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    yield seen
    handle.remove()


def routed_rows(seen: list[tuple[torch.Tensor, ...]], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of an expert and the weights of its output, one by one."""
    rows, weights = [], []
    for hidden, index, factors in seen:
        for token in range(len(hidden)):
            for place in range(index.shape[1]):
                if index[token, place] == expert:
                    rows.append(hidden[token])
                    weights.append(factors[token, place])
    return torch.stack(rows), torch.stack(weights)
