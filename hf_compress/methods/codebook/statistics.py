"""What learned codebooks measure of a block: Grams of the inputs of its matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...calibration.statistics import gram
from ...engine.blocks import real_tokens


@dataclass
class InputStatistics:
    """Sums over calibration tokens, float64.

    Args:
        grams: Gram of the inputs of every matrix by its path, (columns, columns); matrices that see the same tensor
            share one.
        drift: of the matrix at `drift_path`, `Σ xᵀ (y_dense − y)` with the block's outputs y, (columns, d_model): what
            the residual stream has lost until here and this matrix could give back.
    """

    drift_path: str | None = None
    grams: dict[str, Float[Tensor, "columns columns"]] = field(default_factory=dict)
    drift: Float[Tensor, "columns d_model"] | None = None
    _first_of: dict[str, str] = field(default_factory=dict)
    _inputs: dict[str, Tensor] = field(default_factory=dict)

    def observe_input(self, path: str, tensor: Tensor) -> None:
        """Add a batch's input of a matrix, once for all matrices that are handed the same tensor."""
        if path in self._inputs:
            self._inputs.clear()  # the next batch
        first = next((other for other, seen in self._inputs.items() if seen is tensor), path)
        self._inputs[path] = tensor
        if first != path and self._first_of.get(path, first) == first:
            self._first_of[path] = first
            return
        rows = real_tokens(tensor)
        self.grams[path] = self.grams[path] + gram(rows) if path in self.grams else gram(rows)

    def observe_drift(self, output: Tensor, dense_output: Tensor) -> None:
        """After a batch: its output of the block beside the dense model's."""
        if self.drift_path is None or self.drift_path not in self._inputs:
            return
        inner = real_tokens(self._inputs[self.drift_path]).float()
        lost = real_tokens(dense_output.float() - output.float())
        product = (inner.T @ lost).double()
        self.drift = product if self.drift is None else self.drift + product

    def finish(self) -> None:
        """Give every matrix its Gram and let go of the last batch."""
        self._inputs.clear()
        for path, first in self._first_of.items():
            self.grams[path] = self.grams[first]


@contextmanager
def collect_inputs(model: nn.Module, paths: list[str], drift_path: str | None) -> Iterator[InputStatistics]:
    """Attach hooks to matrices; padding tokens are left out."""
    statistics = InputStatistics(drift_path)
    handles = []
    for path in paths:

        def observe(_module: nn.Module, inputs: tuple[Tensor, ...], _path: str = path) -> None:
            statistics.observe_input(_path, inputs[0].detach() if inputs[0].requires_grad else inputs[0])

        handles.append(model.get_submodule(path).register_forward_pre_hook(observe))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
        statistics.finish()


def flat_gram(columns: int, device: torch.device) -> Float[Tensor, "columns columns"]:
    """In place of data: every input alike."""
    return torch.eye(columns, dtype=torch.float64, device=device)
