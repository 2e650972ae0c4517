"""Products with a sparse matrix in compressed rows (CSR): functions for eager use and torch.library operators.

`(W @ xᵀ)ᵀ` with 32-bit indices is what CPUs do fast; `F.linear` with a CSR weight takes another way, several times
slower.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigurationError
from .operators import any_requires_grad, is_eager, operator

with warnings.catch_warnings():
    # Torch tells once a process that compressed rows are in beta; the tests here compare them with dense products.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1.0]), (1, 1))

# Elements of the products that a gradient to the kept values makes at once.
CHUNK = 1 << 24


def sparse_linear(
    x: Float[Tensor, "*batch columns"],
    values: Float[Tensor, "nonzeros"],
    row_starts: Int[Tensor, "rows_and_one"],
    column_indices: Int[Tensor, "nonzeros"],
    columns: int,
    bias: Float[Tensor, "rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """`x Wᵀ + bias` in x's dtype, computed in float32 (float64 for inputs in float64).

    Args:
        values, row_starts, column_indices: W in compressed rows, int32 indices.
        columns: of W.

    Raises:
        ConfigurationError: an input of another width.
    """
    if is_eager(x) and not any_requires_grad(x, values, bias):
        return _linear(x, values, row_starts, column_indices, columns, bias)
    result: Tensor = torch.ops.hf_compress.sparse_linear(x, values, row_starts, column_indices, columns, bias)
    return result


def _check_width(x: Tensor, columns: int) -> None:
    # Indices beyond the input would read foreign memory.
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ConfigurationError(f"an input of shape {tuple(x.shape)} for a layer of {columns} inputs.")


def _linear_fake(
    x: Tensor, values: Tensor, row_starts: Tensor, column_indices: Tensor, columns: int, bias: Any
) -> Tensor:
    _check_width(x, columns)
    return x.new_empty((*x.shape[:-1], row_starts.shape[0] - 1))


@operator(
    "sparse_linear",
    "(Tensor x, Tensor values, Tensor row_starts, Tensor column_indices, int columns, Tensor? bias) -> Tensor",
    _linear_fake,
)
def _linear(
    x: Tensor, values: Tensor, row_starts: Tensor, column_indices: Tensor, columns: int, bias: Tensor | None
) -> Tensor:
    _check_width(x, columns)
    matrix = _matrix(values, row_starts, column_indices, columns, x.dtype)
    flat = x.reshape(-1, x.shape[-1]).to(matrix.dtype)
    # Autocast would have the product in a dtype that compressed rows do not know.
    with torch.autocast(x.device.type, enabled=False):
        product = (matrix @ flat.T).T
    if bias is not None:
        product = product + bias.to(product.dtype)
    return product.to(x.dtype).reshape(*x.shape[:-1], matrix.shape[0]).contiguous()


def _matrix(values: Tensor, row_starts: Tensor, column_indices: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """A CSR tensor in the dtype to compute in; nothing is checked, as that would take longer than the product."""
    size = (len(row_starts) - 1, columns)
    return torch.sparse_csr_tensor(row_starts, column_indices, values.to(_wide(dtype)), size, check_invariants=False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What inputs of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_indices(row_starts: Tensor) -> Tensor:
    counts = torch.diff(row_starts).long()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _input_gradient_fake(gradient: Tensor, values: Tensor, row_starts: Tensor, column_indices: Tensor, n: int) -> Any:
    return gradient.new_empty((*gradient.shape[:-1], n))


@operator(
    "sparse_input_gradient",
    "(Tensor gradient, Tensor values, Tensor row_starts, Tensor column_indices, int columns) -> Tensor",
    _input_gradient_fake,
)
def _input_gradient(
    gradient: Tensor, values: Tensor, row_starts: Tensor, column_indices: Tensor, columns: int
) -> Tensor:
    """`gradient W`, through the transposed matrix in compressed rows."""
    order = column_indices.argsort(stable=True)
    starts = torch.zeros(columns + 1, dtype=row_starts.dtype, device=row_starts.device)
    starts[1:] = torch.bincount(column_indices, minlength=columns).cumsum(0)
    rows = _row_indices(row_starts)[order].to(column_indices.dtype)
    return _linear(gradient, values[order], starts, rows, len(row_starts) - 1, None)


def _value_gradient_fake(gradient: Tensor, x: Tensor, row_starts: Tensor, column_indices: Tensor) -> Tensor:
    return gradient.new_empty(column_indices.shape, dtype=_wide(x.dtype))


@operator(
    "sparse_value_gradient",
    "(Tensor gradient, Tensor x, Tensor row_starts, Tensor column_indices) -> Tensor",
    _value_gradient_fake,
)
def _value_gradient(gradient: Tensor, x: Tensor, row_starts: Tensor, column_indices: Tensor) -> Tensor:
    """`Σ_t gradient[t, r] x[t, c]` for every kept weight (r, c)."""
    wide = _wide(x.dtype)
    # A row of the transposed matrices is a place for all tokens: what a weight needs lies together.
    outputs = gradient.reshape(-1, gradient.shape[-1]).to(wide).T.contiguous()
    inputs = x.reshape(-1, x.shape[-1]).to(wide).T.contiguous()
    rows, result = _row_indices(row_starts), torch.empty(len(column_indices), dtype=wide, device=x.device)
    step = max(CHUNK // max(inputs.shape[1], 1), 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        result[part] = torch.linalg.vecdot(outputs[rows[part]], inputs[column_indices[part]])
    return result


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, row_starts, column_indices, ctx.columns, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, row_starts, column_indices)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, row_starts, column_indices = ctx.saved_tensors
    operators, wanted = torch.ops.hf_compress, ctx.needs_input_grad
    to_x = (
        operators.sparse_input_gradient(gradient, values, row_starts, column_indices, ctx.columns)
        if wanted[0]
        else None
    )
    to_values = None
    if x is not None:
        to_values = operators.sparse_value_gradient(gradient, x, row_starts, column_indices).to(values.dtype)
    to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if wanted[5] else None
    return to_x, to_values, None, None, None, to_bias


torch.library.register_autograd("hf_compress::sparse_linear", _differentiate, setup_context=_save)
