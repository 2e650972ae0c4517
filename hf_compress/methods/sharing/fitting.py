"""One matrix for several layers, and a correction for each of them, by what the layers' inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ...calibration.ridge import ridge_cholesky
from ...calibration.statistics import sum_device
from ...errors import NumericalError

# Relative to a Gram's mean diagonal.
RIDGE = 1e-3
# Of alternating between the matrix and its corrections.
ROUNDS = 12
# Singular vectors that are sought beyond the rank, and sweeps of a search from scratch; from a quarter of a matrix's
# size on a whole decomposition takes no longer.
OVERSAMPLING, SWEEPS, WHOLE = 16, 4, 4


@dataclass(frozen=True)
class Fit:
    """What layers share and what each adds, in the dtype of the layers' own matrices.

    Args:
        matrix: `S`.
        corrections: `A` and `B` of every layer; `None` without a rank.
        errors: of every layer, `‖X (W − S − B A)ᵀ‖² / e`, see `fit`.
    """

    matrix: Float[Tensor, "rows columns"]
    corrections: list[tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]] | None]
    errors: list[float]


def fit(
    weights: Sequence[Float[Tensor, "rows columns"]],
    grams: Sequence[Float[Tensor, "columns columns"] | None],
    rank: int,
    names: Sequence[str],
) -> Fit:
    """The `S`, `A_ℓ` and `B_ℓ` that lose least of what the layers put out.

    Minimises `Σ_ℓ ‖X_ℓ (W_ℓ − S − B_ℓ A_ℓ)ᵀ‖² / e_ℓ` by turns, where `e_ℓ` is `‖X_ℓ W_ℓᵀ‖²`, or the group's mean of
    it if that is more: a layer that puts out little shall not take all from the others. Given the corrections, `S` is
    a least-squares solution; given `S`, a correction is the truncated SVD of the difference times a root of the
    layer's Gram. Ours: Bae et al. (arXiv 2410.20672) take the mean and the truncated SVD of the difference itself,
    which spends the rank on directions in which no input has any length.

    Args:
        weights: `W_ℓ`, of any dtype.
        grams: `X_ℓᵀ X_ℓ` in float64; `None` where the layer has seen nothing, which then counts in every direction
            alike.
        rank: of the corrections; 0 for none.
        names: of the layers, for errors.

    Raises:
        NumericalError: weights or Grams that are not finite, or a factorisation that failed; names the layer.
    """
    device, dtype = sum_device(weights[0].device), weights[0].dtype
    dense = [weight.to(device, torch.float64) for weight in weights]
    roots = [_root(weight, gram, name).to(device) for weight, gram, name in zip(dense, grams, names, strict=True)]
    energies = torch.stack([(weight @ root).square().sum() for weight, root in zip(dense, roots, strict=True)])
    energies = torch.where(energies.any(), energies, 1)
    energies = energies.clamp_min(float(energies.mean()))
    # With the ridge, so that both steps lower the same sum.
    total = torch.zeros_like(roots[0])
    for root, energy in zip(roots, energies, strict=True):
        total.addmm_(root, root.T, alpha=1 / float(energy))
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise NumericalError(f"{names[0]}: the Grams of the {len(names)} layers that share it cannot be inverted.")
    del total

    def shared(differences: list[Tensor]) -> Tensor:
        """The least-squares matrix for what the corrections leave, as it will be stored."""
        if len(dense) == 1:
            return weights[0].detach().to(device)
        wanted = torch.zeros_like(dense[0])
        for weight, difference, root, energy in zip(dense, differences, roots, energies, strict=True):
            wanted.addmm_((weight - difference) @ root, root.T, alpha=1 / float(energy))
        found: Tensor = torch.cholesky_solve(wanted.T, factor).T
        return found.to(dtype)

    differences = [torch.zeros_like(dense[0])] * len(dense)
    corrections: list[tuple[Tensor, Tensor] | None] = [None] * len(dense)
    bases: list[Tensor | None] = [None] * len(dense)
    matrix = shared(differences)
    for turn in range(ROUNDS if len(dense) > 1 else 1):
        if rank == 0:
            break
        if turn:
            matrix = shared(differences)
        for layer, (weight, root) in enumerate(zip(dense, roots, strict=True)):
            rest = weight - matrix.double()
            bases[layer] = basis = leading_left(rest @ root, rank, bases[layer])
            corrections[layer] = first, second = _balanced(rest, basis[:, :rank])
            differences[layer] = second @ first
    corrections = [None if pair is None else (pair[0].to(dtype), pair[1].to(dtype)) for pair in corrections]
    errors = []
    for weight, pair, root, energy in zip(dense, corrections, roots, energies, strict=True):
        lost = weight - matrix.double() - (0 if pair is None else pair[1].double() @ pair[0].double())
        errors.append(float((lost @ root).square().sum() / energy))
    return Fit(matrix.contiguous(), corrections, errors)


def _root(
    weight: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"] | None, name: str
) -> Float[Tensor, "columns columns"]:
    """`R` with `R Rᵀ` the Gram and its ridge."""
    if not torch.isfinite(weight).all():
        raise NumericalError(f"{name}: weights that are not finite.")
    if gram is None:
        return torch.eye(weight.shape[1], dtype=torch.float64)
    try:
        return ridge_cholesky(gram, RIDGE)
    except NumericalError as failure:
        raise NumericalError(f"{name}: {failure}.") from failure


def leading_left(
    matrix: Float[Tensor, "rows columns"], rank: int, start: Float[Tensor, "rows size"] | None = None
) -> Float[Tensor, "rows size"]:
    """Left singular vectors to the largest singular values, some more than `rank`, the largest first.

    Large matrices are searched by subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4),
    from random directions that are the same on every machine, or in one sweep from `start`, what was found for a
    matrix that is nearly the same.
    """
    size = rank + OVERSAMPLING
    if WHOLE * size >= min(matrix.shape):
        whole: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
        return whole
    if start is None:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float64)
        start = matrix @ directions.to(matrix.device)
        sweeps = SWEEPS
    else:
        sweeps = 1
    basis = torch.linalg.qr(start)[0]
    for _ in range(sweeps):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    found: Tensor = basis @ torch.linalg.svd(basis.T @ matrix, full_matrices=False)[0]
    return found


def _balanced(
    difference: Float[Tensor, "rows columns"], left: Float[Tensor, "rows rank"]
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]]:
    """A and B with `B A = U Uᵀ D`, of equal norms direction by direction."""
    right = left.T @ difference
    norms = right.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return right / norms[:, None], left * norms
