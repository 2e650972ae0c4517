"""From scores to masks, under an exact count."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .mathematics import keep_best, keep_best_of_rows, kept_count


def select(
    scores: dict[str, Tensor],
    sparsity: float,
    compared: Literal["global", "layer", "row"],
    before: dict[str, Tensor] | None = None,
    transposed: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Masks in the shapes of the scores.

    Args:
        sparsity: share of all weights that is zero afterwards; what was pruned before counts.
        before: masks that stay in force.
        transposed: paths whose rows are the columns of the scores (Conv1D).

    Raises:
        NumericalError: a score that is NaN.
    """
    if compared == "global":
        kept = kept_count(sum(score.numel() for score in scores.values()), sparsity)
        every = None if before is None else [before[path] for path in scores]
        return dict(zip(scores, keep_best(list(scores.values()), kept, every), strict=True))
    masks: dict[str, Tensor] = {}
    for path, score in scores.items():
        among = None if before is None else before[path]
        if compared == "layer":
            kept = kept_count(score.numel(), sparsity)
            masks[path] = keep_best([score], kept, None if among is None else [among])[0]
        elif path in transposed:
            among = None if among is None else among.T
            masks[path] = keep_best_of_rows(score.T, kept_count(score.shape[0], sparsity), among).T.contiguous()
        else:
            masks[path] = keep_best_of_rows(score, kept_count(score.shape[1], sparsity), among)
    return masks


def warn_if_undecided(scores: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Warn where more weights are kept than have a score: the others are chosen by their position alone."""
    scored = sum(int(torch.count_nonzero(score)) for score in scores.values())
    kept = sum(int(torch.count_nonzero(mask)) for mask in masks.values())
    if scored < kept:
        warnings.warn(
            f"only {scored} weights have a score other than zero and {kept} are kept: the criterion tells them apart "
            "no further, and the first in order stay. Check the data, or choose another criterion.",
            stacklevel=3,
        )


def sparsity_of(masks: Sequence[Tensor]) -> float:
    """Share of zeros of all masks together."""
    total = sum(mask.numel() for mask in masks)
    return 1 - sum(int(torch.count_nonzero(mask)) for mask in masks) / total
