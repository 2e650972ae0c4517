"""A compressed matrix written out, whole or tile by tile: by the kernel on a CPU, by torch operations elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from .library import TYPES, active_library, check_status
from .matrix import CodebookMatrix, check_structure, prepare
from .packing import UNIT, unpack_codes

# Bytes of one tile, with which a GEMM reaches its full speed.
_TILE = 1 << 24
# The same for torch operations, which need 8 bytes for each code besides.
_GATHERED = 1 << 20
# Columns up to which a tile is as wide as the matrix: wider and with few rows it would slow the GEMM down.
_WIDTH = 4096
# Below so many multiplications a second thread costs more than it saves.
_SERIAL_WORK = 100_000


def write(out: Float[Tensor, "rows columns"], matrix: CodebookMatrix, row: int, column: int = 0) -> None:
    """Fill `out` with the part of W whose first element is W[row, column]; `column` is a multiple of 32."""
    rows, columns = out.shape
    library = active_library() if out.is_cpu and out.dtype in TYPES else None
    if library is not None and out.numel():
        prepared, kind = prepare(matrix), TYPES[out.dtype]
        threads = threads_for(out.numel())
        check_status(
            library.dequantize(
                prepared.address, out.data_ptr(), row, row + rows, column, column + columns, kind, threads
            )
        )
        return
    check_structure(matrix)
    dtype = torch.promote_types(out.dtype, torch.float32)
    step = max(1, _GATHERED // max(1, columns))
    for first in range(0, rows, step):
        part = out[first : first + step]
        codes, tables, scales = factors(matrix, row + first, len(part), column, columns, dtype)
        torch.mul(tables.gather(1, codes), scales, out=part)


def factors(
    matrix: CodebookMatrix, row: int, rows: int, column: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a part of W: codes (rows, columns), tables (rows, 2^bits) and scales (rows, columns) or (rows, 1)."""
    packed, codebooks, scales, bits, _, column_group, row_scales, _ = matrix
    first_unit, last_unit = column // UNIT, -(-(column + columns) // UNIT)
    words = packed[row : row + rows, first_unit * bits : last_unit * bits]
    codes = unpack_codes(words, bits, (last_unit - first_unit) * UNIT)[:, :columns].long()
    tables = codebooks.to(dtype)
    books = matrix.books_of(torch.arange(row, row + rows, device=packed.device))
    tables = tables.expand(rows, -1) if books is None else tables.index_select(0, books.int())
    spread = scales[row : row + rows].to(dtype)
    if row_scales is not None:
        spread = spread * row_scales[row : row + rows, None].to(dtype)
    if scales.shape[1] > 1:
        groups = torch.arange(column, column + columns, device=packed.device) // column_group
        spread = spread.index_select(1, groups)
    return codes, tables, spread


def tiles(
    matrix: CodebookMatrix, dtype: torch.dtype, narrow: bool
) -> Iterator[tuple[slice, slice, Float[Tensor, "rows columns"]]]:
    """All of W in tiles: rows, columns, and their weights, which the next tile overwrites.

    With `narrow` wide matrices are divided by columns too; all tiles of the same rows follow each other. Sums over
    several tiles are to be kept in float32 at least.
    """
    parts = -(-matrix.columns // _WIDTH) if narrow else 1
    width = -(-matrix.columns // parts // UNIT) * UNIT
    buffer = None
    for row, last_row in row_bounds(matrix, 0, matrix.rows, width, _TILE // dtype.itemsize):
        for column in range(0, matrix.columns, width):
            last_column = min(column + width, matrix.columns)
            size = (last_row - row) * (last_column - column)
            if buffer is None:
                buffer = torch.empty(size, dtype=dtype, device=matrix.packed.device)
            tile = buffer[:size].view(last_row - row, last_column - column)
            write(tile, matrix, row, column)
            yield slice(row, last_row), slice(column, last_column), tile


def row_bounds(
    matrix: CodebookMatrix, first: int, last: int, width: int, weights: int = _GATHERED
) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each with about `weights` weights of `width` columns."""
    step = max(UNIT, weights // width // UNIT * UNIT)
    for row in range(first, last, step):
        yield row, min(row + step, last)


def threads_for(work: int) -> int:
    """Threads for a number of multiplications."""
    return torch.get_num_threads() if work >= _SERIAL_WORK else 1
