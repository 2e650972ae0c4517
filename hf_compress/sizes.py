"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import Any

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: Any) -> Any:
    """`"300MB"` (10⁶) or `"300MiB"` (2²⁰) as bytes; numbers as they are. Raises `ValueError` for anything else."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is no size such as 300MB")
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{value!r} is no size such as 300MB, 1.5GB or 280MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])
