"""Which layer uses which block, corrections of low rank, and steps through shared blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def assignment(depth: int, unique: int, order: Literal["cycle", "sequence"]) -> list[int]:
    """For every layer the kept block that it uses.

    In sequence the runs differ by at most one layer where `unique` does not divide the depth, the longer ones first.
    """
    if order == "cycle":
        return [layer % unique for layer in range(depth)]
    base, longer = divmod(depth, unique)
    lengths = [base + (block < longer) for block in range(unique)]
    return [block for block, length in enumerate(lengths) for _ in range(length)]


def initial_layers(
    depth: int, unique: int, assigned: Sequence[int], start: Literal["stepwise", "average", "lower"]
) -> list[list[int]]:
    """For every kept block the layers whose mean its matrices are (Bae et al., section 3.2)."""
    if start == "average":
        return [[layer for layer in range(depth) if assigned[layer] == block] for block in range(unique)]
    if start == "lower":
        return [[block] for block in range(unique)]
    # From the first to the last layer in equal distances.
    if unique == 1:
        return [[0]]
    return [[round(block * (depth - 1) / (unique - 1))] for block in range(unique)]


def low_rank(
    difference: Float[Tensor, "rows columns"], rank: int
) -> tuple[Float[Tensor, "rank columns"], Float[Tensor, "rows rank"]]:
    """A and B with B A the best approximation of this rank (truncated SVD, in float64), the singular values halved
    between them."""
    left, values, right = torch.linalg.svd(difference.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def uniform_steps(iterations: int, depth: int) -> list[float]:
    """Equal steps from 0 to `depth`."""
    return [depth / iterations] * iterations


def loops_in_time(steps: Sequence[float], depth: int) -> list[int]:
    """For every iteration the loop whose time is nearest to its own: loop ℓ of the full model starts at time ℓ.

    No loop runs twice: each has parameters and a slot of the cache of its own.
    """
    time, loops = 0.0, [-1]
    for position, step in enumerate(steps):
        latest = depth - (len(steps) - position)
        loops.append(min(max(int(time + 0.5), loops[-1] + 1), latest))
        time += step
    return loops[1:]


def steps_of_groups(iterations: int, sizes: Sequence[int]) -> list[list[float]]:
    """Equal steps within every group, an interval of its own; iterations are spread as the groups' sizes are.

    Every group has at least one iteration and at most as many as loops.
    """
    counts = [1] * len(sizes)
    while sum(counts) < iterations:
        # To the group whose steps are largest.
        best = max(
            (group for group in range(len(sizes)) if counts[group] < sizes[group]),
            key=lambda group: (sizes[group] / counts[group], -group),
        )
        counts[best] += 1
    return [uniform_steps(count, size) for count, size in zip(counts, sizes, strict=True)]


def adams_bashforth(
    increment: Float[Tensor, "*state"],
    before: Float[Tensor, "*state"] | None,
    step: float,
    step_before: float,
) -> Float[Tensor, "*state"]:
    """What is added to the state with the second-order Adams-Bashforth formula for steps of any size.

    Args:
        increment: `step · f(h)`, what an Euler step would add.
        before: the same of the iteration before, of size `step_before`; `None` at the start, which is an Euler step.
    """
    if before is None:
        return increment
    ratio = step / step_before
    return increment * (1 + ratio / 2) - before * (ratio * ratio / 2)
