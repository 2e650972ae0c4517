"""Where the kept weights of a matrix are, in few bytes: gaps, a bit mask, or every place.

Gaps: for every kept weight in the order of the flattened matrix the number of zeros before it, in a byte; 255 stands
for 255 zeros that no kept weight follows. At 98 % sparsity that is 0.161 bits a weight, where 0.1415 are the least
possible on average. A bit mask is one bit a weight, and smaller from 13 % of kept weights on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

PositionKind = Literal["gaps", "mask", "all"]
ESCAPE = 255
# Elements whose positions are worked out at once.
CHUNK = 1 << 26
# The same where positions are read: in 64 bits each, several times over, they must not outgrow what is kept of them.
READ = 1 << 17


def encode(kept: Int[Tensor, "nonzeros"], size: int) -> tuple[PositionKind, UInt8[Tensor, "bytes"]]:
    """Positions in ascending order, of `size` places, in the smallest way that there is."""
    if len(kept) == size:
        return "all", torch.empty(0, dtype=torch.uint8)
    gaps = _encode_gaps(kept) if len(kept) * 8 < size else None
    if gaps is not None and len(gaps) < -(-size // 8):
        return "gaps", gaps
    return "mask", _encode_mask(kept, size)


def decode(kind: PositionKind, stream: UInt8[Tensor, "bytes"], nonzeros: int, size: int) -> Int[Tensor, "nonzeros"]:
    """The positions that `encode` was given. Raises `ValueError` for a stream that does not belong to these counts."""
    parts = list(decoded(kind, stream, nonzeros, size))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=stream.device)


def decoded(
    kind: PositionKind, stream: UInt8[Tensor, "bytes"], nonzeros: int, size: int
) -> Iterator[Int[Tensor, "some"]]:
    """The same in ascending parts, each checked; an iteration that ends has seen all of a sound stream."""
    if stream.dtype != torch.uint8:
        raise ValueError(f"the positions are bytes of {torch.uint8}, got {stream.dtype}")
    found = 0
    for part in _parts(kind, stream, size):
        found += len(part)
        if found > nonzeros:
            break
        if len(part) and int(part[-1]) >= size:
            raise ValueError(f"the positions reach {int(part[-1])}, and the matrix has {size} weights")
        yield part
    if found != nonzeros:
        seen = "more" if found > nonzeros else str(found)
        raise ValueError(f"the positions are of {seen} weights, expected {nonzeros}")


def _parts(kind: PositionKind, stream: Tensor, size: int) -> Iterator[Tensor]:
    if kind == "all":
        for start in range(0, size, READ):
            yield torch.arange(start, min(start + READ, size), device=stream.device)
        return
    step = READ // 8 if kind == "mask" else READ
    last = -1
    for start in range(0, len(stream), step):
        part = stream[start : start + step]
        if kind == "mask":
            mask: Bool[Tensor, "places"] = (part.unsqueeze(1) & _BITS.to(part.device)).ne(0).reshape(-1)
            yield mask.nonzero().squeeze(1) + 8 * start
            continue
        ends = torch.where(part == ESCAPE, ESCAPE, part.long() + 1).cumsum(0) + last
        last = int(ends[-1])
        yield ends[part != ESCAPE]


def stream_bytes(kind: PositionKind, nonzeros: int, size: int) -> tuple[int, int]:
    """The fewest and the most bytes that positions of this kind can take."""
    if kind == "all":
        return 0, 0
    if kind == "mask":
        return -(-size // 8), -(-size // 8)
    return nonzeros, nonzeros + (size - nonzeros) // ESCAPE


def _encode_gaps(kept: Int[Tensor, "nonzeros"]) -> UInt8[Tensor, "bytes"]:
    gaps = torch.diff(kept, prepend=kept.new_tensor([-1])) - 1
    escapes = gaps // ESCAPE
    ends = (escapes + 1).cumsum(0)
    stream = torch.full((int(ends[-1]) if len(ends) else 0,), ESCAPE, dtype=torch.uint8, device=kept.device)
    stream[ends - 1] = (gaps - escapes * ESCAPE).to(torch.uint8)
    return stream


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _encode_mask(kept: Int[Tensor, "nonzeros"], size: int) -> UInt8[Tensor, "bytes"]:
    mask = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=kept.device)
    mask[kept] = 1
    packed = torch.empty(len(mask) // 8, dtype=torch.uint8, device=kept.device)
    for start in range(0, len(packed), CHUNK // 8):
        part = mask[start * 8 : start * 8 + CHUNK].view(-1, 8) * _BITS.to(kept.device)
        packed[start : start + CHUNK // 8] = part.sum(dim=1, dtype=torch.uint8)
    return packed
