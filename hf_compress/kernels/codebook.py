"""Linear layers whose weights are codes of small codebooks: functions for eager use and torch.library operators.

`hf_compress::codebook_linear` and `hf_compress::codebook_dequantize` have fake implementations, so that torch.compile
and torch.export trace through them, and gradients to the input, the bias, the codebooks and the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import products
from .matrix import CodebookMatrix, check_matrix
from .operators import any_requires_grad, is_eager, operator
from .packing import pack_codes, unpack_codes, words_per_row

__all__ = [
    "CodebookMatrix",
    "check_matrix",
    "codebook_linear",
    "dequantize",
    "pack_codes",
    "unpack_codes",
    "words_per_row",
]


def codebook_linear(x: Float[Tensor, "*batch columns"], matrix: CodebookMatrix, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias` of shape (*batch, rows) in x's dtype.

    Args:
        bias: shape (rows,).

    Raises:
        ConfigurationError: shapes, dtypes or devices that do not fit.
        CompressionError: `row_codebook` names a codebook that is not there.
    """
    if x.is_cpu and is_eager(x) and not any_requires_grad(x, bias, *matrix):
        return products.linear(x, matrix, bias)
    result: Tensor = torch.ops.hf_compress.codebook_linear(
        x, *matrix[:3], matrix.row_scales, matrix.row_codebook, bias, *matrix[3:6]
    )
    return result


def dequantize(
    matrix: CodebookMatrix, dtype: torch.dtype = torch.float32, first: int = 0, last: int | None = None
) -> Float[Tensor, "rows columns"]:
    """Rows `first` to `last` of W. Raises as `codebook_linear`."""
    result: Tensor = torch.ops.hf_compress.codebook_dequantize(
        *matrix[:3], matrix.row_scales, matrix.row_codebook, *matrix[3:6], dtype, first, last
    )
    return result


# The operators take the fields of a CodebookMatrix one by one: five tensors, then three numbers.
_TENSORS = "Tensor packed, Tensor codebooks, Tensor scales, Tensor? row_scales, Tensor? row_codebook"
_NUMBERS = "int bits, int columns, int column_group"
_FIELDS = 8


def _matrix(arguments: tuple[Any, ...]) -> CodebookMatrix:
    packed, codebooks, scales, row_scales, row_codebook, bits, columns, column_group = arguments
    return CodebookMatrix(packed, codebooks, scales, bits, columns, column_group, row_scales, row_codebook)


def _linear_fake(x: Tensor, *arguments: Any) -> Tensor:
    matrix = _matrix((*arguments[:5], *arguments[6:]))
    products.check_input(x, matrix, matrix.columns)
    return x.new_empty((*x.shape[:-1], matrix.rows))


@operator("codebook_linear", f"(Tensor x, {_TENSORS}, Tensor? bias, {_NUMBERS}) -> Tensor", _linear_fake)
def _linear(x: Tensor, *arguments: Any) -> Tensor:
    return products.linear(x, _matrix((*arguments[:5], *arguments[6:])), arguments[5])


def _dequantize_fake(*arguments: Any) -> Tensor:
    matrix, (dtype, first, last) = _matrix(arguments[:_FIELDS]), arguments[_FIELDS:]
    last = products.check_rows(matrix, dtype, first, last)
    return matrix.packed.new_empty((last - first, matrix.columns), dtype=dtype)


@operator(
    "codebook_dequantize",
    f"({_TENSORS}, {_NUMBERS}, ScalarType dtype, int first, int? last) -> Tensor",
    _dequantize_fake,
)
def _dequantize(*arguments: Any) -> Tensor:
    return products.dequantize(_matrix(arguments[:_FIELDS]), *arguments[_FIELDS:])


def _input_gradient_fake(gradient: Tensor, *arguments: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], _matrix(arguments).columns))


@operator("codebook_input_gradient", f"(Tensor gradient, {_TENSORS}, {_NUMBERS}) -> Tensor", _input_gradient_fake)
def _input_gradient(gradient: Tensor, *arguments: Any) -> Tensor:
    return products.input_gradient(gradient, _matrix(arguments))


def _table_gradients_fake(gradient: Tensor, x: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, codebooks, scales, row_scales, *_ = arguments
    nothing = codebooks.new_empty(0, dtype=torch.float32)
    to_codebooks = torch.empty_like(codebooks, dtype=torch.float32)
    if row_scales is None:
        return to_codebooks, torch.empty_like(scales, dtype=torch.float32), nothing
    return to_codebooks, nothing, torch.empty_like(row_scales, dtype=torch.float32)


@operator(
    "codebook_table_gradients",
    f"(Tensor gradient, Tensor? x, {_TENSORS}, {_NUMBERS}, int first) -> (Tensor, Tensor, Tensor)",
    _table_gradients_fake,
)
def _table_gradients(gradient: Tensor, x: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of codebook_linear's `gradient` and `x`, or, without x, of codebook_dequantize's from row `first` on."""
    matrix, first = _matrix(arguments[:_FIELDS]), arguments[_FIELDS]
    if x is None:
        last = first + len(gradient)
        return products.table_gradients(matrix, lambda row, end: gradient[row - first : end - first], first, last)
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_cpu else x.dtype
    outputs = gradient.reshape(-1, matrix.rows).to(dtype)
    inputs = x.reshape(-1, matrix.columns).to(dtype)
    return products.table_gradients(matrix, lambda row, end: outputs[:, row:end].T @ inputs, 0, matrix.rows)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # x is for the gradients to the tables: LoRA on frozen codes does without it.
    x = inputs[0] if any(ctx.needs_input_grad[2:5]) else None
    ctx.save_for_backward(x, *inputs[1:6])
    ctx.numbers = inputs[7:]


def _differentiate_linear(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, *tensors = ctx.saved_tensors
    arguments, wanted = (*tensors, *ctx.numbers), ctx.needs_input_grad
    operators = torch.ops.hf_compress
    to_x = operators.codebook_input_gradient(gradient, *arguments) if wanted[0] else None
    to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if wanted[6] else None
    tables: tuple[Tensor | None, ...] = (None, None, None)
    if x is not None:
        found = operators.codebook_table_gradients(gradient, x, *arguments, 0)
        tables = _as_wanted(found, tensors[1:4], wanted[2:5])
    return to_x, None, *tables, None, to_bias, None, None, None


def _save_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers, ctx.first = inputs[5:_FIELDS], inputs[_FIELDS + 1]


def _differentiate_dequantize(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = torch.ops.hf_compress.codebook_table_gradients(gradient, None, *tensors, *ctx.numbers, ctx.first)
    return None, *_as_wanted(found, tensors[1:4], ctx.needs_input_grad[1:4]), *([None] * 7)


def _save_input_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.numbers = inputs[6:]


def _differentiate_input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.hf_compress.codebook_linear(gradient, *ctx.saved_tensors, None, *ctx.numbers)
    return back, *([None] * _FIELDS)


def _as_wanted(
    gradients: tuple[Tensor, Tensor, Tensor], tables: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of their tensors, `None` where none is asked for."""
    return tuple(
        gradient.to(table.dtype) if want and table is not None else None
        for gradient, table, want in zip(gradients, tables, wanted, strict=True)
    )


for _name, _backward, _save in (
    ("codebook_linear", _differentiate_linear, _save_linear),
    ("codebook_dequantize", _differentiate_dequantize, _save_dequantize),
    ("codebook_input_gradient", _differentiate_input_gradient, _save_input_gradient),
):
    torch.library.register_autograd(f"hf_compress::{_name}", _backward, setup_context=_save)
