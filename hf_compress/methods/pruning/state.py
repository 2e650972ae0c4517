"""What a pruning in a training has to remember beside masks and scores."""

from __future__ import annotations

import hashlib
import json
import math
import struct

import torch
from torch import nn

from ...errors import CheckpointError, ConfigurationError
from .configuration import PruningConfig
from .masks import STATE

# Places in the buffer. The floats among them are kept as their bits.
_STEP, _FINISHED, _OBSERVED, _SKIPPED, _TARGET, _RECIPE, _ZEROS, _SENSITIVITY, _MAGNITUDE = range(9)


class TrainingState:
    """Counters in a buffer of one module, so that they go wherever the state dict goes. The buffer is of integers: a
    cast of the model would round floats.

    Args:
        holder: the module that keeps the buffer.
        config: the recipe.
        zeros: how many weights were pruned when the training began.

    Attributes:
        step: the last step that was seen.
        finished: whether the masks are final.
        observed, skipped: steps whose gradients the scores have seen, and those that were not finite.
        zeros: how many weights were pruned when the training began.
        terms: sums of |w·g| and of α w² when `"snip_magnitude"` was last worked out.
    """

    def __init__(self, holder: nn.Module, config: PruningConfig | None, zeros: int) -> None:
        self._holder = holder
        values = torch.zeros(9, dtype=torch.int64, device=holder.get_parameter("weight").device)
        holder.register_buffer(STATE, values)
        self._set_float(_TARGET, _target(config))
        self._set(_RECIPE, _fingerprint(config))
        self._set(_ZEROS, zeros)

    def _get(self, place: int) -> int:
        return int(self._holder.get_buffer(STATE)[place])

    def _set(self, place: int, value: int) -> None:
        self._holder.get_buffer(STATE)[place] = value

    def _get_float(self, place: int) -> float:
        value: float = struct.unpack("<d", struct.pack("<q", self._get(place)))[0]
        return value

    def _set_float(self, place: int, value: float) -> None:
        self._set(place, struct.unpack("<q", struct.pack("<d", value))[0])

    @property
    def step(self) -> int:
        return self._get(_STEP)

    @step.setter
    def step(self, value: int) -> None:
        self._set(_STEP, value)

    @property
    def finished(self) -> bool:
        return bool(self._get(_FINISHED))

    @finished.setter
    def finished(self, value: bool) -> None:
        self._set(_FINISHED, int(value))

    @property
    def observed(self) -> int:
        return self._get(_OBSERVED)

    @property
    def skipped(self) -> int:
        return self._get(_SKIPPED)

    @property
    def zeros(self) -> int:
        return self._get(_ZEROS)

    @property
    def terms(self) -> tuple[float, float] | None:
        found = (self._get_float(_SENSITIVITY), self._get_float(_MAGNITUDE))
        return found if any(found) else None

    @terms.setter
    def terms(self, value: tuple[float, float]) -> None:
        self._set_float(_SENSITIVITY, value[0])
        self._set_float(_MAGNITUDE, value[1])

    def count(self, seen: bool | None) -> None:
        """A step that the scores have seen, or could not; `None` for a criterion that gathers nothing."""
        if seen is not None:
            place = _OBSERVED if seen else _SKIPPED
            self._set(place, self._get(place) + 1)

    def check(self, step: int, config: PruningConfig | None) -> None:
        """Whether a state dict has brought back a training of this recipe as it was after `step` steps.

        Raises:
            CheckpointError: damaged counters.
            ConfigurationError: it was written without masks, or with another recipe.
        """
        target = self._get_float(_TARGET)
        if self.step < 0 or not math.isfinite(target):
            raise CheckpointError(
                f"the pruning's counters hold {self.step} steps to a sparsity of {target}: the training's checkpoint "
                "is damaged. Go on from another one."
            )
        if self.step != step:
            raise ConfigurationError(
                f"the checkpoint of step {step} holds no masks of that step: it was written without a "
                "PruningCallback, for other matrices, or not loaded into this model. Resume with the recipe that it "
                "was made with, or start the training afresh."
            )
        if target != _target(config):
            raise ConfigurationError(
                f"the checkpoint was written by a pruning to a sparsity of {target:g}, and this one goes to "
                f"{_target(config):g}. Resume with the recipe that it was made with."
            )
        if self._get(_RECIPE) != _fingerprint(config):
            raise ConfigurationError(
                "the checkpoint was written by a pruning with another recipe (criterion, schedule, scope, or what "
                "else decides which weights go). Resume with the recipe that it was made with."
            )


def _target(config: PruningConfig | None) -> float:
    return 0.0 if config is None else config.sparsity


def _fingerprint(config: PruningConfig | None) -> int:
    """A number for all that decides which weights go; how the values are stored does not."""
    fields = {} if config is None else {k: v for k, v in config.to_dict().items() if k != "values"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:7], "little")
