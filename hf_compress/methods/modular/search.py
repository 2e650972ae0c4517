"""A better allocation by trial on held-out calibration sequences."""

from __future__ import annotations

import time

import torch

from ...engine.session import Session
from .allocation import fill_to_cap
from .configuration import Kind, ModularDecompositionConfig
from .sizes import Geometry, Sizes, realise_sizes
from .trial import shown, trial_losses

# Candidates of one walk: they share the dense pass and its statistics.
POPULATION = 6
FIRST_STEP = 0.35
SMALLEST_STEP = 0.03


def improve(session: Session, config: ModularDecompositionConfig, geometry: Geometry, start: Sizes) -> Sizes:
    """Move weights between blocks while that lowers the held-out loss, at a constant total.

    A coordinate step scales what one stretch of blocks gives up, and all others give the difference. Steps are judged
    together, as blocks interact; the best of a walk is taken if it beats the incumbent, else the steps shrink.
    Everything is decided on held-out sequences, all of them.
    """
    if geometry.removed(start) == 0:
        session.notes["search"] = "nothing to search: the reduction is below one step of the sizes"
        return start
    generator = torch.Generator().manual_seed(config.seed)
    began = time.monotonic()
    best, best_loss = start, trial_losses(session, config, [start], held_out_tokens=2**31)[0]
    first_loss, step, walks = best_loss, FIRST_STEP, 0
    slowest = 0.0

    def time_is_left() -> bool:
        return time.monotonic() - began + slowest < 60 * config.search_minutes

    while step > SMALLEST_STEP and session.processes.once(time_is_left):
        walk_began = time.monotonic()
        candidates = [_neighbour(geometry, config, best, step, generator) for _ in range(POPULATION)]
        losses = trial_losses(session, config, candidates, held_out_tokens=2**31)
        walks += 1
        winner = min(range(POPULATION), key=losses.__getitem__)
        if losses[winner] < best_loss:
            best, best_loss = candidates[winner], losses[winner]
        else:
            step *= 0.7
        slowest = max(slowest, time.monotonic() - walk_began)
    (name, before), (_, after) = shown(session.anatomy, first_loss), shown(session.anatomy, best_loss)
    session.notes["search"] = {
        "walks": walks,
        "candidates": walks * POPULATION,
        f"held_out_{name}_before": before,
        f"held_out_{name}_after": after,
    }
    return best


def _neighbour(
    geometry: Geometry, config: ModularDecompositionConfig, sizes: Sizes, step: float, generator: torch.Generator
) -> Sizes:
    """What the modules give, multiplied by a smooth random bump over the blocks, at the same total."""
    modules = [m for m in geometry.modules if sizes[m.block][m.kind] < m.size]
    given = torch.tensor([1 - sizes[m.block][m.kind] / m.size for m in modules], dtype=torch.float64)
    weights = torch.tensor([m.size * m.cost for m in modules], dtype=torch.float64)
    blocks = torch.tensor([float(m.block) for m in modules], dtype=torch.float64)
    count = float(blocks.max()) + 1
    centre = torch.rand(1, generator=generator, dtype=torch.float64) * count
    width = count * (0.04 + 0.2 * torch.rand(1, generator=generator, dtype=torch.float64))
    sign = 1.0 if torch.rand(1, generator=generator) < 0.5 else -1.0
    bump = torch.exp(sign * step * torch.exp(-(((blocks - centre) / width) ** 2) / 2))
    share = given * weights * bump
    total = float((given * weights).sum())
    removed = fill_to_cap(share, total, config.max_module_reduction * weights)
    wanted: dict[tuple[int, Kind], float] = {
        (m.block, m.kind): m.size * (1 - float(r / w)) for m, r, w in zip(modules, removed, weights, strict=True)
    }
    return realise_sizes(geometry, wanted)
