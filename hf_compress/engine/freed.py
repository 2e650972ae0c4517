"""Memory that was freed and is still held."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`; `None` where the C library has none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    The matrices of a block's solution are temporary, the small tensors between them stay: glibc would keep the holes.
    Measured on SmolLM2, sharing layers took 1.7 GB without this.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
