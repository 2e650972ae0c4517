"""Modular decomposition in closed form: tensors in, tensors out.

Source: C.-H. Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", arXiv 2408.09632,
ICLR 2025. Notation of the paper: rows are tokens, `y = x W`; linear layers of PyTorch store `Wᵀ`. Everything is
float64. Grams are sums over calibration tokens, `C = Σ HᵀH`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...calibration.ridge import ridge_cholesky
from ...errors import NumericalError

# Eigenvalues below this share of the largest one carry no signal in float64 sums of float32 products.
EIGENVALUE_FLOOR = 1e-10


def _ridge_inverse(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n n"]:
    """`(C + λI)⁻¹`, in the memory of its Cholesky factor."""
    factor = ridge_cholesky(gram, ridge)
    inverse: Tensor = torch.cholesky_inverse(factor, out=factor)
    return inverse


def ridge_leverage_scores(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, " n"]:
    """`s_i = [C (C + λI)⁻¹]_ii = 1 − λ [(C + λI)⁻¹]_ii` (MoDeGPT, Algorithm 1): the paper's score of a channel."""
    inverse = _ridge_inverse(gram, ridge)
    return 1 - ridge * gram.diagonal().mean() * inverse.diagonal()


def output_error_scores(
    gram: Float[Tensor, "n n"], down: Float[Tensor, "n d_model"], ridge: float
) -> Float[Tensor, " n"]:
    """`s_i = ‖W_d[i]‖² / [(C + λI)⁻¹]_ii`: the output error of removing channel i alone and refitting `W_d`.

    This is the Optimal Brain Surgeon saliency (Hassibi & Stork, 1993) of a row of `W_d`. Unlike the leverage score it
    knows how strongly the block listens to the channel.
    """
    inverse = _ridge_inverse(gram, ridge)
    return down.square().sum(dim=1) / inverse.diagonal()


@dataclass(frozen=True)
class NystromSolutions:
    """The least-squares optimum of the down projection for every number of kept channels at once.

    `W_d' = (Sᵀ C S)⁻¹ Sᵀ C W_d` (MoDeGPT, Type I), where S keeps the first k channels of an order. A Cholesky factor
    of the reordered Gram holds those of all its leading parts, so one factorisation serves every k. The ridge is put
    on `C` as a whole: a solution that keeps every channel is `W_d` itself.

    Args:
        order: channels, the most important first, (n,).
        factor: Cholesky factor L of the reordered `C + λI`, (n, n).
        projected: `L⁻¹ (C + λI) W_d` (with drift: plus `L⁻¹ Hᵀ D`) in that order, (n, d_model).
        errors: `‖H W_d − H S W_d'‖² / ‖H W_d‖²`, ridge included, for 0 to n kept channels, (n + 1,).
        energy: `‖H W_d‖²`, ridge included.
    """

    order: Int[Tensor, " n"]
    factor: Float[Tensor, "n n"]
    projected: Float[Tensor, "n d_model"]
    errors: Float[Tensor, " n_plus_1"]
    energy: float

    @classmethod
    def of(
        cls,
        gram: Float[Tensor, "n n"],
        down: Float[Tensor, "n d_model"],
        scores: Float[Tensor, " n"],
        ridge: float,
        drift: Float[Tensor, "n d_model"] | None = None,
    ) -> NystromSolutions:
        """Factorise once. With `drift`, `Σ Hᵀ D`, the target is `H W_d + D`: the block also makes up for what the
        residual stream has lost before it. Raises `NumericalError`."""
        order = scores.argsort(descending=True, stable=True)
        return cls.of_ordered(
            order, gram[order[:, None], order], down[order], ridge, None if drift is None else drift[order]
        )

    @classmethod
    def of_ordered(
        cls,
        order: Int[Tensor, " n"],
        gram: Float[Tensor, "n n"],
        down: Float[Tensor, "n d_model"],
        ridge: float,
        drift: Float[Tensor, "n d_model"] | None = None,
    ) -> NystromSolutions:
        """The same, with everything in the order of the channels already: `gram[order][:, order]` and so on."""
        factor = ridge_cholesky(gram, ridge)
        projected = factor.T @ down
        energy = projected.square().sum(dim=1)
        lost = energy.flip(0).cumsum(0).flip(0)
        errors = torch.cat((lost, lost.new_zeros(1))) / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
        if drift is not None:
            projected = projected + torch.linalg.solve_triangular(factor, drift, upper=False)
        return cls(order, factor, projected, errors, float(energy.sum()))

    def keep(self, count: int) -> tuple[Int[Tensor, " count"], Float[Tensor, "count d_model"]]:
        """The kept channels in ascending order and their rows of `W_d'`."""
        leading = self.factor[:count, :count].T
        refitted = torch.linalg.solve_triangular(leading, self.projected[:count], upper=True)
        kept, back = self.order[:count].sort()
        return kept, refitted[back]


def symmetric_roots(
    gram: Float[Tensor, "*heads d d"],
) -> tuple[Float[Tensor, "*heads d d"], Float[Tensor, "*heads d d"]]:
    """`C^{1/2}` and its pseudo-inverse from one eigendecomposition, eigenvalues below a relative floor left out.

    Raises:
        NumericalError: non-finite input or an eigensolver that does not converge.
    """
    if not torch.isfinite(gram).all():
        raise NumericalError("the Gram matrix holds non-finite values")
    try:
        values, vectors = torch.linalg.eigh(gram)
    except RuntimeError as error:
        raise NumericalError(f"the eigendecomposition of the Gram matrix failed: {error}") from error
    alive = values > EIGENVALUE_FLOOR * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    root = torch.where(alive, values, 0).sqrt()
    inverse = torch.where(alive, 1 / root, 0)
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT


def leading_subspace(symmetric: Float[Tensor, "*heads d d"], rank: int) -> Float[Tensor, "*heads d rank"]:
    """Eigenvectors of the `rank` largest eigenvalues, largest first."""
    vectors: Tensor = torch.linalg.eigh(symmetric)[1]
    return vectors.flip(-1)[..., :rank]


def value_output_joint(
    gram: Float[Tensor, "heads d d"], outputs: Float[Tensor, "heads d group_times_d_model"], rank: int
) -> tuple[Float[Tensor, "heads d rank"], Float[Tensor, "heads rank d"]]:
    """Value/output SVD (MoDeGPT, Type III), joint over the query heads that share a value head.

    With `G = W_Vᵀ C W_V`, the Gram of the values, `C^{1/2} W_V` equals an isometry times `G^{1/2}`: the paper's two
    SVDs of `d_model`-sized matrices reduce to one of `G^{1/2} [W_O¹ … W_O^g] = U Σ Vᵀ` with head-sized left side, and
    no inverse of `C` is needed. `W_V' = W_V · encode`, `W_O' = decode · W_O`, optimal for the summed error.

    Args:
        gram: of the values without bias, one matrix a key/value head.
        outputs: the output matrices of a group's query heads side by side.

    Returns:
        `encode = G^{-1/2} U_k` and `decode = U_kᵀ G^{1/2}`.
    """
    root, inverse = symmetric_roots(gram)
    weighted = root @ outputs
    basis = leading_subspace(weighted @ weighted.mT, rank)
    return inverse @ basis, basis.mT @ root


def value_output_per_head(
    gram: Float[Tensor, "heads d d"], rank: int
) -> tuple[Float[Tensor, "heads d rank"], Float[Tensor, "heads rank d"]]:
    """The paper's variant under grouped heads: the subspace of `C^{1/2} W_V` alone, blind to the outputs."""
    basis = leading_subspace(gram, rank)
    return basis, basis.mT


def query_key_svd(
    query_gram: Float[Tensor, "heads d d"], key_gram: Float[Tensor, "heads d d"], rank: int
) -> tuple[Float[Tensor, "heads d rank"], Float[Tensor, "heads d rank"]]:
    """Low rank of `q kᵀ` where no rotary embedding stands between: `q' = q · first`, `k' = k · second`.

    Minimises `Σ (qᵀk − q'ᵀk')²` over independent tokens, `‖G_Q^{1/2} (I − F Sᵀ) G_K^{1/2}‖²`, by an SVD of
    `G_Q^{1/2} G_K^{1/2}`; biases are part of q and k and pass through. Better than the column selection of the
    paper's Type II, which a rotary embedding forces.

    Args:
        query_gram: summed over the query heads that share a key head.
        key_gram: centred: a constant added to all keys shifts every logit of a query alike and softmax ignores it.
    """
    root, inverse = symmetric_roots(key_gram)
    basis = leading_subspace(root @ query_gram @ root, rank)
    first, second = root @ basis, inverse @ basis
    # The two factors may trade scale freely; equal energies keep both within the range of half precision.
    query_energy = (first * (query_gram @ first)).sum(dim=-2).clamp_min(1e-300)
    key_energy = (second * (key_gram @ second)).sum(dim=-2).clamp_min(1e-300)
    balance = (key_energy / query_energy) ** 0.25
    return first * balance[..., None, :], second / balance[..., None, :]


def rotary_pair_scores(
    query_energy: Float[Tensor, "heads d"], key_energy: Float[Tensor, "heads d"]
) -> Float[Tensor, "heads pairs"]:
    """CR score of a rotary pair (MoDeGPT, Type II): `(q_i² + q_{i+d/2}²)(k_i² + k_{i+d/2}²)`.

    A rotation acts within a pair, so the score is the same before and after it, and the pair stays or goes as one.
    """
    half = query_energy.shape[-1] // 2
    query = query_energy[:, :half] + query_energy[:, half:]
    key = key_energy[:, :half] + key_energy[:, half:]
    return query * key


def rotary_pairs_to_dims(pairs: Int[Tensor, "heads kept"], head_dim: int) -> Int[Tensor, "heads two_kept"]:
    """Dimensions of the kept pairs in the order that `rotate_half` expects: first halves, then second halves."""
    return torch.cat((pairs, pairs + head_dim // 2), dim=-1)


def top_indices(scores: Float[Tensor, "*heads n"], count: int) -> Int[Tensor, "*heads count"]:
    """Indices of the `count` largest scores in ascending order; ties go to the lower index on every device."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values
