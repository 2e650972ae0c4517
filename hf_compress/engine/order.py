"""Which method may follow which."""

from __future__ import annotations

from typing import Any

from ..configuration import CompressionConfig, MethodConfig
from ..errors import ConfigurationError
from .registry import method_class


def continues(recipe: CompressionConfig, layout: list[dict[str, Any]]) -> bool:
    """Whether a recipe is for a model that is compressed already, by what its first method has made before."""
    types = {entry.get("type") for entry in layout}
    return bool(types) and types <= set(_continues(recipe.stages[0]))


def check_order(recipe: CompressionConfig) -> None:
    """Raises `ConfigurationError` for a stage that cannot work on what the stages before it leave."""
    left: set[str] = set()
    for position, stage in enumerate(recipe.stages):
        method = method_class(stage)
        strange = left - set(_continues(stage))
        if strange:
            raise ConfigurationError(
                f"stage {position + 1} ({type(stage).__name__}) cannot work on what the stages before it leave: "
                f"{', '.join(sorted(strange))}. Layers are decomposed or shared first, then coded or pruned."
            )
        left |= set(method.leaves)
        if getattr(stage, "portable", False) and position + 1 < len(recipe.stages):
            raise ConfigurationError(
                f"stage {position + 1} ({type(stage).__name__}) has portable=True, which is for the last stage: what "
                "comes after it needs this package to be loaded."
            )


def _continues(stage: MethodConfig) -> tuple[str, ...]:
    return method_class(stage).continues_with(stage)
