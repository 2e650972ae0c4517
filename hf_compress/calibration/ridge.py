"""Grams made safe to invert."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import NumericalError

# A ridge that still fails is raised tenfold, this many times, before the factorisation counts as failed.
RIDGE_ATTEMPTS = 5


def ridge_cholesky(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """Cholesky factor of `C + λI`, `λ = ridge · mean(diag C)`; the ridge grows tenfold while it fails.

    A relative ridge keeps its meaning when the number of calibration tokens changes.

    Raises:
        NumericalError: non-finite input, a Gram that is zero, or failure after `RIDGE_ATTEMPTS` larger ridges.
    """
    scale = gram.diagonal().mean()
    if not torch.isfinite(scale):
        raise NumericalError("the Gram matrix holds non-finite values")
    if scale <= 0:
        raise NumericalError("the Gram matrix is zero: the calibration data never reaches this module")
    diagonal = gram.diagonal().clone()
    try:
        for attempt in range(RIDGE_ATTEMPTS):
            # In place, as a copy would be a gigabyte on a 7B model.
            gram.diagonal().copy_(diagonal + max(ridge, 1e-12) * 10**attempt * scale)
            factor, info = torch.linalg.cholesky_ex(gram)
            if info.item() == 0:
                found: Tensor = factor
                return found
    finally:
        gram.diagonal().copy_(diagonal)
    raise NumericalError(
        f"the Gram matrix is not positive definite, even with a ridge of {ridge * 10 ** (RIDGE_ATTEMPTS - 1):.1e} "
        "of its mean diagonal"
    )
