"""What a pruning in a training has to remember beside masks and scores."""

from __future__ import annotations

import math

import torch
from torch import nn

from ...errors import CheckpointError
from .masks import STATE

# Places in the buffer.
_STEP, _FINISHED, _OBSERVED, _SKIPPED, _TARGET, _CRITERION = range(6)


class TrainingState:
    """Counters in a buffer of one module, so that they go wherever the state dict goes.

    Args:
        holder: the module that keeps the buffer.
        target: the sparsity that is pruned to.
        criterion: the number of the criterion.

    Attributes:
        step: the last step that was seen.
        finished: whether the masks are final.
        observed, skipped: steps whose gradients the scores have seen, and those that were not finite.
    """

    def __init__(self, holder: nn.Module, target: float, criterion: int) -> None:
        self._holder = holder
        weight = holder.get_parameter("weight")
        values = torch.tensor(
            [0.0, 0.0, 0.0, 0.0, target, float(criterion)], dtype=torch.float32, device=weight.device
        )
        holder.register_buffer(STATE, values)

    def _get(self, place: int) -> float:
        value = float(self._holder.get_buffer(STATE)[place])
        if not math.isfinite(value):
            raise CheckpointError(
                f"the pruning's counters hold {value}: the training's checkpoint is damaged. Go on from another one."
            )
        return value

    def _set(self, place: int, value: float) -> None:
        self._holder.get_buffer(STATE)[place] = value

    @property
    def step(self) -> int:
        return int(self._get(_STEP))

    @step.setter
    def step(self, value: int) -> None:
        self._set(_STEP, value)

    @property
    def finished(self) -> bool:
        return bool(self._get(_FINISHED))

    @finished.setter
    def finished(self, value: bool) -> None:
        self._set(_FINISHED, value)

    @property
    def observed(self) -> int:
        return int(self._get(_OBSERVED))

    @property
    def skipped(self) -> int:
        return int(self._get(_SKIPPED))

    @property
    def target(self) -> float:
        return self._get(_TARGET)

    @property
    def criterion(self) -> int:
        return int(self._get(_CRITERION))

    def count(self, seen: bool | None) -> None:
        """A step that the scores have seen, or could not; `None` for a criterion that gathers nothing."""
        if seen is not None:
            place = _OBSERVED if seen else _SKIPPED
            self._set(place, self._get(place) + 1)
