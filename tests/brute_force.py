"""Modular decomposition by other means: least squares and singular values of what the modules really compute.

Everything takes activations, (tokens, n), and weights of the dense model in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def matrix(layer: nn.Module) -> Tensor:
    """The weight as it multiplies from the right: (inputs, outputs)."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    return weight if isinstance(layer, Conv1D) else weight.T


def inputs_of(model: nn.Module, layer: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What goes into a layer of a model, padding left out: (tokens, inputs)."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    mask = batch.get("attention_mask")
    return seen[0].flatten(end_dim=-2) if mask is None else seen[0][mask.bool()]


def best_down(inner: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    """The least-squares refit of the down projection (inner, d) to some of its inputs: (kept, d)."""
    solution: Tensor = torch.linalg.lstsq(inner[:, kept], inner @ down, driver="gelsd").solution
    return solution


@dataclass
class Projections:
    """Query, key and value of a token batch, (heads, tokens, d), and the output's weight (heads, d, d_model)."""

    query: Tensor
    key: Tensor
    value: Tensor
    value_bias: Tensor
    output: Tensor

    def value_output_error(self, rank: int) -> float:
        """The least relative error of `Σ ‖v W_O‖²` over a query head group with values of `rank` dimensions."""
        groups = len(self.output) // len(self.value)
        lost = energy = 0.0
        for head in range(len(self.value)):
            outputs = torch.cat([*self.output[groups * head : groups * (head + 1)]], dim=1)
            values = torch.linalg.svdvals((self.value[head] - self.value_bias[head]) @ outputs).square()
            lost, energy = lost + float(values[rank:].sum()), energy + float(values.sum())
        return lost / energy

    def query_key_error(self, rank: int) -> float:
        """The least relative error of all `q · (k − mean k)` with queries and keys of `rank` dimensions."""
        groups = len(self.query) // len(self.key)
        lost = energy = 0.0
        for head in range(len(self.key)):
            queries = torch.cat([*self.query[groups * head : groups * (head + 1)]])
            centred = self.key[head] - self.key[head].mean(dim=0)
            values = torch.linalg.svdvals(queries @ centred.T).square()
            lost, energy = lost + float(values[rank:].sum()), energy + float(values.sum())
        return lost / energy
