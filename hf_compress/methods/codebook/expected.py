"""The layout that a recipe leads to, without weights: what a plan is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...anatomy import ModelAnatomy, dense_rows, weight_count
from ...layout import layout_entry
from .allocation import CHOICES
from .configuration import OUTSIDE, CodebookConfig
from .parts import Part, planned_layer


def expected_layout(
    config: CodebookConfig, anatomy: ModelAnatomy, parts: Sequence[Part]
) -> tuple[list[dict[str, Any]], int]:
    """Layout entries, and how many bytes more they can become where data decides on the bits of a matrix."""
    get, entries = anatomy.model.get_submodule, []
    slack = 0.0
    for part in _with_average_bits(config, anatomy, parts):
        dense = get(part.path)
        layer = planned_layer(config, dense, part)
        entries.append(layout_entry(part.path, layer))
        if part.tied_head is not None:
            entries.append(layout_entry(part.tied_head, layer.tied_head(get(part.tied_head), part.path)))
        if config.average_bits is not None and part.kind not in OUTSIDE:
            widest = planned_layer(config, dense, replace(part, bits=max(CHOICES)))
            # The average counts weights; the last columns of a row may be padding, and books grow with the bits.
            spared = weight_count(dense) * (max(CHOICES) - config.average_bits) / 8
            slack += widest.stored_bytes() - spared - layer.stored_bytes()
    return entries, max(int(slack), 0)


def _with_average_bits(config: CodebookConfig, anatomy: ModelAnatomy, parts: Sequence[Part]) -> list[Part]:
    """With `average_bits`, bits for every matrix such that the average is kept, whichever get more in the end."""
    if config.average_bits is None:
        return list(parts)
    chosen, owed = [], 0.0
    for part in parts:
        if part.kind in OUTSIDE:
            chosen.append(part)
            continue
        weights = dense_rows(anatomy.model.get_submodule(part.path)).numel()
        owed += config.average_bits * weights
        bits = max(min(CHOICES), *(choice for choice in CHOICES if choice * weights <= max(owed, 2 * weights)))
        owed -= bits * weights
        chosen.append(replace(part, bits=bits))
    return chosen
