"""How much memory a stage takes at its highest point, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..anatomy import ModelAnatomy, text_config, weight_count
from ..calibration.configuration import CalibrationConfig
from ..configuration import CompressionConfig
from .blocks import LOGIT_ROWS
from .session import Expectation, Method
from .weights import count_weights

# What the libraries keep beside tensors: packed operands of products, and memory that was freed and not returned.
LIBRARIES = 64 * 2**20
# Allocations that a survey compares at once, and held-out tokens that it does so on.
CANDIDATES, JUDGED = 5, 4096


@dataclass(frozen=True)
class Workload:
    """How much a compression is calibrated on.

    Args:
        num_samples, sequence_length: sequences, and tokens in each.
        batch_size: sequences in a batch.
        num_held_out: sequences that choices are made on.
    """

    num_samples: int
    sequence_length: int
    batch_size: int
    num_held_out: int

    @property
    def tokens(self) -> int:
        return self.num_samples * self.sequence_length

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.sequence_length

    def smaller(self) -> Iterator[Workload]:
        """The same data in smaller batches, then fewer of them."""
        batch, samples = self.batch_size, self.num_samples
        while batch > 1:
            batch = max(batch // 2, 1)
            yield replace(self, batch_size=batch)
        while samples > 4:
            samples //= 2
            yield replace(self, batch_size=1, num_samples=samples)

    @classmethod
    def of(cls, recipe: CompressionConfig, override: Any = None) -> Workload:
        """The numbers of the calibration data that a recipe goes with; the defaults where it has none yet."""
        source = override if override is not None else recipe.calibration
        if source is None:
            source = next((stage.calibration for stage in recipe.stages if stage.calibration is not None), None)
        if source is None:
            source = "none yet"
        if not isinstance(source, CalibrationConfig):
            source = CalibrationConfig(source)
        length = source.sequence_length
        if source.kind == "tokens":  # these keep the length that they have
            length = max((len(row) for row in source.dataset), default=length)
        return cls(source.num_samples, length, source.batch_size, source.num_held_out)


def peak_of_stage(
    anatomy: ModelAnatomy, method: Method[Any, Any], expectation: Expectation
) -> Callable[[Workload], int]:
    """Bytes at the highest point of a stage by the amount of data: the model, the residual stream of all calibration
    tokens, and one block's work. A sum of what is held at once, with the factors counted in the code that holds it."""
    model, config = anatomy.model, text_config(anatomy.model)
    width = int(next(model.parameters()).element_size())
    hidden = int(getattr(config, "hidden_size", 0))
    inner = max(int(getattr(config, "intermediate_size", 0) or 0), hidden)
    vocabulary = int(getattr(config, "vocab_size", 0))
    block = max(
        sum(weight_count(model.get_submodule(path)) for path, _ in anatomy.block_matrices(index))
        for index in range(len(anatomy))
    )
    base = count_weights(anatomy)[2] + expectation.growth_bytes + LIBRARIES
    # A matrix is solved in float32 or more, and a block's new modules stand beside the dense ones.
    solving = block * (4 + width) + expectation.statistics_bytes
    streams = (3 if method.sequential else 2) if method.collects else 0
    # Queries to outputs and two norms in float32; the MLP's three products and its inputs again for their sums.
    a_token = hidden * (6 * width + 8) + inner * 4 * width
    depth, needs_calibration = len(anatomy), method.needs_calibration

    def peak(workload: Workload) -> int:
        if not needs_calibration:
            return base + solving
        held = base + streams * workload.tokens * hidden * width
        running = workload.batch_tokens * a_token
        if expectation.judges:
            # Every candidate has a stream of its own, and a sequence's logits are one tensor.
            held_out = workload.num_held_out * workload.sequence_length
            held += CANDIDATES * min(held_out, JUDGED) * hidden * width
            logits = vocabulary * (workload.sequence_length * width + LOGIT_ROWS * 12)
            return held + max(solving + running, logits)
        if expectation.gradient_tokens:
            tokens = min(expectation.gradient_tokens, workload.batch_tokens)
            kept = tokens * depth * (10 * hidden + 4 * inner) * width
            logits = tokens * vocabulary * (2 * width + 8)
            return held + max(solving + running, expectation.statistics_bytes + kept + logits)
        return held + solving + running

    return peak
