"""Scores, exact selection and the schedule of pruning: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import NumericalError

# Two passes over the bits of a score: 16 and 16.
_HALF = 1 << 16


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity; every device is waited for once.

    By the ends of the values, which a NaN becomes as well: no second tensor of their size, and a tenth of the time
    that `torch.isfinite` takes on a CPU.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        values = tensor.detach()._values() if tensor.is_sparse else tensor.detach()
        values = torch.view_as_real(values) if values.is_complex() else values
        if values.numel():
            found.setdefault(tensor.device, []).extend(values.aminmax())
    return all(bool(torch.stack(each).isfinite().all()) for each in found.values())


def snip_magnitude(
    weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"], alpha: float, normalize: bool
) -> tuple[Float[Tensor, "*shape"], float, float]:
    """|w·g| + α w² (Kohama et al., ICCV 2023 workshops), and the sums of both terms.

    With `normalize` both terms are divided by their means over the tensor first.
    """
    sensitivity, magnitude = (weight * gradient).abs(), weight.square()
    if normalize:
        sensitivity = sensitivity / sensitivity.mean().clamp_min(torch.finfo(torch.float32).tiny)
        magnitude = magnitude / magnitude.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return sensitivity + alpha * magnitude, float(sensitivity.sum()), float(alpha * magnitude.sum())


def cubic_sparsity(step: int, start: int, end: int, final: float) -> float:
    """Sparsity at a step: 0 at `start`, `final` from `end` on, `final · (1 − (1 − t)³)` between.

    M. Zhu and S. Gupta, "To prune, or not to prune" (arXiv 1710.01878), equation 1.
    """
    if step <= start:
        return 0.0
    if step >= end:
        return final
    return final * (1 - (1 - (step - start) / (end - start)) ** 3)


def keep_best(
    scores: Sequence[Float[Tensor, "..."]], kept: int, among: Sequence[Bool[Tensor, "..."]] | None = None
) -> list[Bool[Tensor, "..."]]:
    """Masks of the `kept` highest scores of all tensors together, exactly as many, on the scores' devices.

    Equal scores are kept in the order of the tensors and within a tensor from its start. The threshold is found by
    counting the bits of the scores, so that nothing of the size of all tensors is ever made.

    Args:
        scores: of any sign, finite.
        kept: how many weights stay; all of `among` where there are no more.
        among: which weights may stay at all.

    Raises:
        NumericalError: a score that is NaN.
    """
    allowed: list[Tensor | None] = [None] * len(scores) if among is None else [mask.reshape(-1) for mask in among]
    pairs = list(zip(scores, allowed, strict=True))
    total = sum(score.numel() if mask is None else int(mask.sum()) for score, mask in pairs)
    if kept >= total:
        whole = [
            torch.ones_like(score, dtype=torch.bool).reshape(-1) if mask is None else mask for score, mask in pairs
        ]
        return [mask.clone().view(score.shape) for mask, score in zip(whole, scores, strict=True)]
    # The 16 high bits of the threshold, then the low ones.
    high, above = _boundary((_high_bits(_keys(*pair)) for pair in pairs), kept)
    low, above_low = _boundary((_low_bits(_keys(*pair), high) for pair in pairs), kept - above)
    threshold, ties = (high - _HALF // 2) * _HALF + low, kept - above - above_low
    masks = []
    for score, mask in pairs:
        key = _ordered_bits(score)
        keep, equal = key > threshold, key == threshold
        if mask is not None:
            keep, equal = keep & mask, equal & mask
        if ties > 0:
            taken = equal & (equal.cumsum(0) <= ties)
            ties -= int(taken.sum())
            keep = keep | taken
        masks.append(keep.view(score.shape))
    return masks


def keep_best_of_rows(
    scores: Float[Tensor, "rows columns"], kept: int, among: Bool[Tensor, "rows columns"] | None = None
) -> Bool[Tensor, "rows columns"]:
    """The `kept` highest scores of every row; equal ones from the left."""
    if torch.isnan(scores).any():
        raise NumericalError("a score is NaN")
    scores = scores if among is None else scores.masked_fill(~among, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    return mask if among is None else mask & among


def _ordered_bits(scores: Float[Tensor, "*shape"]) -> Int[Tensor, "n"]:
    """32-bit integers in the order of float32 numbers. As few copies as can be: these are all weights of a model."""
    # Adding zero makes a copy, and one number of −0 and 0.
    flat = torch.add(scores.detach().reshape(-1).float(), 0.0)
    if torch.isnan(flat).any():
        raise NumericalError("a score is NaN")
    bits = flat.view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))


def _keys(scores: Float[Tensor, "*shape"], mask: Bool[Tensor, "n"] | None) -> Int[Tensor, "m"]:
    keys = _ordered_bits(scores)
    return keys if mask is None else keys[mask]


def _high_bits(keys: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The high 16 bits, from zero."""
    return (keys >> 16).add_(_HALF // 2)


def _low_bits(keys: Int[Tensor, "n"], high: int) -> Int[Tensor, "m"]:
    """The low bits of those with these high ones."""
    return keys[_high_bits(keys) == high] & (_HALF - 1)


def _boundary(parts: Iterator[Int[Tensor, "n"]], kept: int) -> tuple[int, int]:
    """The number at which the `kept` largest of all parts end, and how many are above it; numbers below 2¹⁶."""
    counts = torch.zeros(_HALF, dtype=torch.long)
    for part in parts:
        counts += torch.bincount(part, minlength=_HALF).cpu()
    from_above = counts.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_above, torch.tensor(kept)))
    return _HALF - 1 - index, int(from_above[index - 1]) if index else 0


def kept_count(weights: int, sparsity: float) -> int:
    """How many of `weights` stay: at least one."""
    return max(round((1 - sparsity) * weights), 1)
