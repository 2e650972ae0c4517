"""What candidates would cost: the held-out loss of several allocations in one walk over the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from ...anatomy import ModelAnatomy
from ...engine.blocks import BlockStream, every_nth, take_tokens
from ...engine.losses import Parts, hidden_state_errors, mean_ratio, token_losses
from ...engine.results import exchange
from ...engine.session import BlockResult, Session, placed
from ...engine.walk import added_up
from ...errors import CalibrationError
from .compress import compress_block
from .configuration import Kind, ModularDecompositionConfig
from .sizes import Geometry, Sizes
from .statistics import BlockStatistics, collect_statistics

# Tokens for the Grams of a trial, and held-out tokens that every candidate is judged on.
TRIAL_TOKENS = 8192
HELD_OUT_TOKENS = 4096

# A block and the number of one of the ways to compress it.
Way = tuple[int, int]


def trial_losses(
    session: Session,
    config: ModularDecompositionConfig,
    candidates: list[Sizes],
    held_out_tokens: int = HELD_OUT_TOKENS,
) -> list[float]:
    """What every candidate loses on held-out data: the mean negative log-likelihood of a token in nats, or, of an
    encoder, the relative error of the final hidden states (of two towers the mean of both).

    One dense stream gathers each block's statistics; one held-out stream a candidate runs through the blocks as that
    candidate would compress them. Nothing of the model is changed.

    Several processes run a part of the calibration data each, and of the candidates' held-out sequences. Each solves a
    block of as many as there are processes. Alone, no more than one block's statistics and one candidate's modules
    live.
    """
    return _Trial(session, config, candidates, held_out_tokens).run()


class _Trial:
    def __init__(
        self, session: Session, config: ModularDecompositionConfig, candidates: list[Sizes], held_out_tokens: int
    ) -> None:
        self.session, self.config, self.anatomy = session, config, session.anatomy
        self.processes, self.by_tokens = session.processes, session.anatomy.record.decoder
        dense = Geometry.of(self.anatomy, config).dense()
        # Of every block the different ways to compress it, and which of them every candidate takes.
        self.ways: list[list[dict[Kind, int]]] = []
        self.taken: list[list[int]] = []
        for block in range(len(self.anatomy)):
            reduced = [
                {kind: size for kind, size in candidate[block].items() if size < dense[block][kind]}
                for candidate in candidates
            ]
            ways = [way for number, way in enumerate(reduced) if way not in reduced[:number]]
            self.ways.append(ways)
            self.taken.append([ways.index(way) for way in reduced])
        self.processes.each(partial(self._begin, len(candidates), held_out_tokens))

    def _begin(self, candidates: int, held_out_tokens: int) -> None:
        session, rank, size = self.session, self.processes.rank, self.processes.size
        batches = take_tokens(session.batches, TRIAL_TOKENS)
        own = every_nth(batches, rank, size)
        # One that has no sequence of its own runs the first for the shapes of the sums.
        self.counts = bool(own)
        self.calibration = session.stream(own or every_nth(batches, 0, 2**31))
        held_out = take_tokens(session.held_out, held_out_tokens)
        sequences = sum(max(len(tensor) for tensor in batch.values()) for batch in held_out)
        # Decoders: the sequences of all candidates are dealt out in turn. Others: those of a candidate, so that one
        # dense stream serves all.
        starts = [(rank - number * sequences) % size if self.by_tokens else rank for number in range(candidates)]
        entries = {start: session.stream(every_nth(held_out, start, size)) for start in dict.fromkeys(starts)}
        self.streams = [entries[start].copy() for start in starts]
        self.dense = None if self.by_tokens else entries[rank]

    def run(self) -> list[float]:
        waiting: dict[int, BlockStatistics | None] = {}
        description = f"trial of {len(self.streams)} allocations"
        for block in self.session.progress(range(len(self.anatomy)), description, together=True):
            waiting[block] = self._summed(block, owner=len(waiting))
            if len(waiting) == self.processes.size or block == len(self.anatomy) - 1:
                self._advance_together(waiting)
                waiting.clear()
        measured = self.processes.each(lambda: [self._judged(stream) for stream in self.streams])
        losses = [list(parts) for parts in zip(*measured, strict=True)]
        if self.by_tokens and not sum(below for parts in losses[0] for _, below in parts):
            raise CalibrationError("there is no held-out token to measure a loss on; give more text.")
        return [mean_ratio(parts) for parts in losses]

    def _summed(self, block: int, owner: int) -> BlockStatistics | None:
        """The statistics of a block; `None` on a process that will not solve it."""

        def collected() -> BlockStatistics:
            kinds = {kind for way in self.ways[block] for kind in way}
            with collect_statistics(self.anatomy, block, kinds) as statistics:
                self.calibration.advance(block, check=False)
            if not self.counts:
                for tensor in statistics.sums().values():
                    tensor.zero_()
            return statistics

        statistics = added_up(self.processes, collected, BlockStatistics.sums, owner)
        return statistics if owner == self.processes.rank else None

    def _advance_together(self, waiting: dict[int, BlockStatistics | None]) -> None:
        """Solve the blocks that wait, each on its process, and take all streams through them."""
        own: dict[Way, BlockResult] = {}

        def solve() -> None:
            for block, statistics in waiting.items():
                if statistics is not None:
                    with self.session.resident(block):
                        own.update({(block, way): self._solved(block, way, statistics) for way in self._ways(block)})

        if self.processes.size > 1:
            self.processes.each(solve)
        for block, statistics in waiting.items():
            with self.session.resident_on_all(block):
                for way in self._ways(block):
                    # One after the other: nobody holds more of them than it has solved.
                    if self.processes.size > 1:
                        ours = {(block, way): own.pop((block, way))} if (block, way) in own else {}
                        made = exchange(self.processes, ours, self.anatomy.model)[block, way]
                    else:
                        made = partial(self._solved, block, way, statistics)
                    self.processes.each(partial(self._advance, block, way, made))
                if self.dense is not None:
                    self.processes.each(partial(self.dense.advance, block, check=False))

    def _ways(self, block: int) -> range:
        return range(len(self.ways[block]))

    def _solved(self, block: int, way: int, statistics: BlockStatistics | None) -> BlockResult:
        assert statistics is not None
        return compress_block(self.anatomy, self.config, block, self.ways[block][way], statistics)

    def _advance(self, block: int, way: int, made: Callable[[], BlockResult]) -> None:
        """The streams of the candidates that compress a block in this way."""
        with placed(self.anatomy.model, made().modules):
            for stream, taken in zip(self.streams, self.taken[block], strict=True):
                if taken == way:
                    stream.advance(block)

    def _judged(self, stream: BlockStream) -> Parts:
        if self.dense is None:
            return token_losses(stream)
        return hidden_state_errors(stream, self.dense)


def shown(anatomy: ModelAnatomy, loss: float) -> tuple[str, float]:
    """A loss as the report's notes have it: what it is called, and its value."""
    if anatomy.record.decoder:
        return "perplexity", round(math.exp(loss), 3)
    return "hidden_state_error", round(loss, 5)
