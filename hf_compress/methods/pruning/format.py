"""How a pruned matrix is kept: the positions of its weights, and their values."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int8, UInt8
from torch import Tensor

from ...checked import is_integer, short
from ...layout import checked_size
from .configuration import Values
from .positions import PositionKind, encode, stream_bytes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
# Rows, columns and kept weights are numbered in 32 bits.
MOST_INDICES = torch.iinfo(torch.int32).max
# Smaller numbers than this have fewer digits in float16.
SMALLEST_HALF = 2.0**-14


@dataclass(frozen=True)
class SparseFormat:
    """What the spec of a sparse layer says.

    Args:
        nonzeros: weights that are kept.
        positions: how their places are written.
        stream: bytes of the places.
        values: how the values are written: a dtype, or "int8" with one bfloat16 scale a row.
        checksum: of the bytes of the places, see `checksum_of`; files of earlier versions have none.
    """

    nonzeros: int
    positions: PositionKind
    stream: int
    values: str
    checksum: str | None = None

    @property
    def is_quantized(self) -> bool:
        return self.values == "int8"

    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "nonzeros": self.nonzeros,
            "positions": self.positions,
            "stream": self.stream,
            "values": self.values,
        }
        return found if self.checksum is None else {**found, "checksum": self.checksum}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], rows: int, columns: int) -> SparseFormat:
        """Raises `ValueError` or `KeyError` for a spec that does not fit a matrix of this size."""
        unknown = set(spec) - {"nonzeros", "positions", "stream", "values", "checksum"}
        if unknown:
            raise ValueError(f"unknown fields {short(sorted(unknown))}")
        if max(rows, columns) > MOST_INDICES:
            raise ValueError(f"a matrix of {rows} x {columns} has places that 32 bits cannot number")
        size = rows * columns
        # A matrix of which nothing is left is one.
        nothing = is_integer(spec["nonzeros"], 0, 0)
        nonzeros = 0 if nothing else checked_size(spec, "nonzeros", min(size, MOST_INDICES))
        positions, stream, values = spec["positions"], spec["stream"], spec["values"]
        if positions not in get_args(PositionKind):
            raise ValueError(f"`positions` must be one of {get_args(PositionKind)}, got {short(positions)}")
        if not isinstance(values, str) or values not in DTYPES:
            raise ValueError(f"`values` must be one of {sorted(DTYPES)}, got {short(values)}")
        fewest, most = stream_bytes(positions, nonzeros, size)
        if not is_integer(stream, fewest, most):
            raise ValueError(
                f"`stream` of {short(stream)} bytes cannot hold the places of {nonzeros} of {size} weights"
            )
        if positions == "all" and nonzeros != size:
            raise ValueError(f"`positions` names every place, and only {nonzeros} of {size} weights are kept")
        checksum = spec.get("checksum")
        if checksum is not None and not (isinstance(checksum, str) and len(checksum) == len(NO_CHECKSUM)):
            raise ValueError(f"`checksum` must be {len(NO_CHECKSUM)} hexadecimal digits, got {short(checksum)}")
        return cls(nonzeros, positions, stream, values, checksum)


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix as it is stored.

    Args:
        format: how.
        stream: the places.
        values: the kept weights as written, row by row.
        scales: of the rows of int8 values.
    """

    format: SparseFormat
    stream: Tensor
    values: Tensor
    scales: Tensor | None


def store(
    weight: Float[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"], values: Values, dtype: torch.dtype
) -> SparseMatrix:
    """A matrix and the mask of what is kept of it, in the smallest form.

    Args:
        dtype: of the model, which "auto" goes by.
    """
    size, kept = mask.numel(), mask.reshape(-1).nonzero().squeeze(1)
    flat = weight.detach().reshape(-1)[kept]
    kind, stream = encode(kept, size)
    written = choose_dtype(flat, dtype) if values == "auto" else values
    scales = None
    if written == "int8":
        rows = torch.div(kept, weight.shape[1], rounding_mode="floor")
        flat, scales = to_int8(flat.float(), rows, len(weight))
    else:
        flat = flat.to(DTYPES[written])
    format = SparseFormat(len(kept), kind, len(stream), written, checksum_of(stream))
    return SparseMatrix(format, stream, flat, scales)


# As long as any.
NO_CHECKSUM = "0" * 8


def checksum_of(stream: UInt8[Tensor, "bytes"]) -> str:
    """The CRC-32 of the places: a byte that has changed can leave their number and the last of them as they were."""
    return f"{zlib.crc32(stream.cpu().numpy().data):08x}"


def choose_dtype(values: Float[Tensor, "nonzeros"], dtype: torch.dtype) -> str:
    """float16, or bfloat16 for models in it and for weights outside float16's range."""
    if dtype == torch.bfloat16 or not len(values):
        return "bfloat16" if dtype == torch.bfloat16 else "float16"
    sizes = values.abs()
    fits = sizes.max() <= torch.finfo(torch.float16).max and sizes.median() >= SMALLEST_HALF
    return "float16" if fits else "bfloat16"


def to_int8(
    values: Float[Tensor, "nonzeros"], rows: Tensor, count: int
) -> tuple[Int8[Tensor, "nonzeros"], Float[Tensor, "rows"]]:
    """Whole multiples of a row's scale, which is its largest weight over 127 in bfloat16."""
    largest = torch.zeros(count, device=values.device).scatter_reduce_(0, rows, values.abs(), "amax")
    scales = (largest / 127).to(torch.bfloat16)
    steps = values / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[rows]
    return steps.round().clamp(-127, 127).to(torch.int8), scales
