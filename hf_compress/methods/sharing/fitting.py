"""One matrix for several layers, and a correction for each of them, by what the layers' inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...calibration.ridge import ridge_cholesky
from ...errors import NumericalError

# Relative to a Gram's mean diagonal.
RIDGE = 1e-3
# Of alternating between the matrix and its corrections; more gain little.
ROUNDS = 5
# Singular vectors that are sought beyond the rank, and sweeps of the search; from a quarter of a matrix's size on a
# whole decomposition takes no longer.
OVERSAMPLING, SWEEPS, WHOLE = 16, 3, 4


@dataclass(frozen=True)
class Fit:
    """What layers share and what each adds.

    Args:
        matrix: `S`, in the dtype of the layers' own.
        corrections: `A` and `B` of every layer; `None` without a rank.
        errors: of every layer, `‖X (W − S − B A)ᵀ‖² / ‖X Wᵀ‖²`.
    """

    matrix: Float[Tensor, "rows columns"]
    corrections: list[tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]] | None]
    errors: list[float]


def fit(
    weights: Sequence[Float[Tensor, "rows columns"]],
    grams: Sequence[Float[Tensor, "columns columns"] | None],
    rank: int,
) -> Fit:
    """The `S`, `A_ℓ` and `B_ℓ` that lose least of what the layers put out.

    Minimises `Σ_ℓ ‖X_ℓ (W_ℓ − S − B_ℓ A_ℓ)ᵀ‖² / ‖X_ℓ W_ℓᵀ‖²` by turns: given the corrections, `S` is a least-squares
    solution; given `S`, a correction is the truncated SVD of the difference times a root of the layer's Gram. Ours:
    Bae et al. (arXiv 2410.20672) take the mean and the truncated SVD of the difference itself, which spends the rank
    on directions in which no input has any length.

    Args:
        weights: `W_ℓ`, of any dtype.
        grams: `X_ℓᵀ X_ℓ` in float64; `None` where the layer has not seen any data, which then counts in every
            direction alike.
        rank: of the corrections; 0 for none.

    Raises:
        NumericalError: weights or Grams that are not finite, or a factorisation that failed.
    """
    device = grams[0].device if grams[0] is not None else weights[0].device
    dense = [weight.to(device, torch.float64) for weight in weights]
    if not all(torch.isfinite(weight).all() for weight in dense):
        raise NumericalError("weights that are not finite")
    columns = dense[0].shape[1]
    eye = torch.eye(columns, dtype=torch.float64, device=device)
    roots = [eye if gram is None else ridge_cholesky(gram, RIDGE) for gram in grams]
    tiny = torch.finfo(torch.float64).tiny
    energies = [(weight @ root).square().sum().clamp_min(tiny) for weight, root in zip(dense, roots, strict=True)]
    # With the ridge, so that both steps lower the same sum.
    metrics = [root @ root.T / energy for root, energy in zip(roots, energies, strict=True)]
    factor = torch.linalg.cholesky(torch.stack(metrics).sum(dim=0)) if len(metrics) > 1 else eye

    def shared(differences: list[Tensor]) -> Tensor:
        """The least-squares matrix for what the corrections leave, as it will be stored."""
        if len(dense) == 1:
            return weights[0].detach().to(device)
        wanted = torch.zeros_like(dense[0])
        for weight, difference, metric in zip(dense, differences, metrics, strict=True):
            wanted += (weight - difference) @ metric
        found: Tensor = torch.cholesky_solve(wanted.T, factor).T
        return found.to(weights[0].dtype)

    nothing = torch.zeros_like(dense[0])
    differences = [nothing] * len(dense)
    corrections: list[tuple[Tensor, Tensor] | None] = [None] * len(dense)
    matrix = shared(differences)
    for sweep in range(ROUNDS if rank and len(dense) > 1 else int(rank > 0)):
        if sweep:
            matrix = shared(differences)
        for layer, (weight, root) in enumerate(zip(dense, roots, strict=True)):
            corrections[layer] = first, second = correction(weight - matrix.double(), root, rank)
            differences[layer] = second @ first
    errors = [
        float(((weight - matrix.double() - difference) @ root).square().sum() / energy)
        for weight, difference, root, energy in zip(dense, differences, roots, energies, strict=True)
    ]
    return Fit(matrix.contiguous(), corrections, errors)


def correction(
    difference: Float[Tensor, "rows columns"], root: Float[Tensor, "columns columns"], rank: int
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]]:
    """A and B of this rank with the least `‖(D − B A) R‖`: `B A = U Uᵀ D` with the leading left singular vectors of
    `D R`. Both get the same norm, direction by direction."""
    product = difference @ root
    if WHOLE * (rank + OVERSAMPLING) < min(product.shape):
        left = torch.svd_lowrank(product, q=rank + OVERSAMPLING, niter=SWEEPS)[0]
    else:
        left = torch.linalg.svd(product, full_matrices=False)[0]
    left = left[:, :rank]
    right = left.T @ difference
    norms = right.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return right / norms[:, None], left * norms
