"""From a block's statistics and its new sizes to its new modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...anatomy import ModelAnatomy
from ...engine.report import ModuleReport
from ...engine.session import BlockResult, weights_of
from ...errors import NumericalError
from ...layout import ResizedLinear
from . import mathematics
from .configuration import Kind, ModularDecompositionConfig
from .modules import DecomposedAttention
from .statistics import BlockStatistics

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
    if "mlp" in sizes:
        path = anatomy.mlp_path(block, "down")
        with naming(path):
            _compress_mlp(anatomy, config, block, sizes["mlp"], statistics, result)
    if "query_key" in sizes or "value_output" in sizes:
        path = anatomy.attention_path(block)
        with naming(path):
            _compress_attention(anatomy, config, block, sizes, statistics, result)
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
    down_path = anatomy.mlp_path(block, "down")
    down, down_bias = weights_of(_linear(get(down_path)))
    solutions = statistics.solutions
    if solutions is None:
        solutions = statistics.solutions = _solve_mlp(config, statistics, down)
    kept, refitted = solutions.keep(width)
    error = float(solutions.errors[width])
    new = {down_path: ResizedLinear.from_tensors(refitted.T.to(down), down_bias)}
    before = down.numel()
    for role in ("up", "gate") if anatomy.mlp.gate else ("up",):
        path = anatomy.mlp_path(block, role)
        weight, bias = weights_of(_linear(get(path)))
        rows = kept.to(weight.device)
        new[path] = ResizedLinear.from_tensors(weight[rows], None if bias is None else bias[rows])
        before += weight.numel()
    result.modules.update(new)
    after = sum(module.weight.numel() for module in new.values())
    result.rows.append(
        ModuleReport(block, down_path.rpartition(".")[0], "mlp", down.shape[1], width, before, after, error)
    )


def _solve_mlp(
    config: ModularDecompositionConfig, statistics: BlockStatistics, down: Tensor
) -> mathematics.NystromSolutions:
    """Order the channels and factorise, once for all widths that a block may be tried at."""
    gram, statistics.mlp = statistics.mlp, None  # a gigabyte on a 7B model: let go of as soon as it has served
    assert gram is not None
    wide = down.T.to(gram)
    if config.channel_score == "ridge_leverage":
        scores = mathematics.ridge_leverage_scores(gram, config.ridge)
    else:
        scores = mathematics.output_error_scores(gram, wide, config.ridge)
    drift = None if statistics.drift is None else DRIFT_SHARE * statistics.drift.to(gram)
    order = scores.argsort(descending=True, stable=True)
    gram, wide = gram[order[:, None], order], wide[order]
    drift = None if drift is None else drift[order]
    return mathematics.NystromSolutions.of_ordered(order, gram, wide, config.ridge, drift)


def _compress_attention(
    anatomy: ModelAnatomy,
    config: ModularDecompositionConfig,
    block: int,
    sizes: dict[Kind, int],
    statistics: BlockStatistics,
    result: BlockResult,
) -> None:
    record, path = anatomy.attention, anatomy.attention_path(block)
    dense = anatomy.model.get_submodule(path)
    head_dim = int(dense.head_dim)
    query_key_dim = sizes.get("query_key", head_dim)
    value_dim = sizes.get("value_output", head_dim)
    folds_bias = value_dim < head_dim and _linear(getattr(dense, record.value)).bias is not None
    new = DecomposedAttention(dense, record, query_key_dim, value_dim, output_bias=folds_bias)
    tensors: dict[str, Tensor] = {}
    if "query_key" not in sizes:
        tensors |= _copied(dense, record.query, record.key)
    else:
        error = _reduce_query_key(dense, new, statistics, tensors)
        result.rows.append(_row(block, path, "query_key", head_dim, query_key_dim, dense, new, error))
    if "value_output" not in sizes:
        tensors |= _copied(dense, record.value, record.output)
    else:
        error = _reduce_value_output(config, dense, new, statistics, tensors)
        result.rows.append(_row(block, path, "value_output", head_dim, value_dim, dense, new, error))
    own = dict(new.named_parameters()) | dict(new.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    new.train(dense.training)
    result.modules[path] = new


def _reduce_query_key(
    dense: nn.Module, new: DecomposedAttention, statistics: BlockStatistics, tensors: dict[str, Tensor]
) -> float:
    """Fill in the tensors of the smaller query and key; returns the lost share of the logits' energy."""
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
        for name, basis in ((record.query, first), (record.key, second)):
            _transform_rows(_linear(getattr(dense, name)), basis, new, name, tensors)
        return lost / max(_logit_energy(query_gram, centred, identity), 1e-300)

    if rank == head_dim:
        tensors |= _copied(dense, record.query, record.key)
        return 0.0
    query_energy, key_energy = (gram.diagonal(dim1=-2, dim2=-1) for gram in (query_gram, key_gram))
    scores = mathematics.rotary_pair_scores(query_energy, key_energy)
    pairs = mathematics.top_indices(scores, rank // 2)
    dims = mathematics.rotary_pairs_to_dims(pairs, head_dim)
    tensors["rotary_pairs"] = pairs
    for name in (record.query, record.key):
        weight, bias = weights_of(_linear(getattr(dense, name)))
        heads = weight.shape[0] // head_dim
        index = dims.repeat_interleave(heads // len(dims), dim=0).to(weight.device)
        rows = (index + head_dim * torch.arange(heads, device=weight.device)[:, None]).reshape(-1)
        tensors[f"{name}.weight"] = weight[rows]
        if bias is not None:
            tensors[f"{name}.bias"] = bias[rows]
    for norm, energy in ((record.query_norm, query_energy), (record.key_norm, key_energy)):
        if norm is not None:
            weight = getattr(dense, norm).weight.detach().to(energy) + record.norm_offset
            tensors[f"{norm}.weight"] = _norm_weight(weight, energy, dims)
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
    config: ModularDecompositionConfig,
    dense: nn.Module,
    new: DecomposedAttention,
    statistics: BlockStatistics,
    tensors: dict[str, Tensor],
) -> float:
    """Fill in the tensors of the smaller value and output; returns the relative error of the heads' outputs."""
    record, head_dim, rank = new.record, new.head_dim, new.value_dim
    gram = statistics.value
    assert gram is not None
    value, value_bias = weights_of(_linear(getattr(dense, record.value)))
    output, output_bias = weights_of(_linear(getattr(dense, record.output)))
    groups = new.num_key_value_groups
    # (kv_heads, d, group · d_model): the outputs of a group's query heads side by side.
    blocks = output.T.to(gram).reshape(new.num_key_value_heads, groups, head_dim, -1)
    outputs = blocks.permute(0, 2, 1, 3).flatten(start_dim=2)
    if config.value_output == "joint":
        encode, decode = mathematics.value_output_joint(gram, outputs, rank)
    else:
        encode, decode = mathematics.value_output_per_head(gram, rank)
    per_head = value.to(gram).reshape(new.num_key_value_heads, head_dim, -1)
    tensors[f"{record.value}.weight"] = (encode.mT @ per_head).flatten(end_dim=1)
    small = (decode[:, None] @ blocks).flatten(end_dim=2)
    tensors[f"{record.output}.weight"] = small.T
    if value_bias is not None and rank == head_dim:
        tensors[f"{record.value}.bias"] = (encode.mT @ value_bias.to(gram).reshape(-1, head_dim, 1)).flatten()
        value_bias = None
    if value_bias is not None:
        # Attention weights of a token sum to one, so a constant added to all values reaches the output unchanged.
        per_query_head = value_bias.to(gram).reshape(-1, 1, head_dim).expand(-1, groups, -1).reshape(-1)
        folded = output.to(gram) @ per_query_head
        tensors[f"{record.output}.bias"] = folded if output_bias is None else folded + output_bias.to(gram)
    elif output_bias is not None:
        tensors[f"{record.output}.bias"] = output_bias
    lost = outputs - encode @ decode @ outputs
    energy = float((outputs * (gram @ outputs)).sum())
    return float((lost * (gram @ lost)).sum()) / energy if energy > 0 else 0.0


def _logit_energy(query_gram: Tensor, key_gram: Tensor, middle: Tensor) -> float:
    """`Σ (qᵀ M k)²` over independent tokens."""
    return float((middle.mT @ query_gram @ middle @ key_gram).diagonal(dim1=-2, dim2=-1).sum())


def _transform_rows(
    projection: nn.Linear, basis: Tensor, new: DecomposedAttention, name: str, tensors: dict[str, Tensor]
) -> None:
    """`q' = q · basis` with one basis a key/value head, as new weights and bias of the projection."""
    weight, bias = weights_of(projection)
    heads = weight.shape[0] // new.head_dim
    rotation = basis.mT.repeat_interleave(heads // len(basis), dim=0)
    tensors[f"{name}.weight"] = (rotation @ weight.to(basis).reshape(heads, new.head_dim, -1)).flatten(end_dim=1)
    if bias is not None:
        tensors[f"{name}.bias"] = (rotation @ bias.to(basis).reshape(heads, new.head_dim, 1)).flatten()


def _copied(dense: nn.Module, *names: str) -> dict[str, Tensor]:
    """The tensors of projections that stay as they are."""
    return {f"{name}.{key}": tensor for name in names for key, tensor in getattr(dense, name).state_dict().items()}


def _row(
    block: int,
    path: str,
    kind: Kind,
    before: int,
    after: int,
    dense: nn.Module,
    new: DecomposedAttention,
    error: float,
) -> ModuleReport:
    record = new.record
    names = (record.query, record.key) if kind == "query_key" else (record.value, record.output)
    count = [sum(getattr(module, name).weight.numel() for name in names) for module in (dense, new)]
    return ModuleReport(block, path, kind, before, after, count[0], count[1], error)


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module
