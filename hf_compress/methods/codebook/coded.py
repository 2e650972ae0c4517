"""A matrix as codes into codebooks, and what of it a file can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

# The largest integer scale.
TOP_SCALE = 255
# The least positive number in fp16, and scales that come near its denormal range or its end.
LEAST_HALF = 2.0**-24
SMALL_SCALE = 2.0**-4
LARGE_SCALE = 2.0**14


@dataclass(frozen=True)
class Coded:
    """A matrix as codes into codebooks.

    Args:
        codes: index of every weight's code.
        codebooks: ascending codes, one codebook a group of rows.
        scales: one a row and column group, positive; 0 for a group of zeros.
        row_codebook: which codebook a row uses.
        column_group: columns that share a scale.
    """

    codes: Int[Tensor, "rows columns"]
    codebooks: Float[Tensor, "books codes"]
    scales: Float[Tensor, "rows groups"]
    row_codebook: Int[Tensor, " rows"]
    column_group: int

    def tables(self) -> Float[Tensor, "rows codes"]:
        """Every row's own codebook."""
        return self.codebooks[self.row_codebook]

    def wide_scales(self) -> Float[Tensor, "rows columns"]:
        """Every weight's scale."""
        return self.scales.repeat_interleave(self.column_group, dim=1)[:, : self.codes.shape[1]]

    def matrix(self) -> Float[Tensor, "rows columns"]:
        """`Ŵ`."""
        return self.wide_scales() * self.tables().gather(1, self.codes)


def join(parts: Sequence[Coded]) -> Coded:
    """Matrices over the same inputs, one below the other, each with its own codebooks; equal sizes of codebooks."""
    offsets = [sum(len(part.codebooks) for part in parts[:index]) for index in range(len(parts))]
    return Coded(
        codes=torch.cat([part.codes for part in parts]),
        codebooks=torch.cat([part.codebooks for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        row_codebook=torch.cat([part.row_codebook + offset for part, offset in zip(parts, offsets, strict=True)]),
        column_group=parts[0].column_group,
    )


def split(joined: Coded, parts: Sequence[Coded]) -> list[Coded]:
    """What `join` put together, with the codes, codebooks and scales of `joined`."""
    result, row, book = [], 0, 0
    for part in parts:
        rows, books = slice(row, row + len(part.codes)), slice(book, book + len(part.codebooks))
        result.append(
            Coded(
                codes=joined.codes[rows],
                codebooks=joined.codebooks[books],
                scales=joined.scales[rows],
                row_codebook=joined.row_codebook[rows] - book,
                column_group=joined.column_group,
            )
        )
        row, book = rows.stop, books.stop
    return result


def as_stored(coded: Coded, integer_scales: bool) -> Coded:
    """Rounded to what the file holds: fp16 codebooks, scales in fp16 or as integers up to 255 times an fp16 a row."""
    coded = _within_half_precision(coded)
    codebooks = coded.codebooks.half().float()
    if not integer_scales:
        return sorted_codes(replace(coded, codebooks=codebooks, scales=coded.scales.half().float()))
    steps, unit = integer_steps(coded.scales)
    return sorted_codes(replace(coded, codebooks=codebooks, scales=steps.float() * unit.float()[:, None]))


def _within_half_precision(coded: Coded) -> Coded:
    """Small and large weights: move a power of two from the scales to the codebooks, so that both fit fp16."""
    largest = float(coded.scales.amax())
    if not 0 < largest < SMALL_SCALE and not LARGE_SCALE < largest < math.inf:
        return coded
    factor = 2.0 ** min(max(math.floor(math.log2(largest)), -12), 12)
    return replace(coded, scales=coded.scales / factor, codebooks=coded.codebooks * factor)


def integer_steps(scales: Float[Tensor, "rows groups"]) -> tuple[UInt8[Tensor, "rows groups"], Float[Tensor, " rows"]]:
    """Scales as integers from 0 to 255 and the fp16 unit of each row, rounded up so that the largest fits."""
    unit = (scales.amax(dim=1) / TOP_SCALE).half()
    low = unit.float() * TOP_SCALE < scales.amax(dim=1)
    unit = torch.where(low, torch.nextafter(unit, torch.full_like(unit, torch.inf)), unit)
    steps = (scales / unit.float().clamp_min(LEAST_HALF)[:, None]).round()
    return steps.clamp(0, TOP_SCALE).to(torch.uint8), unit


def sorted_codes(coded: Coded) -> Coded:
    """Codes in ascending order, which the nearest-code search needs."""
    order = coded.codebooks.argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    return replace(
        coded, codebooks=coded.codebooks.gather(1, order), codes=rank[coded.row_codebook].gather(1, coded.codes)
    )
