"""How much every block gives up, under an exact budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigurationError


def influence_reductions(
    influence: Float[Tensor, " blocks"], average: float, temperature: float, cap: float
) -> Float[Tensor, " blocks"]:
    """`φ = L · φ_avg · softmax(−s / ε)`, which maximises `Σ s_i (1 − φ_i) + ε H(φ)` (MoDeGPT, section 3.3).

    No block gives more than `cap`; what exceeds it is given back to the others in proportion, so that the mean stays
    `average` exactly.

    Raises:
        ConfigurationError: `average` above `cap`.
    """
    if average > cap + 1e-12:
        raise ConfigurationError(
            f"a mean reduction of {average:.3f} cannot be spread over blocks that may give at most {cap:.3f} each. "
            "Lower `reduction`, raise `max_module_reduction`, or let more `kinds` give."
        )
    # A low temperature drives shares to zero, but blocks whose turn comes after the cap must still be told apart.
    share = torch.softmax(-influence.double() / temperature, dim=0).clamp_min(1e-300)
    return fill_to_cap(share, average * len(influence), cap)


def fill_to_cap(share: Float[Tensor, " n"], total: float, cap: float | Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Spread `total` in proportion to `share` with at most `cap` each, the excess spread over the rest."""
    caps = torch.as_tensor(cap, dtype=torch.float64).expand(len(share)).clone()
    result = torch.zeros(len(share), dtype=torch.float64)
    open_ = torch.ones(len(share), dtype=torch.bool)
    while open_.any():
        rest = max(total - float(caps[~open_].sum()), 0.0)
        result[~open_] = caps[~open_]
        result[open_] = share[open_].double() * (rest / float(share[open_].sum()))
        over = open_ & (result > caps)
        if not over.any():
            break
        open_ &= ~over
        result[~open_] = caps[~open_]
    return result


def realise(
    wanted: Sequence[float],
    largest: Sequence[int],
    multiples: Sequence[int],
    costs: Sequence[float],
    smallest: int = 1,
) -> list[int]:
    """Whole sizes, multiples of `multiples[i]` (or `largest[i]` itself), whose total cost meets that of `wanted`.

    Sizes are rounded down first and raised again by largest remainder while the total stays nearest to the target,
    so the budget is met within half a step.

    Args:
        wanted: sizes as real numbers.
        largest: the dense sizes.
        multiples: allowed step of each size.
        costs: parameters of one unit of each size.
        smallest: no size falls below the first multiple that reaches this.
    """
    floors = [min(max(m, -(-smallest // m) * m), d) for m, d in zip(multiples, largest, strict=True)]
    sizes = [
        d if w >= d else max(floor, int(w // m) * m)
        for w, d, m, floor in zip(wanted, largest, multiples, floors, strict=True)
    ]
    target = sum(w * c for w, c in zip(wanted, costs, strict=True))
    spent = sum(s * c for s, c in zip(sizes, costs, strict=True))

    def step(i: int) -> int:
        return min(multiples[i], largest[i] - sizes[i])

    # What decides between equals must not be how sums were rounded.
    def lacking(i: int) -> float:
        return round((wanted[i] - sizes[i]) / multiples[i], 9)

    def nearer(one: float, other: float) -> bool:
        return abs(one - target) < abs(other - target) - 1e-9 * target

    while True:
        candidates = [i for i in range(len(sizes)) if sizes[i] < largest[i]]
        if not candidates:
            break
        best = max(candidates, key=lacking)
        after = spent + step(best) * costs[best]
        if not nearer(after, spent):
            break
        spent = after
        sizes[best] += step(best)
    while spent > target:
        # Sizes that were held up by their floor have spent too much: the others give it back.
        candidates = [i for i in range(len(sizes)) if sizes[i] - multiples[i] >= floors[i]]
        if not candidates:
            break
        best = min(candidates, key=lacking)
        after = spent - multiples[best] * costs[best]
        if not nearer(after, spent):
            break
        spent = after
        sizes[best] -= multiples[best]
    return sizes


def default_multiple(size: int, wish: int, steps: int) -> int:
    """The largest power of two up to `wish` that still leaves `steps` steps between nothing and `size`."""
    multiple = wish
    while multiple > 1 and multiple * steps > size:
        multiple //= 2
    return multiple
