"""How much memory a stage takes at its highest point, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..anatomy import ModelAnatomy, text_config, weight_count
from ..calibration.configuration import CalibrationConfig
from ..configuration import CompressionConfig
from .losses import LOGIT_ROWS
from .session import Expectation, Method
from .weights import count_weights, stored_bytes

# What the libraries keep beside tensors: packed operands of products, and memory that was freed and not returned; of
# the last more where the C library may keep it (`freed.keep_heap_small`).
LIBRARIES, UNRETURNED = 64 * 2**20, 64 * 2**20
# Allocations that a survey compares at once, and held-out tokens that it does so on.
CANDIDATES, JUDGED = 6, 4096


@dataclass(frozen=True)
class Workload:
    """How much a compression is calibrated on.

    Args:
        num_samples, sequence_length: sequences, and tokens in each.
        batch_size: sequences in a batch.
        num_held_out: sequences that choices are made on.
        padded: whether batches may have padding, and with it a mask of positions by positions.
        processes: that share the work; the numbers of sequences are those of one.
    """

    num_samples: int
    sequence_length: int
    batch_size: int
    num_held_out: int
    padded: bool = False
    processes: int = 1

    @property
    def tokens(self) -> int:
        return self.num_samples * self.sequence_length

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.sequence_length

    def shared_by(self, processes: int) -> Workload:
        """What each of some processes has to do; with less than a sequence for each, one does it all."""
        if not 1 < processes <= self.num_samples:
            return self
        samples = -(-self.num_samples // processes)
        return replace(self, num_samples=samples, batch_size=min(self.batch_size, samples), processes=processes)

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
        # Texts are packed, and rows of tokens go without a mask.
        padded = source.data_collator is not None
        return cls(source.num_samples, length, source.batch_size, source.num_held_out, padded)


@dataclass(frozen=True)
class StagePeak:
    """Bytes at the highest point of a stage by the amount of data: the model, the residual stream of all calibration
    tokens, and one block's work. A sum of what is held at once, with the factors counted in the code that holds it.

    Args:
        model_bytes: of the model and what the new modules take beyond their tensors.
        outside_bytes, block_bytes: of what lies outside the blocks, and of the largest block with what its new modules
            take beyond their tensors.
        solving: what solving a block takes.
        expectation: what the method says of itself.
        needs_calibration, spreads: whether it reads data, and whether several processes share that.
        streams: how many residual streams run side by side: in sequential order two.
        width, hidden, inner, vocabulary, depth: bytes of a number, and sizes of the model.
        mask_width: bytes of a position in the mask of a padded batch; 0 for a model that knows none.
    """

    model_bytes: int
    outside_bytes: int
    block_bytes: int
    solving: int
    expectation: Expectation
    needs_calibration: bool
    spreads: bool
    streams: int
    width: int
    hidden: int
    inner: int
    vocabulary: int
    depth: int
    mask_width: int

    @classmethod
    def of(cls, anatomy: ModelAnatomy, method: Method[Any, Any], expectation: Expectation) -> StagePeak:
        model, config = anatomy.model, text_config(anatomy.model)
        width = int(next(model.parameters()).element_size())
        hidden = int(getattr(config, "hidden_size", 0))
        blocks = [stored_bytes(anatomy.block(index)) for index in range(len(anatomy))]
        solving = max(_solving(anatomy, index, width) for index in range(len(anatomy)))
        everything = count_weights(anatomy)[2]
        streamed = method.collects or (method.needs_calibration and method.survey_reads_all)
        adds = getattr(model.config, "_attn_implementation", None) == "eager"
        return cls(
            model_bytes=everything + expectation.growth_bytes,
            outside_bytes=everything - sum(blocks),
            block_bytes=max(blocks) + expectation.growth_bytes // len(anatomy),
            solving=solving + expectation.statistics_bytes,
            expectation=expectation,
            needs_calibration=method.needs_calibration,
            spreads=method.spreads,
            streams=(2 if method.sequential else 1) if streamed else 0,
            width=width,
            hidden=hidden,
            inner=max(int(getattr(config, "intermediate_size", 0) or 0), hidden),
            vocabulary=int(getattr(config, "vocab_size", 0)),
            depth=len(anatomy),
            # One that is added to the scores has a number where others have a truth value.
            mask_width=(width if adds else 1) if model.main_input_name == "input_ids" else 0,
        )

    def whole(self, workload: Workload) -> int:
        """With the model in memory."""
        beside = self._work(workload, workload.tokens) + self._waiting(workload)
        return self.model_bytes + LIBRARIES + UNRETURNED + beside

    def streamed(self, workload: Workload, *, in_files: bool) -> int:
        """With one block in memory at a time; the residual stream in memory or in files."""
        tokens = 0 if in_files else workload.tokens
        waiting = self._waiting(workload)
        # While it is solved, or what was made of it is put in place, the block that ran last is there as well.
        blocks = self.block_bytes * (2 if waiting else 1)
        return self.outside_bytes + blocks + LIBRARIES + self._work(workload, tokens) + waiting

    def _waiting(self, workload: Workload) -> int:
        """Of several processes: the sums of a process's own block while those of the others' are gathered, or all new
        modules that a survey tries for it."""
        if workload.processes == 1 or not self.spreads:
            return 0
        ways = CANDIDATES * self.block_bytes if self.expectation.judges else 0
        return max(ways, self.expectation.sums_bytes if self.streams == 1 else 0)

    def _work(self, workload: Workload, kept_tokens: int) -> int:
        """What stands beside the model."""
        if not self.needs_calibration:
            return self.solving
        hidden, width = self.hidden, self.width
        # A batch is in memory twice where it is read from files and written anew.
        held = (self.streams * kept_tokens + 2 * workload.batch_tokens) * hidden * width
        if workload.padded:
            held += (kept_tokens + workload.batch_tokens) * workload.sequence_length * self.mask_width
        # Queries to outputs and two norms in float32; the MLP's three products and its inputs again for their sums.
        running = workload.batch_tokens * (hidden * (6 * width + 8) + self.inner * 4 * width)
        if self.expectation.judges:
            # Every candidate has a stream of its own, and a sequence's logits are one tensor.
            held_out = workload.num_held_out * workload.sequence_length
            held += CANDIDATES * min(held_out, JUDGED if kept_tokens else 0) * hidden * width
            logits = self.vocabulary * (workload.sequence_length * width + LOGIT_ROWS * 12)
            return held + max(self.solving + running, logits)
        if self.expectation.gradient_tokens:
            tokens = min(self.expectation.gradient_tokens, workload.batch_tokens)
            kept = tokens * self.depth * (10 * hidden + 4 * self.inner) * width
            logits = tokens * self.vocabulary * (2 * width + 8)
            return held + max(self.solving + running, self.expectation.statistics_bytes + kept + logits)
        return held + self.solving + running


def _solving(anatomy: ModelAnatomy, block: int, width: int) -> int:
    """Bytes beside a block's statistics: a matrix is solved in float32 or more, of experts one at a time, and the new
    modules stand beside the dense ones."""
    weights = sum(weight_count(anatomy.model.get_submodule(path)) for path, _ in anatomy.block_matrices(block))
    experts = anatomy.experts(block)
    several = 0 if experts is None else experts.weights * width + 4 * experts.weights // experts.count
    return weights * (4 + width) + several
