"""What modular decomposition measures of a block: Grams of the MLP's inner channels and of the heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

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

# The fields of `BlockStatistics` that are sums over calibration data.
SUMS = ("mlp", "query", "key", "key_sum", "key_tokens", "value", "drift")


@dataclass
class BlockStatistics:
    """Sums over calibration tokens, float64.

    Args:
        mlp: Gram of the down projection's inputs, (width, width).
        query: Gram of the queries, summed over the heads that share a key head, (kv_heads, d, d). After the norm,
            before the rotary embedding, with bias.
        key: the same of the keys; `key_sum` their sum, (kv_heads, d), over `key_tokens` tokens.
        value: Gram of the values without bias, (kv_heads, d, d).
        drift: in sequential order, `Σ Hᵀ (Y_dense − Y)`: what the down projection would have to add to bring the
            residual stream back to that of the dense model, (width, d_model).
        experts: of a block with experts, in place of `mlp`.
        solutions: what the MLP's statistics were solved to.
        feeds_residual: whether the down projection's output is added to the residual stream as it is.
    """

    mlp: Float[Tensor, "width width"] | None = None
    query: Float[Tensor, "heads d d"] | None = None
    key: Float[Tensor, "heads d d"] | None = None
    key_sum: Float[Tensor, "heads d"] | None = None
    value: Float[Tensor, "heads d d"] | None = None
    drift: Float[Tensor, "width d_model"] | None = None
    key_tokens: Int64[Tensor, ""] | None = None
    experts: ExpertStatistics | None = None
    solutions: NystromSolutions | None = None
    feeds_residual: bool = False
    _inner: Float[Tensor, "tokens width"] | None = None

    def add(self, name: str, value: Tensor) -> None:
        before = getattr(self, name)
        setattr(self, name, value if before is None else before.add_(value))

    def sums(self) -> dict[str, Tensor]:
        """Everything that adds up over calibration data, by name."""
        found = {name: getattr(self, name) for name in SUMS}
        found = {name: tensor for name, tensor in found.items() if tensor is not None}
        if self.experts is not None:
            found.update({f"experts.{name}": tensor for name, tensor in self.experts.sums().items()})
        return found

    def add_inner(self, inner: Float[Tensor, "tokens width"]) -> None:
        """The inputs of the down projection for one batch."""
        self.add("mlp", gram(inner))
        self._inner = inner if self.feeds_residual else None

    def observe_drift(self, output: Tensor, dense_output: Tensor) -> None:
        """After a batch: its output of the block beside the dense model's."""
        if self._inner is not None:
            drift = real_tokens(dense_output.float() - output.float())
            self.add("drift", (self._inner.float().T @ drift).double())
            self._inner = None


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
    if kinds & {"query_key", "value_output"}:
        record, path = anatomy.attention, anatomy.attention_path(block)
        layout = Heads.of_block(anatomy, block)

        def heads(role: Role, output: Tensor, norm: str | None = None) -> Float[Tensor, "tokens heads d"]:
            rows: Tensor = layout.outputs(role, real_tokens(output)).unflatten(-1, (-1, layout.head_dim))
            # Families lay heads out differently when they call their norm; here it always sees (tokens, heads, d).
            if norm is None:
                return rows
            normed: Tensor = anatomy.model.get_submodule(f"{path}.{norm}")(rows)
            return normed.detach()

        def add_query(output: Tensor) -> None:
            rows = heads("query", output, record.query_norm)
            statistics.add("query", head_grams(rows).unflatten(0, (layout.num_key_value_heads, -1)).sum(dim=1))

        def add_key(output: Tensor) -> None:
            rows = heads("key", output, record.key_norm)
            statistics.add("key", head_grams(rows))
            statistics.add("key_sum", rows.float().sum(dim=0).cpu().double())
            statistics.add("key_tokens", torch.tensor(len(rows)))

        def add_value(output: Tensor) -> None:
            rows, bias = heads("value", output), layout.bias("value")
            statistics.add("value", head_grams(rows if bias is None else rows - bias.view(rows.shape[1:])))

        if "query_key" in kinds:
            on_output(layout.projections["query"], add_query)
            on_output(layout.projections["key"], add_key)
        if "value_output" in kinds:
            on_output(layout.projections["value"], add_value)
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        if experts is not None:
            statistics.experts = stack.enter_context(collect_experts(experts, ("inner",)))
        yield statistics
