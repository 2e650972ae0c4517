"""The layout that a recipe leads to, without weights: what a plan is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import dense_rows
from ...resized import ResizedLinear
from .configuration import PruningConfig
from .format import NO_CHECKSUM, SparseFormat
from .mathematics import kept_count
from .modules import SparseLinear
from .positions import ESCAPE, PositionKind
from .structured import MULTIPLE, Structure


def expected_layout(model: nn.Module, paths: Sequence[str], config: PruningConfig) -> tuple[list[dict[str, Any]], int]:
    """Layout entries with the same share kept of every matrix and the kept weights at random places, and how many
    bytes more the places can take."""
    weights = [dense_rows(model.get_submodule(path)) for path in paths]
    kept = _kept(weights, config)
    entries, most, least = [], 0, 0
    for path, weight, count in zip(paths, weights, kept, strict=True):
        module, size = model.get_submodule(path), weight.numel()
        values = config.values
        if values == "auto":
            values = "bfloat16" if weight.dtype == torch.bfloat16 else "float16"
        kind, stream = _positions(count, size)
        format = SparseFormat(count, kind, stream, values, NO_CHECKSUM)
        spec: dict[str, Any] = format.spec()
        if isinstance(module, ResizedLinear):
            spec |= module.spec()
        entries.append({"path": path, "type": SparseLinear.layout_type, "spec": spec})
        least += stream
        most += 0 if count == size else min(count + (size - count) // ESCAPE, -(-size // 8))
    if config.compared == "global" and config.sparsity > 0:
        # One matrix may keep much more than another: the masks of all are a ceiling that does not know how they share.
        total, whole = sum(weight.numel() for weight in weights), sum(kept)
        most = min(whole + (total - whole) // ESCAPE, sum(-(-weight.numel() // 8) for weight in weights))
    return entries, max(most - least, 0)


def _kept(weights: Sequence[Tensor], config: PruningConfig) -> list[int]:
    """Weights that stay of every matrix; of all together as many as the run keeps."""
    if config.compared == "row":
        return [len(weight) * kept_count(weight.shape[1], config.sparsity) for weight in weights]
    kept = [kept_count(weight.numel(), config.sparsity) for weight in weights]
    if config.compared == "global":
        missing = kept_count(sum(weight.numel() for weight in weights), config.sparsity) - sum(kept)
        for index, weight in enumerate(weights):
            step = max(min(missing, weight.numel() - kept[index]), -kept[index])
            kept[index], missing = kept[index] + step, missing - step
    return kept


def _positions(kept: int, size: int) -> tuple[PositionKind, int]:
    """How the places are written, and in how many bytes where they are independent of each other."""
    if kept == size:
        return "all", 0
    mask = -(-size // 8)
    if not kept:
        return "gaps", 0
    run = (1 - kept / size) ** ESCAPE  # a gap has an escape for every 255 zeros that it is longer
    gaps = min(kept + round(kept * run / (1 - run)), kept + (size - kept) // ESCAPE)
    return ("gaps", gaps) if kept * 8 < size and gaps < mask else ("mask", mask)


def expected_structure(structure: Structure, sparsity: float) -> tuple[list[dict[str, Any]], int]:
    """Layout entries of the wanted total with the same share of heads kept everywhere, and of columns, and the bytes
    that a choice by scores may differ by."""
    model, entries = structure.anatomy.model, []
    of_unit = [group.weights_of_unit(model) for group in structure.groups]
    kept = [max(round(group.units * (1 - sparsity)), 1) for group in structure.groups]
    whole = sum(group.units * weights for group, weights in zip(structure.groups, of_unit, strict=True))
    target = (1 - sparsity) * whole
    columns = [index for index, group in enumerate(structure.groups) if group.kind == "mlp"]
    heads = sum(count * of_unit[i] for i, count in enumerate(kept) if i not in columns)
    wide = sum(structure.groups[i].units * of_unit[i] for i in columns)
    for position, index in enumerate(columns):
        units = structure.groups[index].units
        multiple = MULTIPLE if units % MULTIPLE == 0 else 1
        # Rounded as a running sum, so that the total is met.
        share = min(max((target - heads) / wide, 0.0), 1.0) * units / multiple
        count = (round(share * (position + 1)) - round(share * position)) * multiple
        kept[index] = min(max(count, multiple), units)
    biases = slack = 0
    for group, count, weights in zip(structure.groups, kept, of_unit, strict=True):
        # The run rounds the columns of every group to whole multiples after its choice.
        slack += weights * (MULTIPLE // 2 if group.kind == "mlp" else 0)
        for path, size in zip(group.paths, group.sizes, strict=True):
            module = model.get_submodule(path)
            assert isinstance(module, nn.Linear)
            biases += 0 if module.bias is None or path == group.inputs else module.out_features
            if count == group.units:
                continue
            shape = {"in_features": module.in_features, "out_features": module.out_features}
            shape["in_features" if path == group.inputs else "out_features"] = count * size
            entries.append({"path": path, "type": ResizedLinear.layout_type, "spec": shape})
    planned = sum(count * weights for count, weights in zip(kept, of_unit, strict=True))
    ceiling = round(target) + max(of_unit) + slack
    return entries, (max(ceiling - planned, 0) + biases) * next(model.parameters()).element_size()
