"""What was done to every module, and what it brought."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class ModuleReport:
    """One compressed part of a block.

    Args:
        block: index of the block; -1 for what lies outside the blocks.
        path: module path.
        kind: "mlp", "query_key" or "value_output" (other methods: their own kinds).
        size_before, size_after: the size that was reduced: MLP width, dimensions a head, or bits a weight.
        parameters_before, parameters_after: of the kind's matrices and biases in this block.
        error: relative squared error of the part's output on the calibration data (of the logits for query/key).
        bytes_before, bytes_after: of the matrices, with all that belongs to them; 0 where only their sizes changed.
    """

    block: int
    path: str
    kind: str
    size_before: float
    size_after: float
    parameters_before: int
    parameters_after: int
    error: float
    bytes_before: int = 0
    bytes_after: int = 0


def _known_fields(cls: type[Any], data: dict[str, Any]) -> dict[str, Any]:
    known = {item.name for item in fields(cls)}
    return {name: value for name, value in data.items() if name in known}


@dataclass(frozen=True)
class CompressionReport:
    """Per module and in total. `print` shows a table; `to_dict` gives plain JSON.

    Args:
        modules: one row a compressed part.
        block_linear_before, block_linear_after: elements of the blocks' weight matrices, what `reduction` counts.
        parameters_before, parameters_after: of the whole model, tied ones once.
        bytes_before, bytes_after: of all parameters and persistent buffers in memory.
        notes: choices that were made from data, e.g. the probe's losses.
        left_alone: what was not compressed and why.
    """

    modules: list[ModuleReport]
    block_linear_before: int
    block_linear_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    notes: dict[str, Any] = field(default_factory=dict)
    left_alone: list[str] = field(default_factory=list)

    @property
    def block_linear_reduction(self) -> float:
        """Removed share of the blocks' weight matrices."""
        return 1 - self.block_linear_after / self.block_linear_before

    @property
    def parameter_reduction(self) -> float:
        """Removed share of all parameters."""
        return 1 - self.parameters_after / self.parameters_before

    @property
    def bits_per_weight(self) -> float | None:
        """Of the matrices that are kept as codes, everything counted; `None` if there are none."""
        coded = [row for row in self.modules if row.bytes_after]
        weights = sum(row.parameters_before for row in coded)
        return 8 * sum(row.bytes_after for row in coded) / weights if weights else None

    @property
    def model_bits_per_weight(self) -> float:
        """Bits in memory for every parameter of the dense model."""
        return 8 * self.bytes_after / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "block_linear_reduction": self.block_linear_reduction,
            "parameter_reduction": self.parameter_reduction,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionReport:
        """The report that `to_dict` wrote; fields of later versions are left out."""
        kept = _known_fields(cls, data)
        return cls(
            **{**kept, "modules": [ModuleReport(**_known_fields(ModuleReport, row)) for row in data["modules"]]}
        )

    @classmethod
    def from_provenance(cls, provenance: Any) -> CompressionReport | None:
        """The report in a checkpoint's provenance; `None`, with a warning, where there is none to be read."""
        try:
            return cls.from_dict(provenance["report"])
        except (KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"the checkpoint's compression report cannot be read ({error!r}); left out.", stacklevel=2)
            return None

    def __str__(self) -> str:
        header = f"{'block':>5}  {'kind':<13} {'size':>13}  {'parameters':>23}  {'error':>8}"
        lines = [header, "-" * len(header)]
        for row in self.modules:
            size = f"{row.size_before:g} → {row.size_after:g}"
            parameters = f"{row.parameters_before:,} → {row.parameters_after:,}"
            block = row.block if row.block >= 0 else "–"
            lines.append(f"{block:>5}  {row.kind:<13} {size:>13}  {parameters:>23}  {row.error:>8.4f}")
        lines.append("-" * len(header))
        for name, before, after in (
            ("block matrices", self.block_linear_before, self.block_linear_after),
            ("all parameters", self.parameters_before, self.parameters_after),
            ("bytes in memory", self.bytes_before, self.bytes_after),
        ):
            lines.append(f"{name:<16} {before:>15,} → {after:>15,}  ({after / before - 1:+.1%})")
        if self.bits_per_weight is not None:
            lines.append(
                f"bits a coded weight: {self.bits_per_weight:.3f}; a weight of the whole model: "
                f"{self.model_bits_per_weight:.3f}"
            )
        lines += [f"{name}: {value}" for name, value in sorted(self.notes.items())]
        lines += [f"left alone: {reason}" for reason in self.left_alone]
        return "\n".join(lines)
