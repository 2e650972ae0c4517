"""Sums over calibration tokens. Float64 sums of products that are exact in float32, so that they may be added up
over batches and processes without a trace of the order of magnitude of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

# Rows per float32 product: short enough that its rounding stays below that of bf16 inputs.
ROWS_PER_PRODUCT = 8192


@contextmanager
def exact_half_products() -> Iterator[None]:
    """Let float32 matrix products of bf16-valued inputs run on bf16 hardware of the CPU.

    Products of two bf16 numbers are exact in float32 and the sums are float32 either way; only the speed differs.
    """
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def gram(rows: Float[Tensor, "tokens n"]) -> Float[Tensor, "n n"]:
    """`Σ xᵀx` over the rows, in float64; products in float32 (float64 for float64 input), never in half precision."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=_sum_device(rows.device))
    for chunk in rows.split(ROWS_PER_PRODUCT):
        if chunk.dtype == torch.float64:
            total += chunk.T @ chunk
            continue
        wide = chunk.float()
        if chunk.dtype == torch.bfloat16 and chunk.device.type == "cpu":
            with exact_half_products():
                product = wide.T @ wide
        else:
            product = _full_precision_product(wide)
        total += product.to(total.device, torch.float64)
    return total


def head_grams(rows: Float[Tensor, "tokens heads d"]) -> Float[Tensor, "heads d d"]:
    """One Gram a head, `Σ xᵀx`, in float64."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    product = _full_precision_product(wide.permute(1, 0, 2).contiguous())
    return product.to(_sum_device(rows.device), torch.float64)


def _full_precision_product(wide: Float[Tensor, "*heads tokens n"]) -> Float[Tensor, "*heads n n"]:
    """`xᵀx` without TF32 or other reduced float32 modes that the user may have switched on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return wide.mT @ wide
    finally:
        torch.set_float32_matmul_precision(before)


def _sum_device(device: torch.device) -> torch.device:
    """Where float64 lives: not every accelerator has it."""
    return torch.device("cpu") if device.type in ("mps", "xpu") else device


def cosine_distances(
    before: Float[Tensor, "batch tokens d"], after: Float[Tensor, "batch tokens d"]
) -> tuple[float, int]:
    """Sum over tokens of `1 − cos(before, after)` and the number of tokens: the parts of a block's influence."""
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
    return float((1 - cosine).double().sum()), cosine.numel()
