"""The sizes of every block's modules, their costs, and the exact budget over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...anatomy import ModelAnatomy, dense_rows, read_attribute, weight_count
from ...engine.exclusion import is_excluded
from ...errors import ConfigurationError
from .allocation import default_multiple, fill_to_cap, influence_reductions, realise
from .configuration import KINDS, Kind, ModularDecompositionConfig
from .heads import Heads, turned_share

WIDTH_MULTIPLE = 32
HEAD_MULTIPLE = 8
# Torch multiplies with all experts at once, and wants rows of whole 16 bytes: 8 numbers in half precision.
EXPERT_MULTIPLE = 8

_ROLES = {"query_key": ("query", "key"), "value_output": ("value", "output")}
# Sizes of all blocks: for each block, the size of each kind that it has.
Sizes = list[dict[Kind, int]]


@dataclass(frozen=True)
class ModuleGeometry:
    """One module that can give: its dense size, the weights that one unit of size costs, the step of its sizes, and
    which of the block's attentions it is, all of one size."""

    block: int
    kind: Kind
    size: int
    cost: int
    multiple: int
    attentions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Geometry:
    """What a model offers to modular decomposition.

    Args:
        modules: every module that can give, block by block.
        block_linear: elements of all matrices of the blocks, whether they can give or not.
        kind_linear: the same for the matrices of each kind.
        left_alone: why a module of some block cannot give.
    """

    modules: tuple[ModuleGeometry, ...]
    block_linear: int
    kind_linear: dict[Kind, int]
    left_alone: tuple[str, ...]

    @classmethod
    def of(cls, anatomy: ModelAnatomy, config: ModularDecompositionConfig) -> Geometry:
        modules: list[ModuleGeometry] = []
        left_alone: list[str] = []
        for name in config.modules_to_not_convert:
            if not any(is_excluded(path, [name]) for path, _ in anatomy.model.named_modules()):
                raise ConfigurationError(
                    f"modules_to_not_convert: {name!r} names no module of {type(anatomy.model).__name__}. Blocks are "
                    f"at {anatomy.block_paths[0]!r} and so on."
                )
        of_kind: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        for block in range(len(anatomy)):
            for kind in KINDS:
                # Those that the record names one by one count as well.
                alone = [path for path, own in anatomy.named_matrices(block) if own == kind]
                of_kind[kind] += sum(dense_rows(anatomy.model.get_submodule(path)).numel() for path in alone)
                paths = _matrix_paths(anatomy, block, kind)
                if alone:
                    what = f"{kind} of block {block}" + (": " + ", ".join(alone) if paths else "")
                    left_alone.append(f"{what}: the family's record has only its single matrices")
                if not paths:
                    continue
                of_kind[kind] += _weights_of_kind(anatomy, block, kind, paths)
                part = _module(anatomy, config, block, kind, paths)
                if isinstance(part, str):
                    left_alone.append(part)
                    continue
                modules.append(part)
                if len(part.attentions) < anatomy.attention_count(block) and kind != "mlp":
                    left_alone.append(_excluded(config, block, kind, paths))
        return cls(tuple(modules), sum(of_kind.values()), of_kind, tuple(left_alone))

    def weights(self, kind: Kind | None = None) -> int:
        """Weights of all modules that can give, of one kind if asked."""
        return sum(m.size * m.cost for m in self.modules if kind in (None, m.kind))

    def kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if self.weights(kind)]

    def dense(self) -> Sizes:
        sizes: Sizes = [{} for _ in range(1 + max((m.block for m in self.modules), default=-1))]
        for module in self.modules:
            sizes[module.block][module.kind] = module.size
        return sizes

    def removed(self, sizes: Sizes) -> int:
        """Weights that the sizes save."""
        return sum((m.size - sizes[m.block][m.kind]) * m.cost for m in self.modules)


def _matrix_paths(anatomy: ModelAnatomy, block: int, kind: Kind) -> list[str]:
    """The projections of a kind; none if the family's record has no such module."""
    if kind == "mlp":
        experts = anatomy.experts(block)
        if experts is not None:
            return [experts.path]
        return list(anatomy.mlp_paths(block).values())
    attentions = range(anatomy.attention_count(block))
    paths = (anatomy.attention_path(block, role, which) for which in attentions for role in _ROLES[kind])
    return list(dict.fromkeys(paths))


def _weights_of_kind(anatomy: ModelAnatomy, block: int, kind: Kind, paths: list[str]) -> int:
    """Weights of a block's matrices of a kind; of a fused one, the part that is of it."""
    if kind == "mlp":
        return sum(weight_count(anatomy.model.get_submodule(path)) for path in paths)
    attentions = range(anatomy.attention_count(block))
    return sum(Heads.of_block(anatomy, block, which).weight_count(kind) for which in attentions)


def _module(
    anatomy: ModelAnatomy, config: ModularDecompositionConfig, block: int, kind: Kind, paths: list[str]
) -> ModuleGeometry | str:
    """A block's module of a kind, or the reason why it cannot give."""
    get = anatomy.model.get_submodule
    experts, giving = anatomy.experts(block), attentions_giving(anatomy, config, block, kind)
    if kind == "mlp":
        if any(is_excluded(path, config.modules_to_not_convert) for path in paths):
            return _excluded(config, block, kind, paths)
        weights = _weights_of_kind(anatomy, block, kind, paths)
        size = dense_rows(get(paths[-1])).shape[1] if experts is None else experts.width
        multiple = default_multiple(size, WIDTH_MULTIPLE, steps=16)
    else:
        if not giving:
            return _excluded(config, block, kind, paths)
        reason = _why_left_alone(anatomy, block, kind)
        if reason is not None:
            return f"{kind} of block {block}: {reason}"
        weights = sum(Heads.of_block(anatomy, block, which).weight_count(kind) for which in giving)
        size = Heads.of_block(anatomy, block).head_dim
        multiple = default_multiple(size, HEAD_MULTIPLE, steps=4)
    multiple = config.rank_multiple or multiple
    if kind == "query_key":
        multiple += multiple % 2
    if kind == "mlp" and experts is not None:
        multiple = math.lcm(multiple, EXPERT_MULTIPLE)
    return ModuleGeometry(block, kind, size, weights // size, min(multiple, size), tuple(giving))


def attentions_giving(anatomy: ModelAnatomy, config: ModularDecompositionConfig, block: int, kind: Kind) -> list[int]:
    """Which of a block's attentions are not excluded from giving dimensions of a kind."""
    return [
        which
        for which in range(anatomy.attention_count(block) if kind != "mlp" else 0)
        if not any(
            is_excluded(anatomy.attention_path(block, role, which), config.modules_to_not_convert)
            for role in _ROLES[kind]
        )
    ]


def _excluded(config: ModularDecompositionConfig, block: int, kind: Kind, paths: list[str]) -> str:
    path = next(path for path in paths if is_excluded(path, config.modules_to_not_convert))
    return f"{kind} of block {block}: {path!r} is in modules_to_not_convert"


def _why_left_alone(anatomy: ModelAnatomy, block: int, kind: Kind) -> str | None:
    """What in a block's attention a kind cannot be made smaller with."""
    record, module = anatomy.attention, anatomy.model.get_submodule(anatomy.attention_path(block))
    flag = next((name for name in record.left_if if read_attribute(module, name)), None)
    if flag is not None:
        return f"attention with {flag!r} set"
    if kind == "value_output":
        heads = Heads.of_block(anatomy, block)
        # It has to go somewhere that has room for it.
        lost = record.output_outside and heads.has_bias("value") and not heads.has_bias("output")
        return "a value bias, and no output bias to add it to" if lost else None
    if record.norms_span_heads:
        return "norms over the queries and keys of all heads"
    rotary = record.rotary and (record.rotary_flag is None or read_attribute(module, record.rotary_flag))
    if not rotary:
        return "query/key norms without a rotary embedding" if record.query_norm else None
    config: Any = module.config
    return "a rotary embedding on a part of every head" if turned_share(config) < 1 else None


def kind_reductions(
    geometry: Geometry, config: ModularDecompositionConfig, kinds: Sequence[Kind]
) -> dict[Kind, float]:
    """The share of its own weights that each kind gives, where the recipe says so without a probe.

    Raises:
        ConfigurationError: the reduction is beyond what the kinds can give; the message says how far they reach.
    """
    if isinstance(config.reduction, dict):
        # Of all matrices of the kind, as the one number is of all matrices of the blocks.
        shares = {
            kind: share * geometry.kind_linear[kind] / max(geometry.weights(kind), 1)
            for kind, share in config.reduction.items()
            if share > 0
        }
    else:
        available = sum(geometry.weights(kind) for kind in kinds)
        wanted = config.reduction * geometry.block_linear
        share = wanted / available if available else float("inf") if wanted else 0.0
        shares = dict.fromkeys(kinds, share)
    missing = [kind for kind in shares if not geometry.weights(kind)]
    if missing:
        raise ConfigurationError(f"the model has no module of kind {missing} that may be compressed.")
    for kind, share in shares.items():
        if share > config.max_module_reduction + 1e-9:
            reach = config.max_module_reduction * sum(geometry.weights(k) for k in shares) / geometry.block_linear
            raise ConfigurationError(
                f"reduction={config.reduction} asks {kind!r} to give {share:.1%} of its weights, more than "
                f"max_module_reduction={config.max_module_reduction}. With kinds={list(shares)} this model reaches "
                f"reduction={reach:.3f}. Lower `reduction`, raise `max_module_reduction`, or add kinds."
            )
    return shares


def allocate(
    geometry: Geometry,
    shares: dict[Kind, float],
    influence: torch.Tensor | None,
    config: ModularDecompositionConfig,
    temperature: float,
) -> Sizes:
    """Sizes of every module: each kind's share spread over the blocks by influence (or evenly), the total exact."""
    wanted: dict[tuple[int, Kind], float] = {}
    for kind, share in shares.items():
        modules = [m for m in geometry.modules if m.kind == kind]
        if influence is None:
            reductions = torch.full((len(modules),), share, dtype=torch.float64)
        else:
            own = influence[torch.tensor([m.block for m in modules])]
            reductions = influence_reductions(own, share, temperature, config.max_module_reduction)
        for module, reduction in zip(modules, reductions.tolist(), strict=True):
            wanted[module.block, kind] = module.size * (1 - reduction)
    return realise_sizes(geometry, wanted)


def realise_sizes(geometry: Geometry, wanted: dict[tuple[int, Kind], float]) -> Sizes:
    """Whole sizes for the wanted ones; modules that are not named stay dense."""
    sizes = geometry.dense()
    modules = [m for m in geometry.modules if (m.block, m.kind) in wanted]
    if not modules:
        return sizes
    result = realise(
        [wanted[m.block, m.kind] for m in modules],
        [m.size for m in modules],
        [m.multiple for m in modules],
        [m.cost for m in modules],
    )
    for module, size in zip(modules, result, strict=True):
        sizes[module.block][module.kind] = size
    return sizes


def divide_between_kinds(
    geometry: Geometry, losses: dict[Kind, float], dense_loss: float, reduction: float, cap: float, exponent: float
) -> dict[Kind, float]:
    """Divide a reduction so that the kinds' expected losses add up to the least.

    Each kind's extra loss is taken to grow as `a rᵖ` with its share `r`, with `a` from the probe, where every kind
    gave the share `reduction` of its own weights. The least sum at a fixed total of weights has
    `r ∝ (weights / a)^(1 / (p − 1))`; at `p = 1` the cheapest kind gives first, up to the cap.
    """
    kinds = list(losses)
    weights = torch.tensor([float(geometry.weights(kind)) for kind in kinds], dtype=torch.float64)
    extra = torch.tensor([max(losses[kind] - dense_loss, 1e-4) for kind in kinds], dtype=torch.float64)
    worth = weights / extra
    # A very high power is the cheapest kind first, without a special case.
    power = min(1 / (exponent - 1), 200.0) if exponent > 1 else 200.0
    share = weights * (worth / worth.max()) ** power
    removed = fill_to_cap(share.clamp_min(1e-300), reduction * geometry.block_linear, cap * weights)
    return {kind: float(r / w) for kind, r, w in zip(kinds, removed, weights, strict=True) if r / w > 1e-3}
