"""Random compressed matrices beside their dense values, for the tests of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_compress.kernels import CodebookMatrix, library, pack_codes

ROWS = 45
# What a result may differ by, of the sum of the absolute terms and of the result.
SUMMING = {torch.float64: 1e-9}
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float16: 2.0**-24}


class Case(NamedTuple):
    matrix: CodebookMatrix
    codes: Tensor
    weight: Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the operators take them."""
        packed, codebooks, scales, *numbers, row_scales, row_codebook = self.matrix
        return packed, codebooks, scales, row_scales, row_codebook, *numbers


def make_case(
    bits: int = 3, columns: int = 100, rows: int = ROWS, scales: str = "float16", codebooks: int = 3, group: int = 32
) -> Case:
    generator = torch.Generator().manual_seed(bits * columns + rows)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    tables = torch.randn(codebooks, 1 << bits, generator=generator).half()
    groups = -(-columns // group)
    row_scales = None
    if scales == "uint8":
        factors = torch.randint(0, 256, (rows, groups), dtype=torch.uint8, generator=generator)
        row_scales = (torch.rand(rows, generator=generator) / 200).half()
    else:
        factors = (0.5 + torch.rand(rows, groups, generator=generator)).half()
    choice = torch.randint(0, codebooks, (rows,), dtype=torch.int16, generator=generator) if codebooks > 1 else None
    compressed = CodebookMatrix(
        pack_codes(codes, bits), tables, factors, bits, columns, group, row_scales=row_scales, row_codebook=choice
    )
    return Case(compressed, codes, reference(compressed, codes))


def reference(compressed: CodebookMatrix, codes: Tensor) -> Tensor:
    """W by a gather, in float64 or with gradients to float tables."""
    choice = compressed.row_codebook
    rows = torch.zeros(len(codes), dtype=torch.long) if choice is None else choice.long()
    factors = compressed.scales.double()
    if compressed.row_scales is not None:
        factors = factors * compressed.row_scales.double()[:, None]
    spread = factors.repeat_interleave(compressed.column_group, 1)[:, : compressed.columns]
    return compressed.codebooks.double()[rows].gather(1, codes.long()) * spread


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_multiplied(case: Case, x: Tensor) -> Tensor:
    """W as the product with x sees it: rounded where a GEMM in bfloat16 does the work instead of the kernel."""
    loaded = library.active_library()
    few = loaded is not None and x.numel() // x.shape[-1] <= loaded.most_rows.get(x.dtype, {}).get(case.matrix.bits, 0)
    return case.weight if few else rounded(case.weight, x.dtype)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W as a GEMM on tensors of `dtype` sees it."""
    if dtype == torch.bfloat16 and library.multiplies_bfloat16():
        return weight.float().to(dtype).double()
    return weight


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """y = x W^T + bias within the rounding of its dtype."""
    assert y.dtype == x.dtype
    expected, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        expected, terms = expected + bias.double(), terms + bias.double().abs()
    allowed = SUMMING.get(x.dtype, 2e-6) * terms + ROUNDING[x.dtype] * expected.abs() + TINY.get(x.dtype, 0.0)
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= allowed).all())
