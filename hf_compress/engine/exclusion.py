"""`modules_to_not_convert`, as in Transformers."""

from __future__ import annotations

from collections.abc import Sequence


def is_excluded(path: str, modules_to_not_convert: Sequence[str]) -> bool:
    """Whether a module path, or a run of its parts ("lm_head", "layers.0", "model.layers.0.mlp"), is named."""
    return any(f".{name}." in f".{path}." for name in modules_to_not_convert)
