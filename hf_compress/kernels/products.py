"""Products with a compressed matrix, and its rows written out.

On a CPU the compiled kernel reads the packed codes. Elsewhere, for float64 and without the kernel, torch operations
write out tiles of rows; many rows of x take that way on a CPU too, where the kernel writes the tiles and the library's
GEMM multiplies. CPUs sum in float32 on every way, so the results agree within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigurationError
from .library import TYPES, Library, active_library, check_status
from .matrix import CodebookMatrix, check_structure, prepare
from .packing import UNIT, unpack_codes

# Up to so many rows of x the kernel multiplies with the codes.
DIRECT_ROWS = 32
_INPUT_TYPES = {dtype: kind for dtype, kind in TYPES.items() if dtype.is_floating_point}
# Below so many multiplications a second thread costs more than it saves.
_SERIAL_WORK = 100_000
# Weights in one tile: 4 MB in float32.
_TILE = 1 << 20


def linear(x: Float[Tensor, "*batch columns"], matrix: CodebookMatrix, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` of shape (*batch, rows) in x's dtype. Raises `ConfigurationError` for what does not fit."""
    kind, shape = _INPUT_TYPES.get(x.dtype), x.shape
    if kind is not None and x.is_cpu and shape and shape[-1] == matrix.columns:
        library, rows, count = active_library(), matrix.packed.shape[0], x.numel() // matrix.columns
        if library is not None and rows and 0 < count <= DIRECT_ROWS and matrix.packed.is_cpu:
            if bias is not None:
                bias = _fitting_bias(bias, rows, x)
            if not x.is_contiguous():
                x = x.contiguous()
            prepared = prepare(matrix)
            y = x.new_empty((*shape[:-1], rows))
            status = library.linear(
                prepared.address,
                x.data_ptr(),
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                count,
                kind,
                _threads(rows * matrix.columns * count),
            )
            if status:
                check_status(status)
            return y
    return _tiled_linear(x, matrix, bias)


def input_gradient(grad: Float[Tensor, "*batch rows"], matrix: CodebookMatrix) -> Float[Tensor, "*batch columns"]:
    """`grad W`: the gradient to the input of `linear`. Raises `ConfigurationError` for what does not fit."""
    check_input(grad, matrix, matrix.rows)
    flat, dtype = grad.reshape(-1, matrix.rows), _computing(grad)
    summing = torch.promote_types(dtype, torch.float32)
    total = torch.zeros((flat.shape[0], matrix.columns), dtype=summing, device=grad.device)
    for first, last, tile in _tiles(matrix, dtype):
        total += flat[:, first:last].to(dtype) @ tile
    return total.to(grad.dtype).view(*grad.shape[:-1], matrix.columns)


def dequantize(
    matrix: CodebookMatrix, dtype: torch.dtype = torch.float32, first: int = 0, last: int | None = None
) -> Float[Tensor, "rows columns"]:
    """Rows `first` to `last` of W. Raises `ConfigurationError` for rows that are not there."""
    last = check_rows(matrix, dtype, first, last)
    out = torch.empty((last - first, matrix.columns), dtype=dtype, device=matrix.packed.device)
    _write(out, matrix, first)
    return out


def table_gradients(
    matrix: CodebookMatrix, weight_gradient: Callable[[int, int], Tensor], first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to codebooks, scales and row scales from those to rows `first` to `last` of W.

    Args:
        weight_gradient: the gradient to a range of rows of W, of shape (rows, columns); asked for tile by tile.

    Returns:
        Tensors of the shapes in the matrix. uint8 scales have no gradient, and row scales that are not there neither:
        then the tensor is empty.
    """
    _, codebooks, scales, _, columns, column_group, row_scales, row_codebook = matrix
    check_structure(matrix)
    dtype = torch.float32
    to_codebooks = torch.zeros_like(codebooks, dtype=dtype)
    to_scales = torch.zeros_like(scales, dtype=dtype)
    width = scales.shape[1] * min(column_group, columns)
    for row, end in _tile_bounds(matrix, first, last):
        gradient = weight_gradient(row, end).to(dtype)
        codes, tables, factors = _parts(matrix, row, end, dtype)
        by_code = torch.zeros((end - row, tables.shape[1]), dtype=dtype, device=gradient.device)
        by_code.scatter_add_(1, codes, gradient * _spread(factors, column_group, columns))
        if row_codebook is None:
            to_codebooks += by_code.sum(0)
        else:
            to_codebooks.index_add_(0, row_codebook[row:end].int(), by_code)
        by_column = torch.nn.functional.pad(gradient * tables.gather(1, codes), (0, width - columns))
        to_scales[row:end] = by_column.view(end - row, scales.shape[1], -1).sum(2)
    nothing = codebooks.new_zeros(0, dtype=dtype)
    if row_scales is None:
        return to_codebooks, to_scales, nothing
    return to_codebooks, nothing, (to_scales * scales).sum(1)


def check_rows(matrix: CodebookMatrix, dtype: torch.dtype, first: int, last: int | None) -> int:
    """`last` as a number. Raises `ConfigurationError` for rows that are not there or a dtype that is no float."""
    last = matrix.rows if last is None else last
    if not 0 <= first <= last <= matrix.rows or not dtype.is_floating_point:
        raise ConfigurationError(f"rows {first} to {last} as {dtype} were asked of a matrix of {matrix.rows} rows.")
    return last


def check_input(x: Tensor, matrix: CodebookMatrix, features: int) -> None:
    """Raise `ConfigurationError` unless `x` is a float tensor (..., features) on the device of the matrix."""
    if x.dim() == 0 or x.shape[-1] != features or not x.is_floating_point():
        raise ConfigurationError(
            f"the input must be a float tensor whose last dimension is {features}, got {tuple(x.shape)} of {x.dtype}."
        )
    if x.device != matrix.packed.device:
        raise ConfigurationError(f"the input is on {x.device}, the codes are on {matrix.packed.device}.")


def _tiled_linear(x: Tensor, matrix: CodebookMatrix, bias: Tensor | None) -> Tensor:
    check_input(x, matrix, matrix.columns)
    check_structure(matrix)
    if bias is not None:
        bias = _fitting_bias(bias, matrix.rows, x)
    y = x.new_empty((*x.shape[:-1], matrix.rows))
    if y.numel():
        dtype, flat = _computing(x), y.view(-1, matrix.rows)
        x = x.reshape(-1, matrix.columns).to(dtype)
        for first, last, tile in _tiles(matrix, dtype):
            part = None if bias is None else bias[first:last].to(dtype)
            flat[:, first:last] = torch.nn.functional.linear(x, tile, part)
    return y


def _fitting_bias(bias: Tensor, rows: int, x: Tensor) -> Tensor:
    """The bias in x's dtype. Raises `ConfigurationError` if it has another shape or device."""
    if bias.dim() != 1 or bias.shape[0] != rows or bias.device != x.device:
        raise ConfigurationError(
            f"the bias must have shape ({rows},) on {x.device}, got {tuple(bias.shape)} on {bias.device}."
        )
    return bias.to(x.dtype).contiguous()


def _computing(x: Tensor) -> torch.dtype:
    """The dtype of the GEMM. Few CPUs multiply half precision in hardware, and float32 is exact besides."""
    return torch.float32 if x.is_cpu and x.dtype != torch.float64 else x.dtype


def _threads(work: int) -> int:
    return torch.get_num_threads() if work >= _SERIAL_WORK else 1


def _tiles(matrix: CodebookMatrix, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Rows `first` to `last` of W, for all rows in turn; a tile is overwritten by the next."""
    buffer = None
    for first, last in _tile_bounds(matrix, 0, matrix.rows):
        if buffer is None:
            buffer = torch.empty((last - first, matrix.columns), dtype=dtype, device=matrix.packed.device)
        tile = buffer[: last - first]
        _write(tile, matrix, first)
        yield first, last, tile


def _tile_bounds(matrix: CodebookMatrix, first: int, last: int) -> Iterator[tuple[int, int]]:
    step = max(UNIT, _TILE // matrix.columns // UNIT * UNIT)
    for row in range(first, last, step):
        yield row, min(row + step, last)


def _write(out: Float[Tensor, "rows columns"], matrix: CodebookMatrix, first: int) -> None:
    """Fill `out` with the rows of W from `first` on."""
    library = active_library() if out.is_cpu and out.dtype in TYPES else None
    if library is not None and out.numel():
        _write_by_kernel(out, matrix, first, library)
        return
    check_structure(matrix)
    dtype = torch.promote_types(out.dtype, torch.float32)
    step = max(1, _TILE // matrix.columns)
    for row in range(0, len(out), step):
        part = out[row : row + step]
        codes, tables, factors = _parts(matrix, first + row, first + row + len(part), dtype)
        torch.mul(tables.gather(1, codes), _spread(factors, matrix.column_group, matrix.columns), out=part)


def _write_by_kernel(out: Tensor, matrix: CodebookMatrix, first: int, library: Library) -> None:
    prepared = prepare(matrix)
    threads = _threads(out.numel())
    last = first + len(out)
    check_status(library.dequantize(prepared.address, out.data_ptr(), first, last, TYPES[out.dtype], threads))


def _parts(matrix: CodebookMatrix, first: int, last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows `first` to `last`: codes (rows, columns), tables (rows, 2^bits), scales (rows, groups)."""
    packed, codebooks, scales, bits, columns, _, row_scales, row_codebook = matrix
    codes = unpack_codes(packed[first:last], bits, columns).long()
    if row_codebook is None:
        tables = codebooks.to(dtype).expand(last - first, -1)
    else:
        tables = codebooks.to(dtype).index_select(0, row_codebook[first:last].int())
    factors = scales[first:last].to(dtype)
    if row_scales is not None:
        factors = factors * row_scales[first:last, None].to(dtype)
    return codes, tables, factors


def _spread(factors: Tensor, column_group: int, columns: int) -> Tensor:
    """Scales (rows, groups) as (rows, columns), or (rows, 1) where there is one group."""
    return factors if factors.shape[1] == 1 else factors.repeat_interleave(column_group, 1)[:, :columns]
