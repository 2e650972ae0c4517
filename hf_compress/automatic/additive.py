"""What a stack will cost by what its parts cost alone: losses in nats, taken to add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .space import Candidate

# How the loss of modular decomposition grows with what it removes, where only two ratios were measured.
GROWTH = 1.6


@dataclass(frozen=True)
class AdditiveModel:
    """Losses above the dense model's.

    Args:
        bits: of codebooks in the blocks, by whole bits.
        tables: of embedding and head beside them, by bits.
        reductions: of modular decomposition alone.
        coders: of what has one size: NF4, and Wanda at 50 %.
    """

    bits: dict[float, float]
    tables: dict[int, float]
    reductions: dict[float, float]
    coders: dict[str, float]

    @classmethod
    def of(cls, measured: Sequence[tuple[Candidate, float]], dense: float) -> AdditiveModel:
        """From candidates of one part each and their perplexities."""
        losses = {c.key(): max(math.log(p / dense), 0.0) for c, p in measured if math.isfinite(p) and not c.dense}
        bits = {c.bits: losses[c.key()] for c, _ in measured if c.key() in losses and c == Candidate(bits=c.bits)}
        tables, reductions, coders = {0: 0.0}, {0.0: 0.0}, {"none": 0.0}
        for candidate, _ in measured:
            if candidate.key() not in losses:
                continue
            loss = losses[candidate.key()]
            if candidate.table_bits and not candidate.reduction and candidate.bits in bits:
                tables[candidate.table_bits] = max(loss - bits[candidate.bits], 0.0)
            elif candidate.reduction and candidate.coder == "none":
                reductions[candidate.reduction] = loss
            elif candidate.coder in ("nf4", "wanda") and not candidate.reduction:
                coders[candidate.coder] = loss
        return cls(bits, tables, reductions, coders)

    def loss(self, candidate: Candidate) -> float | None:
        """Of a stack; `None` where a part of it was not measured."""
        parts = [self._reduction(candidate.reduction)]
        if candidate.coder == "codebook":
            parts += [self._bits(candidate.bits), self.tables.get(candidate.table_bits)]
        elif candidate.coder == "wanda":
            at_half = self.coders.get("wanda")
            # The loss of pruning grows about as the square of the odds of being removed.
            odds = candidate.sparsity / (1 - candidate.sparsity)
            parts.append(None if at_half is None else at_half * odds**2)
        else:
            parts.append(self.coders.get(candidate.coder))
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _reduction(self, reduction: float) -> float | None:
        if reduction in self.reductions:
            return self.reductions[reduction]
        known = [r for r in self.reductions if r > 0]
        if not known:
            return None
        nearest = min(known, key=lambda r: abs(math.log(r / reduction)))
        return float(self.reductions[nearest] * (reduction / nearest) ** GROWTH)

    def _bits(self, bits: float) -> float | None:
        """Between whole bits on a line of the logarithm."""
        if bits in self.bits:
            return self.bits[bits]
        below, above = math.floor(bits), math.ceil(bits)
        if float(below) not in self.bits or float(above) not in self.bits:
            return None
        low, high = (max(self.bits[float(b)], 1e-6) for b in (below, above))
        return math.exp(math.log(low) + (bits - below) * (math.log(high) - math.log(low)))
