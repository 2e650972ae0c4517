"""Products with a compressed matrix, and the gradients of these.

On a CPU the compiled kernel multiplies with the packed codes. Many rows of x, other devices, float64 and machines
without the kernel go through tiles of W and the library's GEMM. CPUs sum in float32 on each of these ways, so the
results agree within rounding; a GEMM in bfloat16 rounds W too, as a dense bfloat16 model does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigurationError
from .library import TYPES, active_library, check_status, multiplies_bfloat16
from .matrix import CodebookMatrix, check_structure, prepare
from .tiles import factors, row_bounds, threads_for, tiles, write

_INPUT_TYPES = {dtype: kind for dtype, kind in TYPES.items() if dtype.is_floating_point}


def linear(x: Float[Tensor, "*batch columns"], matrix: CodebookMatrix, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` of shape (*batch, rows) in x's dtype. Raises `ConfigurationError` for what does not fit."""
    kind, shape = _INPUT_TYPES.get(x.dtype), x.shape
    if kind is not None and x.is_cpu and shape and shape[-1] == matrix.columns:
        library, rows, count = active_library(), matrix.packed.shape[0], x.numel() // matrix.columns
        if (
            library is not None
            and rows
            and 0 < count <= library.most_rows[x.dtype].get(matrix.bits, 0)
            and matrix.packed.is_cpu
        ):
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
                threads_for(rows * matrix.columns * count),
            )
            if status:
                check_status(status)
            return y
    return _tiled_linear(x, matrix, bias)


def _tiled_linear(x: Tensor, matrix: CodebookMatrix, bias: Tensor | None) -> Tensor:
    check_input(x, matrix, matrix.columns)
    check_structure(matrix)
    dtype = _computing(x)
    bias = None if bias is None else _fitting_bias(bias, matrix.rows, x).to(dtype)
    y = x.new_empty((*x.shape[:-1], matrix.rows))
    if not y.numel():
        return y
    flat_x, flat_y = x.reshape(-1, matrix.columns).to(dtype), y.view(-1, matrix.rows)
    part = flat_y
    for rows, columns, tile in tiles(matrix, dtype, narrow=x.is_cpu and dtype != torch.bfloat16):
        first = columns.start == 0
        if first:
            part = flat_y[:, rows] if y.dtype == dtype else flat_x.new_empty((len(flat_x), len(tile)))
            if bias is not None:
                part.copy_(bias[rows])
        part.addmm_(flat_x[:, columns], tile.T, beta=0 if first and bias is None else 1)
        if columns.stop == matrix.columns and y.dtype != dtype:
            flat_y[:, rows] = part
    return y


def input_gradient(gradient: Float[Tensor, "*batch rows"], matrix: CodebookMatrix) -> Float[Tensor, "*batch columns"]:
    """The gradient to x from that to y: `gradient W`. Raises `ConfigurationError` for what does not fit."""
    check_input(gradient, matrix, matrix.rows)
    check_structure(matrix)
    dtype = _computing(gradient)
    flat = gradient.reshape(-1, matrix.rows).to(dtype)
    total = flat.new_zeros((flat.shape[0], matrix.columns), dtype=torch.promote_types(dtype, torch.float32))
    for rows, columns, tile in tiles(matrix, dtype, narrow=False):
        total[:, columns] += flat[:, rows] @ tile
    return total.to(gradient.dtype).view(*gradient.shape[:-1], matrix.columns)


def table_gradients(
    matrix: CodebookMatrix, weight_gradient: Callable[[int, int], Tensor], first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to codebooks, scales and row scales from those to rows `first` to `last` of W.

    Args:
        weight_gradient: the gradient to a range of rows of W, of shape (rows, columns); asked for tile by tile.

    Returns:
        float32 tensors of the shapes in the matrix. uint8 scales have no gradient, and row scales that are not there
        neither: then the tensor is empty.
    """
    _, codebooks, scales, _, columns, column_group, row_scales, _ = matrix
    check_structure(matrix)
    dtype = torch.float32
    to_codebooks = torch.zeros_like(codebooks, dtype=dtype)
    to_scales = torch.zeros_like(scales, dtype=dtype)
    width = scales.shape[1] * min(column_group, columns)
    for row, end in row_bounds(matrix, first, last, columns):
        gradient = weight_gradient(row, end).to(dtype)
        codes, tables, spread = factors(matrix, row, end - row, 0, columns, dtype)
        by_code = gradient.new_zeros((end - row, tables.shape[1]))
        by_code.scatter_add_(1, codes, gradient * spread)
        books = matrix.books_of(torch.arange(row, end, device=scales.device))
        if books is None:
            to_codebooks += by_code.sum(0)
        else:
            to_codebooks.index_add_(0, books.int(), by_code)
        by_column = torch.nn.functional.pad(gradient * tables.gather(1, codes), (0, width - columns))
        to_scales[row:end] = by_column.view(end - row, scales.shape[1], -1).sum(2)
    nothing = codebooks.new_zeros(0, dtype=dtype)
    if row_scales is None:
        return to_codebooks, to_scales, nothing
    return to_codebooks, nothing, (to_scales * scales).sum(1)


def dequantize(
    matrix: CodebookMatrix, dtype: torch.dtype = torch.float32, first: int = 0, last: int | None = None
) -> Float[Tensor, "rows columns"]:
    """Rows `first` to `last` of W. Raises `ConfigurationError` for rows that are not there."""
    last = check_rows(matrix, dtype, first, last)
    out = torch.empty((last - first, matrix.columns), dtype=dtype, device=matrix.packed.device)
    write(out, matrix, first)
    return out


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


def _fitting_bias(bias: Tensor, rows: int, x: Tensor) -> Tensor:
    """The bias in x's dtype. Raises `ConfigurationError` if it has another shape or device."""
    if bias.dim() != 1 or bias.shape[0] != rows or bias.device != x.device:
        raise ConfigurationError(
            f"the bias must have shape ({rows},) on {x.device}, got {tuple(bias.shape)} on {bias.device}."
        )
    return bias.to(x.dtype).contiguous()


def _computing(x: Tensor) -> torch.dtype:
    """The dtype of the GEMM: float32 on a CPU that does not multiply x's dtype in hardware."""
    if x.is_cpu and x.dtype != torch.float64 and not (x.dtype == torch.bfloat16 and multiplies_bfloat16()):
        return torch.float32
    return x.dtype
