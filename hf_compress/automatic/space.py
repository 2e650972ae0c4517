"""The recipes that a search chooses from: few numbers that stand for a stack of stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Literal

from ..configuration import CompressionConfig, MethodConfig
from ..methods.bitsandbytes.configuration import BitsAndBytesStage
from ..methods.codebook import CodebookConfig
from ..methods.modular import ModularDecompositionConfig
from ..methods.pruning import PruningConfig

Coder = Literal["codebook", "nf4", "wanda", "none"]
REDUCTIONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
AVERAGE_BITS = (2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0)
TABLE_BITS = (0, 2, 3, 4)
SPARSITIES = (0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Candidate:
    """One recipe.

    Args:
        reduction: of the blocks' weights by modular decomposition; 0 leaves the stage out.
        coder: what the matrices are kept as afterwards.
        bits: a weight on average, of codebooks.
        table_bits: of embedding and head in codebooks; 0 leaves them dense.
        sparsity: of Wanda.
        dense: matrices that the coder leaves as they are.
    """

    reduction: float = 0.0
    coder: Coder = "codebook"
    bits: float = 4.0
    table_bits: int = 0
    sparsity: float = 0.5
    dense: tuple[str, ...] = ()

    def key(self) -> tuple[Any, ...]:
        """Equal for candidates that are one recipe: what has no effect is left out."""
        coded = self.coder == "codebook"
        size = (self.bits, self.table_bits) if coded else self.sparsity if self.coder == "wanda" else None
        return self.reduction, self.coder, size, self.dense if self.coder != "none" else ()

    def recipe(self, learning: Literal["none", "feedback", "joint"] = "joint") -> CompressionConfig | None:
        """As a `CompressionConfig`; `None` for the dense model."""
        stages: list[MethodConfig] = []
        if self.reduction:
            stages.append(ModularDecompositionConfig(reduction=self.reduction))
        if self.coder == "codebook":
            whole = self.bits == int(self.bits)
            stages.append(
                CodebookConfig(
                    bits=int(self.bits) if whole else "auto",
                    average_bits=None if whole else self.bits,
                    table_bits=self.table_bits or None,
                    learning=learning,
                    modules_to_not_convert=self.dense,
                )
            )
        elif self.coder == "nf4":
            stages.append(
                BitsAndBytesStage(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    modules_to_not_convert=self.dense,
                )
            )
        elif self.coder == "wanda":
            stages.append(PruningConfig(sparsity=self.sparsity, criterion="wanda", modules_to_not_convert=self.dense))
        return CompressionConfig(stages=tuple(stages)) if stages else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "dense": list(self.dense)}


def coders() -> tuple[Coder, ...]:
    """Those that this installation has."""
    return ("codebook", "nf4", "wanda", "none") if find_spec("bitsandbytes") else ("codebook", "wanda", "none")


def describe(candidate: Candidate) -> str:
    """A candidate in a few words."""
    words = [f"modular {candidate.reduction:.0%}"] if candidate.reduction else []
    if candidate.coder == "codebook":
        words.append(f"codebook {candidate.bits:g} bits")
        words += [f"tables {candidate.table_bits} bits"] if candidate.table_bits else []
    elif candidate.coder == "wanda":
        words.append(f"wanda {candidate.sparsity:.0%}")
    elif candidate.coder == "nf4":
        words.append("NF4")
    if candidate.dense:
        words.append(f"{len(candidate.dense)} matrices dense")
    return ", ".join(words) or "dense"


def all_candidates() -> Iterator[Candidate]:
    """Every stack on the grid."""
    for reduction, table, bits in itertools.product(REDUCTIONS, TABLE_BITS, AVERAGE_BITS):
        yield Candidate(reduction=reduction, bits=bits, table_bits=table)
    for reduction in REDUCTIONS:
        yield from (Candidate(reduction, "wanda", sparsity=sparsity) for sparsity in SPARSITIES)
        if "nf4" in coders():
            yield Candidate(reduction, "nf4")
        if reduction:
            yield Candidate(reduction, "none")
