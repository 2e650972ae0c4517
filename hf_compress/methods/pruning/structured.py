"""Whole heads and whole MLP columns: what stays is a smaller dense model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...anatomy import ModelAnatomy, read_attribute
from ...engine.report import ModuleReport
from ...engine.session import BlockResult
from ...errors import ConfigurationError
from ...resized import ResizedLinear
from .configuration import PruningConfig
from .parts import Part

# Widths that kernels like.
MULTIPLE = 8


@dataclass
class Group:
    """What can only be removed together: in a block the units (heads or columns) of one MLP or one attention.

    Args:
        block: index of the block.
        kind: "mlp" or "attention".
        outputs: matrices whose rows belong to the units.
        inputs: the matrix whose columns do.
        sizes: rows of a unit in every one of `outputs`, then its columns in `inputs`.
        units: how many there are.
        kept: indices of those that stay.
    """

    block: int
    kind: str
    outputs: list[str]
    inputs: str
    sizes: list[int]
    units: int
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    @property
    def paths(self) -> list[str]:
        return [*self.outputs, self.inputs]

    def weights_of_unit(self, model: nn.Module) -> int:
        """Weights that go with a unit."""
        return sum(model.get_submodule(path).get_parameter("weight").numel() for path in self.paths) // self.units

    def scores(self, scores: dict[str, Tensor]) -> Tensor:
        """Mean score of a unit's weights, (units,)."""
        parts = [scores[path].float().view(self.units, -1) for path in self.outputs]
        parts.append(scores[self.inputs].float().view(-1, self.units, self.sizes[-1]).movedim(1, 0).flatten(1))
        return torch.stack([part.sum(dim=1) for part in parts]).sum(0) / sum(part.shape[1] for part in parts)


def _rows_of(units: Tensor, size: int) -> Tensor:
    return (units.unsqueeze(1) * size + torch.arange(size, device=units.device)).flatten()


@dataclass
class Structure:
    """All groups of a model, and what is chosen of them."""

    anatomy: ModelAnatomy
    groups: list[Group]
    #: Weights of all matrices that are to be pruned, with those that cannot be removed as a whole.
    weights: int

    def choose(self, scores: dict[str, Tensor], sparsity: float, compared: str) -> None:
        """Keep the units with the highest mean scores, at least one of every group, within half a step."""
        model = self.anatomy.model
        units: list[tuple[float, int, int, int]] = []
        for index, group in enumerate(self.groups):
            found, weights = group.scores(scores), group.weights_of_unit(model)
            if compared == "layer":
                found = found.argsort().argsort() / group.units
            units += [(float(score), index, unit, weights) for unit, score in enumerate(found)]
        target = sparsity * sum(unit[3] for unit in units)
        kept = [set(range(group.units)) for group in self.groups]
        removed = 0
        for _, index, unit, weights in sorted(units):
            if removed + weights / 2 > target:
                break
            if len(kept[index]) > 1:
                kept[index].discard(unit)
                removed += weights
        for group, chosen, index in zip(self.groups, kept, range(len(kept)), strict=True):
            count = len(chosen)
            if group.kind == "mlp" and group.units % MULTIPLE == 0 and count < group.units:
                count = max(round(count / MULTIPLE), 1) * MULTIPLE
            best = sorted((score, unit) for score, at, unit, _ in units if at == index)[-count:]
            group.kept = torch.tensor(sorted(unit for _, unit in best))

    def adopt(self, masks: dict[str, Tensor]) -> None:
        """Take the choice from masks that a checkpoint brought back."""
        for group in self.groups:
            columns = masks[group.inputs].any(dim=0).view(group.units, group.sizes[-1])
            group.kept = columns.any(dim=1).nonzero().squeeze(1).cpu()

    def masks(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The choice as masks in the shapes of the scores."""
        masks = {path: torch.ones_like(score, dtype=torch.bool) for path, score in scores.items()}
        for group in self.groups:
            for path, size in zip(group.paths, group.sizes, strict=True):
                mask = torch.zeros_like(masks[path])
                rows = _rows_of(group.kept.to(mask.device), size)
                if path == group.inputs:
                    mask[:, rows] = True
                else:
                    mask[rows] = True
                masks[path] = mask
        return masks

    def removed_share(self) -> float:
        """Of the weights of all matrices."""
        model = self.anatomy.model
        removed = (group.units - len(group.kept) for group in self.groups)
        gone = sum(n * group.weights_of_unit(model) for n, group in zip(removed, self.groups, strict=True))
        return gone / self.weights

    def warn_if_short(self, config: PruningConfig) -> float:
        """The removed share; warns where it is less than what was asked for."""
        share = round(self.removed_share(), 4)
        if share < config.sparsity - 0.02:
            warnings.warn(
                f"only {share:.1%} could be removed of the {config.sparsity:.1%} asked for: heads go as a whole and "
                "columns in eights, some stay in every block, and so do matrices without heads or columns.",
                stacklevel=3,
            )
        return share

    def compress_block(self, block: int) -> BlockResult:
        result, model = BlockResult({}, []), self.anatomy.model
        for group in self.groups:
            if group.block != block or len(group.kept) == group.units:
                continue
            before = after = 0
            lost = whole = 0.0
            for path, size in zip(group.paths, group.sizes, strict=True):
                module = model.get_submodule(path)
                assert isinstance(module, nn.Linear)
                rows = _rows_of(group.kept.to(module.weight.device), size)
                weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
                if path == group.inputs:
                    weight = weight[:, rows]
                else:
                    weight, bias = weight[rows], None if bias is None else bias[rows]
                result.modules[path] = ResizedLinear.from_tensors(
                    weight.clone(), None if bias is None else bias.clone()
                )
                before, after = before + module.weight.numel(), after + weight.numel()
                energy = float(module.weight.detach().double().square().sum())
                lost, whole = lost + energy - float(weight.double().square().sum()), whole + energy
            error = max(lost, 0.0) / max(whole, 1e-300)
            result.rows.append(
                ModuleReport(block, group.inputs, group.kind, group.units, len(group.kept), before, after, error)
            )
        return result


def removable_groups(anatomy: ModelAnatomy, parts: Sequence[Part]) -> Structure:
    """The heads and MLP columns of a model whose matrices are all among `parts`.

    Raises:
        ConfigurationError: nothing can be removed as a whole: query, key and value are one matrix, or excluded.
    """
    wanted = {part.path for part in parts}
    groups = []
    for block in range(len(anatomy)):
        for group in (*_attentions(anatomy, block), _mlp(anatomy, block)):
            if group is not None and wanted.issuperset(group.paths):
                groups.append(group)
    if not groups:
        raise ConfigurationError(
            f"`structured=True`: {type(anatomy.model).__name__} has no attention with query, key, value and output as "
            "linear layers of their own, and no MLP of linear layers, that may be pruned."
        )
    sizes = (anatomy.model.get_submodule(path).get_parameter("weight").numel() for path in wanted)
    return Structure(anatomy, groups, sum(sizes))


def _linear(anatomy: ModelAnatomy, path: str) -> nn.Linear | None:
    module = anatomy.model.get_submodule(path)
    return module if isinstance(module, nn.Linear) else None


def _by_kind(anatomy: ModelAnatomy, block: int, kind: str) -> list[str]:
    return [path for path, own in anatomy.named_matrices(block) if own == kind]


def _attentions(anatomy: ModelAnatomy, block: int) -> Iterator[Group | None]:
    """Of a block whose attention its record does not describe, one from its matrices."""
    for which in range(max(anatomy.attention_count(block), 1)):
        yield _attention(anatomy, block, which)


def _attention(anatomy: ModelAnatomy, block: int, which: int) -> Group | None:
    if anatomy.record.attention is not None:
        if anatomy.attention.fixed_heads or anatomy.attention.fused:
            return None
        paths = [anatomy.attention_path(block, role, which) for role in ("query", "key", "value", "output")]
        holder = anatomy.model.get_submodule(anatomy.attention_path(block, which=which))
    else:
        paths = [*_by_kind(anatomy, block, "query_key"), *_by_kind(anatomy, block, "value_output")]
        if len(paths) != 4 or anatomy.record.fixed_heads:
            return None  # query, key and value are one matrix, or there is more than self attention
        holder = anatomy.model.get_submodule(paths[0].rpartition(".")[0])
    query, key, value, output = (_linear(anatomy, path) for path in paths)
    size: int | None
    if anatomy.record.attention is not None:
        size = int(read_attribute(holder, anatomy.attention.head_dim))
    else:
        size = getattr(holder, "head_dim", None) or getattr(holder, "attention_head_size", None)
    if query is None or key is None or value is None or output is None or size is None:
        return None
    units = key.out_features // size
    group = query.out_features // units
    return Group(block, "attention", paths[:3], paths[3], [group, size, value.out_features // units, group], units)


def _mlp(anatomy: ModelAnatomy, block: int) -> Group | None:
    paths = list(anatomy.mlp_paths(block).values()) or _by_kind(anatomy, block, "mlp")
    modules = [_linear(anatomy, path) for path in paths]
    if len(paths) < 2 or any(module is None for module in modules):
        return None
    down = modules[-1]
    assert down is not None
    if any(module is not None and module.out_features != down.in_features for module in modules[:-1]):
        return None
    return Group(block, "mlp", paths[:-1], paths[-1], [1] * len(paths), down.in_features)
