"""From a block's statistics and its new sizes to its new modules."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...anatomy import Experts, ModelAnatomy, dense_rows, join
from ...engine.report import ModuleReport
from ...engine.session import BlockResult
from ...errors import NumericalError
from ...experts import ResizedExperts
from ...resized import ResizedConv1D, ResizedLinear
from . import mathematics
from .configuration import Kind, ModularDecompositionConfig
from .heads import INPUTS, Heads, Role
from .modules import DecomposedAttention
from .sizes import attentions_giving
from .statistics import AttentionStatistics, BlockStatistics

# Weight and bias of every role.
Parts: TypeAlias = dict[Role, tuple[Tensor, Tensor | None]]

# How much of the residual stream's drift a block makes up for in sequential order. All of it asks for more than a
# block can give and hurts on text that was not calibrated on.
DRIFT_SHARE = 0.5


def compress_block(
    anatomy: ModelAnatomy,
    config: ModularDecompositionConfig,
    block: int,
    sizes: dict[Kind, int],
    statistics: BlockStatistics,
) -> BlockResult:
    """New modules of a block.

    Args:
        sizes: the new size of every kind that is reduced; the others stay dense.
        statistics: of at least these kinds.

    Raises:
        NumericalError: a factorisation that failed with every fallback, or non-finite statistics; names the module.
    """
    result = BlockResult({}, [])
    experts = anatomy.experts(block) if "mlp" in sizes else None
    if experts is not None:
        with naming(experts.path):
            _compress_experts(config, block, experts, sizes["mlp"], statistics, result)
    elif "mlp" in sizes:
        path = anatomy.mlp_path(block, "down")
        with naming(path):
            _compress_mlp(anatomy, config, block, sizes["mlp"], statistics, result)
    giving = {kind: attentions_giving(anatomy, config, block, kind) for kind in sizes}
    for which in range(anatomy.attention_count(block)):
        own = {kind: size for kind, size in sizes.items() if which in giving[kind]}
        if own:
            with naming(anatomy.attention_path(block, which=which)):
                _compress_attention(anatomy, config, block, which, own, statistics, result)
    return result


class naming:
    """Adds a module's path to a `NumericalError` from inside."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, NumericalError):
            raise NumericalError(f"{self.path}: {error}. Check the weights, or calibrate on more text.") from error


def _compress_mlp(
    anatomy: ModelAnatomy,
    config: ModularDecompositionConfig,
    block: int,
    width: int,
    statistics: BlockStatistics,
    result: BlockResult,
) -> None:
    get = anatomy.model.get_submodule
    record = anatomy.mlp(block)
    assert record is not None
    *before_down, down_path = anatomy.mlp_paths(block).values()
    down, down_bias = _matrix(get(down_path))
    solutions = statistics.solutions
    if solutions is None:
        solutions = statistics.solutions = _solve_mlp(config, statistics, down)
    kept, refitted = solutions.keep(width)
    new = {down_path: _resized(get(down_path), refitted.T.to(down), down_bias)}
    before = down.numel()
    # The halves of a fused gate and up lose the same channels.
    rows = torch.cat((kept, kept + down.shape[1])) if record.fused else kept
    for path in before_down:
        weight, bias = _matrix(get(path))
        own = rows.to(weight.device)
        small = weight[own], None if bias is None else bias[own]
        new[path] = _resized(get(path), *small, groups=2 if record.fused else 1)
        before += weight.numel()
    result.modules.update(new)
    after = sum(module.weight.numel() for module in new.values())
    place, error = join(anatomy.block_paths[block], record.path), float(solutions.errors[width])
    result.rows.append(ModuleReport(block, place, "mlp", down.shape[1], width, before, after, error))


def _compress_experts(
    config: ModularDecompositionConfig,
    block: int,
    experts: Experts,
    width: int,
    statistics: BlockStatistics,
    result: BlockResult,
) -> None:
    """Every expert keeps as many channels, each those that its own tokens need."""
    seen = statistics.experts
    assert seen is not None
    seen.warn_rare(experts.path)
    floor = seen.floors("inner")
    up, down = experts.up, experts.down
    gates = 2 if experts.gated else 1
    small_up = up.new_empty((experts.count, gates * width, experts.hidden))
    small_down = down.new_empty((experts.count, experts.hidden, width))
    lost = energy = 0.0
    for expert in range(experts.count):
        # Solved again for every width that is tried: the factors of all experts would be larger than the block.
        try:
            solution = _solve(config, seen.gram("inner", expert, floor), down[expert], None)
        except NumericalError as failure:
            raise NumericalError(f"expert {expert}: {failure}") from failure
        kept, refitted = solution.keep(width)
        kept = kept.to(up.device)
        small_up[expert] = torch.cat([up[expert, gate * experts.width + kept] for gate in range(gates)])
        small_down[expert] = refitted.T.to(down)
        lost += solution.energy * float(solution.errors[width])
        energy += solution.energy
    new = ResizedExperts.from_tensors(experts.module, small_up, small_down)
    result.modules[experts.path] = new
    error, after = lost / energy if energy > 0 else 0.0, small_up.numel() + small_down.numel()
    result.rows.append(ModuleReport(block, experts.path, "mlp", experts.width, width, experts.weights, after, error))


def _solve_mlp(
    config: ModularDecompositionConfig, statistics: BlockStatistics, down: Tensor
) -> mathematics.NystromSolutions:
    gram, statistics.mlp = statistics.mlp, None  # a gigabyte on a 7B model: let go of as soon as it has served
    assert gram is not None
    return _solve(config, gram, down, statistics.drift)


def _solve(
    config: ModularDecompositionConfig,
    gram: Float[Tensor, "width width"],
    down: Float[Tensor, "d_model width"],
    lost: Float[Tensor, "width d_model"] | None,
) -> mathematics.NystromSolutions:
    """Order the channels and factorise, once for all widths that a block may be tried at."""
    wide = down.T.to(gram)
    if config.channel_score == "ridge_leverage":
        scores = mathematics.ridge_leverage_scores(gram, config.ridge)
    else:
        scores = mathematics.output_error_scores(gram, wide, config.ridge)
    drift = None if lost is None else DRIFT_SHARE * lost.to(gram)
    order = scores.argsort(descending=True, stable=True)
    gram, wide = gram[order[:, None], order], wide[order]
    drift = None if drift is None else drift[order]
    return mathematics.NystromSolutions.of_ordered(order, gram, wide, config.ridge, drift)


def _compress_attention(
    anatomy: ModelAnatomy,
    config: ModularDecompositionConfig,
    block: int,
    which: int,
    sizes: dict[Kind, int],
    statistics: BlockStatistics,
    result: BlockResult,
) -> None:
    path, heads = anatomy.attention_path(block, which=which), Heads.of_block(anatomy, block, which)
    seen = statistics.attentions[which]
    dense, head_dim = anatomy.model.get_submodule(path), heads.head_dim
    query_key_dim = sizes.get("query_key", head_dim)
    value_dim = sizes.get("value_output", head_dim)
    new = DecomposedAttention(
        dense, anatomy.attention, query_key_dim, value_dim, output_bias=heads.folds_value_bias(value_dim < head_dim)
    )
    parts: Parts = {role: heads.weights(role) for role in (*INPUTS, "output")}
    others: dict[str, Tensor] = {}
    errors: dict[Kind, float] = {}
    if "query_key" in sizes:
        errors["query_key"] = _reduce_query_key(dense, heads, new, seen, parts, others)
    if "value_output" in sizes:
        errors["value_output"] = _reduce_value_output(config, heads, value_dim, seen, parts)
    new.fill(parts, others)
    new.train(dense.training)
    result.modules[path] = new
    if anatomy.attention.output_outside and "value_output" in sizes:
        weight, bias = parts["output"]
        reference = dense_rows(heads.projections["output"])
        result.modules[anatomy.attention_path(block, "output")] = ResizedLinear.from_tensors(
            weight.to(reference), None if bias is None else bias.to(reference), heads.num_heads
        )
    for kind, error in errors.items():
        size = query_key_dim if kind == "query_key" else value_dim
        weights = heads.weight_count(kind), heads.weight_count(kind, size)
        result.rows.append(ModuleReport(block, path, kind, head_dim, size, *weights, error))


def _reduce_query_key(
    dense: nn.Module,
    heads: Heads,
    new: DecomposedAttention,
    statistics: AttentionStatistics,
    parts: Parts,
    others: dict[str, Tensor],
) -> float:
    """Replace query and key by the smaller ones; returns the lost share of the logits' energy."""
    record, head_dim, rank = new.record, new.head_dim, new.query_key_dim
    query_gram, key_gram = statistics.query, statistics.key
    assert query_gram is not None and key_gram is not None
    assert statistics.key_sum is not None and statistics.key_tokens is not None
    if not new.uses_rotary:
        mean = statistics.key_sum.to(key_gram) / statistics.key_tokens
        centred = key_gram - statistics.key_tokens * mean[:, :, None] * mean[:, None, :]
        first, second = mathematics.query_key_svd(query_gram, centred, rank)
        identity = torch.eye(head_dim, dtype=first.dtype, device=first.device)
        lost = _logit_energy(query_gram, centred, identity - first @ second.mT)
        parts["query"] = _transformed(*parts["query"], first)
        parts["key"] = _transformed(*parts["key"], second)
        return lost / max(_logit_energy(query_gram, centred, identity), 1e-300)

    if rank == head_dim:
        return 0.0
    query_energy, key_energy = (gram.diagonal(dim1=-2, dim2=-1) for gram in (query_gram, key_gram))
    scores = mathematics.rotary_pair_scores(query_energy, key_energy)
    pairs = mathematics.top_indices(scores, rank // 2)
    dims = mathematics.rotary_pairs_to_dims(pairs, head_dim)
    others["rotary_pairs"] = pairs
    for role in ("query", "key"):
        weight, bias = parts[role]
        count = heads.count(role)
        index = dims.repeat_interleave(count // len(dims), dim=0).to(weight.device)
        rows = (index + head_dim * torch.arange(count, device=weight.device)[:, None]).reshape(-1)
        parts[role] = weight[rows], None if bias is None else bias[rows]
    for norm, energy in ((record.query_norm, query_energy), (record.key_norm, key_energy)):
        if norm is not None:
            weight = getattr(dense, norm).weight.detach().to(energy) + record.norm_offset
            others[f"{norm}.weight"] = _norm_weight(weight, energy, dims)
    kept = scores.gather(-1, pairs).sum()
    return float(1 - kept / scores.sum()) if scores.sum() > 0 else 0.0


def _norm_weight(weight: Tensor, energy: Tensor, dims: Tensor) -> Tensor:
    """Norm weights of the kept dimensions, (kv_heads, kept), times the factor that restores the dense norm's scale.

    The norm over fewer dimensions divides by their own root mean square; the factor is its expected ratio to that of
    all dimensions, measured after the norm and with the weight taken out.
    """
    unweighted = energy / weight.square().clamp_min(torch.finfo(weight.dtype).tiny)
    kept = unweighted.gather(-1, dims).mean(dim=-1, keepdim=True)
    ratio = kept / unweighted.mean(dim=-1, keepdim=True)
    return weight[dims] * ratio.sqrt()


def _reduce_value_output(
    config: ModularDecompositionConfig, heads: Heads, rank: int, statistics: AttentionStatistics, parts: Parts
) -> float:
    """Replace value and output by the smaller ones; returns the relative error of the heads' outputs."""
    gram, head_dim, groups = statistics.value, heads.head_dim, heads.groups
    assert gram is not None
    (value, value_bias), (output, output_bias) = parts["value"], parts["output"]
    # (kv_heads, d, group · d_model): the outputs of a group's query heads side by side.
    blocks = output.T.to(gram).reshape(heads.num_key_value_heads, groups, head_dim, -1)
    outputs = blocks.permute(0, 2, 1, 3).flatten(start_dim=2)
    if config.value_output == "joint":
        encode, decode = mathematics.value_output_joint(gram, outputs, rank)
    else:
        encode, decode = mathematics.value_output_per_head(gram, rank)
    weight, bias = _transformed(value, value_bias, encode)
    small = (decode[:, None] @ blocks).flatten(end_dim=2)
    if value_bias is not None and rank < head_dim:
        # Attention weights of a token sum to one, so a constant added to all values reaches the output unchanged.
        per_query_head = value_bias.to(gram).reshape(-1, 1, head_dim).expand(-1, groups, -1).reshape(-1)
        folded = output.to(gram) @ per_query_head
        bias, output_bias = None, folded if output_bias is None else folded + output_bias.to(gram)
    parts["value"], parts["output"] = (weight, bias), (small.T, output_bias)
    lost = outputs - encode @ decode @ outputs
    energy = float((outputs * (gram @ outputs)).sum())
    return float((lost * (gram @ lost)).sum()) / energy if energy > 0 else 0.0


def _logit_energy(query_gram: Tensor, key_gram: Tensor, middle: Tensor) -> float:
    """`Σ (qᵀ M k)²` over independent tokens."""
    return float((middle.mT @ query_gram @ middle @ key_gram).diagonal(dim1=-2, dim2=-1).sum())


def _transformed(
    weight: Float[Tensor, "rows columns"], bias: Float[Tensor, " rows"] | None, basis: Float[Tensor, "kv_heads d rank"]
) -> tuple[Float[Tensor, "new_rows columns"], Float[Tensor, " new_rows"] | None]:
    """`q' = q · basis` with one basis a key/value head, as new weights and bias of the projection."""
    heads = weight.shape[0] // basis.shape[1]
    rotation = basis.mT.repeat_interleave(heads // len(basis), dim=0)
    turned = (rotation @ weight.to(basis).reshape(heads, basis.shape[1], -1)).flatten(end_dim=1)
    if bias is None:
        return turned, None
    return turned, (rotation @ bias.to(basis).reshape(heads, basis.shape[1], 1)).flatten()


def _matrix(module: Any) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"] | None]:
    """Weight, a row an output, and bias without gradients."""
    return dense_rows(module), None if module.bias is None else module.bias.detach()


def _resized(dense: nn.Module, weight: Tensor, bias: Tensor | None, groups: int = 1) -> ResizedLinear | ResizedConv1D:
    """A layer with another weight (rows, columns) in place of a dense one."""
    if isinstance(dense, Conv1D):
        return ResizedConv1D.from_tensors(weight, bias)
    return ResizedLinear.from_tensors(weight, bias, groups)
