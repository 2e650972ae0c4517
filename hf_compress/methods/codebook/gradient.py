"""Codebooks and mapping learned by gradient descent: what `learning="joint"` is compared with.

E. Yvinec et al., arXiv 2309.17361 (JLCM): the mapping is learned through one logit a code, and the gradient that a
logit receives is re-weighted. Differentiating `Ŵ = Σ_j p_j s C_j` lets it grow with the distance of the code; the
paper's proximal gradient decreases with it, so that near-by codes are preferred. Our reconstruction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .coded import Coded, as_stored
from .mathematics import assign_nearest, output_energy

STEPS = 60
MOMENTUM = 0.9
# Of the mapping: a logit starts 1 below that of the present code, gradients are measured in their root mean square.
RATE = 0.05
# Codes nearer than this share of the mean gap are no nearer to the proximal gradient: its reciprocal stays finite.
NEAREST = 0.1
# Logits in work at a time: as many as stay in a core's cache through a step's dozen operations.
IN_WORK = 2**17

Weighting = Literal["proximal", "distance"]


def descend(
    weight: Float[Tensor, "rows columns"],
    gram: Float[Tensor, "columns columns"],
    coded: Coded,
    kind: Literal["proximal", "distance", "latent"],
    integer_scales: bool,
) -> Coded:
    """The best of `STEPS` steps of SGD with momentum on mapping and codebooks; never worse than the start.

    Args:
        weight: `W`, float32.
        gram: `H`, damped.
        coded: the start, rounded as it is stored.
        kind: how the mapping is learned: by logits with one of two gradients, or by a dense weight whose nearest code
            counts and which receives the gradient of `Ŵ` (straight-through).
    """
    gram = gram.to(weight)
    curvature = float(torch.linalg.eigvalsh(gram)[-1])
    best, least = coded, output_energy(coded.matrix() - weight, gram)
    mapping = _Latent(coded) if kind == "latent" else _Logits(coded, kind)
    book_velocity = torch.zeros_like(coded.codebooks)
    for step in range(STEPS):
        slope = (coded.matrix() - weight) @ gram
        rate = 1 - step / STEPS
        book_velocity = MOMENTUM * book_velocity + codebook_gradient(slope, gram, coded)
        codes = mapping.step(slope, coded, rate, curvature)
        shift = rate * float(gram.diagonal().mean()) / curvature
        coded = as_stored(
            replace(coded, codes=codes, codebooks=coded.codebooks - shift * book_velocity), integer_scales
        )
        loss = output_energy(coded.matrix() - weight, gram)
        if loss < least:
            best, least = coded, loss
    return best


def codebook_gradient(
    slope: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"], coded: Coded
) -> Float[Tensor, "books codes"]:
    """`Σ s · ∂L/∂Ŵ` over the weights that use a code, over the curvature of the same weights, `Σ s² H_cc`."""
    scales, size = coded.wide_scales(), coded.codebooks.shape[1]
    place = (coded.row_codebook[:, None] * size + coded.codes).flatten()
    above = coded.codebooks.new_zeros(coded.codebooks.numel())
    below = torch.zeros_like(above)
    above.index_add_(0, place, (scales * slope).flatten())
    below.index_add_(0, place, (scales.square() * gram.diagonal()).flatten())
    return torch.where(below > 0, above / below, 0).view_as(coded.codebooks)


def logit_gradients(
    slope: Float[Tensor, "rows columns"], coded: Coded, weighting: Weighting
) -> Float[Tensor, "rows columns codes"]:
    """The gradient to the logit of every code, relative to that of the present one.

    With `g = ∂L/∂Ŵ` and `d_j = s (C_j − C_a)` from the present code a to code j: `g d_j`, or `g / d_j` in the paper's
    proximal form (sign kept, 0 for the present code).
    """
    tables, scales = coded.tables(), coded.wide_scales()[..., None]
    distance = scales * (tables[:, None] - tables.gather(1, coded.codes)[..., None])
    if weighting == "distance":
        return slope[..., None] * distance
    gap = distance.abs().mean(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    relative = distance / gap
    return slope[..., None] * relative / (relative.square() + NEAREST**2) / gap


class _Logits:
    """One logit a code and weight; the largest decides."""

    def __init__(self, coded: Coded, weighting: Weighting) -> None:
        self.weighting = weighting
        self.logits = torch.nn.functional.one_hot(coded.codes, coded.codebooks.shape[1]).to(coded.scales)
        self.velocity = torch.zeros_like(self.logits)
        self.unit: float | None = None

    def step(self, slope: Tensor, coded: Coded, rate: float, curvature: float) -> Tensor:
        rows, columns, codes = self.logits.shape
        count = max(IN_WORK // (columns * codes), 1)
        parts = [slice(first, first + count) for first in range(0, rows, count)]
        if self.unit is None:
            squares = sum(float(self._gradients(slope, coded, part).square().sum()) for part in parts)
            self.unit = max((squares / self.logits.numel()) ** 0.5, torch.finfo(slope.dtype).tiny)
        best = torch.empty_like(coded.codes)
        for part in parts:
            velocity, logits = self.velocity[part], self.logits[part]
            velocity.mul_(MOMENTUM).add_(self._gradients(slope, coded, part), alpha=1 / self.unit)
            logits.sub_(velocity, alpha=RATE * rate)
            torch.argmax(logits, dim=2, out=best[part])
        return best

    def _gradients(self, slope: Tensor, coded: Coded, rows: slice) -> Tensor:
        own = replace(coded, codes=coded.codes[rows], scales=coded.scales[rows], row_codebook=coded.row_codebook[rows])
        return logit_gradients(slope[rows], own, self.weighting)


class _Latent:
    """A dense weight; its nearest code counts."""

    def __init__(self, coded: Coded) -> None:
        self.weight = coded.matrix()
        self.velocity = torch.zeros_like(self.weight)

    def step(self, slope: Tensor, coded: Coded, rate: float, curvature: float) -> Tensor:
        self.velocity.mul_(MOMENTUM).add_(slope)
        self.weight.sub_(self.velocity, alpha=rate / curvature)
        return assign_nearest(self.weight, coded).codes
