"""Random numbers of torch that depend on a seed and leave the user's alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context torch's random numbers on the CPU come from a seed; after it they go on where they were.
    `torch.manual_seed` would also set those of accelerators, and not back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
