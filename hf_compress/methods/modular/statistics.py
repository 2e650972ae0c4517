"""What modular decomposition measures of a block: Grams of the MLP's inner channels and of the heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ...anatomy import ModelAnatomy
from ...calibration.statistics import gram, head_grams
from ...engine.blocks import real_tokens
from ...engine.experts import ExpertStatistics, collect_experts
from .configuration import Kind
from .heads import Heads, Role
from .mathematics import NystromSolutions


@dataclass
class AttentionStatistics:
    """Sums of one attention over calibration tokens, float64.

    Args:
        query: Gram of the queries, summed over the heads that share a key head, (kv_heads, d, d). After the norm,
            before the rotary embedding, with bias.
        key: the same of the keys; `key_sum` their sum, (kv_heads, d), over `key_tokens` tokens.
        value: Gram of the values without bias, (kv_heads, d, d).
    """

    query: Float[Tensor, "heads d d"] | None = None
    key: Float[Tensor, "heads d d"] | None = None
    key_sum: Float[Tensor, "heads d"] | None = None
    key_tokens: Int64[Tensor, ""] | None = None
    value: Float[Tensor, "heads d d"] | None = None


@dataclass
class BlockStatistics:
    """Sums over calibration tokens, float64.

    Args:
        mlp: Gram of the down projection's inputs, (width, width).
        drift: in sequential order, `Σ Hᵀ (Y_dense − Y)`: what the down projection would have to add to bring the
            residual stream back to that of the dense model, (width, d_model).
        attentions: of the block's attentions, in the order of `ModelAnatomy.attention_path`.
        experts: of a block with experts, in place of `mlp`.
        solutions: what the MLP's statistics were solved to.
        feeds_residual: whether the down projection's output is added to the residual stream as it is.
    """

    mlp: Float[Tensor, "width width"] | None = None
    drift: Float[Tensor, "width d_model"] | None = None
    attentions: list[AttentionStatistics] = field(default_factory=list)
    experts: ExpertStatistics | None = None
    solutions: NystromSolutions | None = None
    feeds_residual: bool = False
    _inner: Float[Tensor, "tokens width"] | None = None

    def sums(self) -> dict[str, Tensor]:
        """Everything that adds up over calibration data, by name."""
        found: dict[str, Tensor | None] = {"mlp": self.mlp, "drift": self.drift}
        for number, attention in enumerate(self.attentions):
            found.update({f"{number}.{name}": tensor for name, tensor in vars(attention).items()})
        if self.experts is not None:
            found.update({f"experts.{name}": tensor for name, tensor in self.experts.sums().items()})
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def add_inner(self, inner: Float[Tensor, "tokens width"]) -> None:
        """The inputs of the down projection for one batch."""
        _add(self, "mlp", gram(inner))
        self._inner = inner if self.feeds_residual else None

    def observe_drift(self, output: Tensor, dense_output: Tensor) -> None:
        """After a batch: its output of the block beside the dense model's."""
        if self._inner is not None:
            drift = real_tokens(dense_output.float() - output.float())
            _add(self, "drift", (self._inner.float().T @ drift).double())
            self._inner = None


def _add(sums: BlockStatistics | AttentionStatistics, name: str, value: Tensor) -> None:
    before = getattr(sums, name)
    setattr(sums, name, value if before is None else before.add_(value))


@contextmanager
def collect_statistics(anatomy: ModelAnatomy, block: int, kinds: set[Kind]) -> Iterator[BlockStatistics]:
    """Attach hooks to the projections of a block for the kinds asked for; padding tokens are left out."""
    statistics = BlockStatistics(feeds_residual=anatomy.mlp_feeds_residual(block))
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def on_output(module: nn.Module, add: Callable[[Tensor], None]) -> None:
        handles.append(module.register_forward_hook(lambda _module, _inputs, output: add(output.detach())))

    experts = anatomy.experts(block) if "mlp" in kinds else None
    if "mlp" in kinds and experts is None:
        down = anatomy.model.get_submodule(anatomy.mlp_path(block, "down"))
        handles.append(
            down.register_forward_pre_hook(
                lambda _module, inputs: statistics.add_inner(real_tokens(inputs[0].detach()))
            )
        )
    for which in range(anatomy.attention_count(block)) if kinds & {"query_key", "value_output"} else ():
        statistics.attentions.append(_watch_attention(anatomy, block, which, kinds, on_output))
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        if experts is not None:
            statistics.experts = stack.enter_context(collect_experts(experts, ("inner",)))
        yield statistics


def _watch_attention(
    anatomy: ModelAnatomy,
    block: int,
    which: int,
    kinds: set[Kind],
    on_output: Callable[[nn.Module, Callable[[Tensor], None]], None],
) -> AttentionStatistics:
    """Sums that grow with the outputs of an attention's projections, which `on_output` hands out."""
    sums, layout = AttentionStatistics(), Heads.of_block(anatomy, block, which)
    record, path = anatomy.attention, anatomy.attention_path(block, which=which)

    def heads(role: Role, output: Tensor, norm: str | None = None) -> Float[Tensor, "tokens heads d"]:
        rows: Tensor = layout.outputs(role, real_tokens(output)).unflatten(-1, (-1, layout.head_dim))
        # Families lay heads out differently when they call their norm; here it always sees (tokens, heads, d).
        if norm is None:
            return rows
        normed: Tensor = anatomy.model.get_submodule(f"{path}.{norm}")(rows)
        return normed.detach()

    def add_query(output: Tensor) -> None:
        rows = heads("query", output, record.query_norm)
        _add(sums, "query", head_grams(rows).unflatten(0, (layout.num_key_value_heads, -1)).sum(dim=1))

    def add_key(output: Tensor) -> None:
        rows = heads("key", output, record.key_norm)
        _add(sums, "key", head_grams(rows))
        _add(sums, "key_sum", rows.float().sum(dim=0).cpu().double())
        _add(sums, "key_tokens", torch.tensor(len(rows)))

    def add_value(output: Tensor) -> None:
        rows, bias = heads("value", output), layout.bias("value")
        _add(sums, "value", head_grams(rows if bias is None else rows - bias.view(rows.shape[1:])))

    if "query_key" in kinds:
        on_output(layout.projections["query"], add_query)
        on_output(layout.projections["key"], add_key)
    if "value_output" in kinds:
        on_output(layout.projections["value"], add_value)
    return sums
