"""Sums over calibration tokens. Float64 sums of products that are exact in float32, so that they may be added up
over batches and processes without a trace of the order of magnitude of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Rows per float32 product: short enough that its rounding stays below that of bf16 inputs.
ROWS_PER_PRODUCT = 4096
# Small batched products may be summed term by term: fewer rows.
ROWS_PER_HEAD_PRODUCT = 1024
# A Gram is symmetric: strips of an eighth of its columns leave out 7/16 of the products. Below the first width
# narrower strips gained nothing any more where it was measured; the second bounds a strip's float32 copy.
NARROWEST_STRIP, WIDEST_STRIP = 192, 512


@contextmanager
def exact_half_products() -> Iterator[None]:
    """Let float32 matrix products of bf16-valued inputs run on bf16 hardware of the CPU.

    Products of two bf16 numbers are exact in float32 and the sums are float32 either way; only the speed differs.
    """
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def gram(rows: Float[Tensor, "tokens n"]) -> Float[Tensor, "n n"]:
    """`Σ xᵀx` over the rows, in float64; products in float32 (float64 for float64 input), never in half precision."""
    size = rows.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64, device=sum_device(rows.device))
    width = strip_width(size)
    exact = rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    with exact_half_products() if exact else _highest_precision():
        for chunk in rows.split(ROWS_PER_PRODUCT):
            wide = chunk if chunk.dtype == torch.float64 else chunk.float()
            for start in range(0, size, width):
                strip = wide[:, start : start + width].T @ wide[:, start:]
                total[start : start + width, start:] += strip.to(total.device)
    return _mirrored(total, width)


def strip_width(size: int) -> int:
    """Columns of a strip of a Gram of `size` columns: what `gram` multiplies at once."""
    return min(max(size // 8, NARROWEST_STRIP), WIDEST_STRIP)


def _mirrored(upper: Float[Tensor, "n n"], width: int) -> Float[Tensor, "n n"]:
    """Fill the lower half from the upper one, in place and strip by strip: a Gram may be a gigabyte."""
    for start in range(0, len(upper), width):
        strip = upper[start : start + width, start:]
        corner = strip[:, : len(strip)]
        corner.copy_(corner.triu() + corner.triu(1).T)
        upper[start + width :, start : start + width] = strip[:, len(strip) :].T
    return upper


def head_grams(rows: Float[Tensor, "tokens heads d"]) -> Float[Tensor, "heads d d"]:
    """One Gram a head, `Σ xᵀx`, in float64."""
    heads, size = rows.shape[1:]
    total = torch.zeros(heads, size, size, dtype=torch.float64, device=sum_device(rows.device))
    with _highest_precision():
        for chunk in rows.split(ROWS_PER_HEAD_PRODUCT):
            wide = chunk if chunk.dtype == torch.float64 else chunk.float()
            by_head = wide.transpose(0, 1).contiguous()
            total += (by_head.mT @ by_head).to(total.device)
    return total


@contextmanager
def _highest_precision() -> Iterator[None]:
    """No TF32 or other reduced float32 modes that the user may have switched on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sum_device(device: torch.device) -> torch.device:
    """Where float64 lives: not every accelerator has it."""
    return torch.device("cpu") if device.type in ("mps", "xpu") else device


def cosine_distances(before: Float[Tensor, "tokens d"], after: Float[Tensor, "tokens d"]) -> tuple[float, int]:
    """Sum over tokens of `1 − cos(before, after)` and the number of tokens: the parts of a block's influence."""
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
    return float((1 - cosine).double().sum()), cosine.numel()
