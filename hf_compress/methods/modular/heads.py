"""Where the heads of a dense attention lie in its projections, as its record says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...anatomy import AttentionAnatomy, ModelAnatomy, dense_rows, read_attribute

Role = Literal["query", "key", "value", "output"]
# Those that a fused projection gives.
INPUTS: tuple[Role, ...] = ("query", "key", "value")


@dataclass(frozen=True)
class Heads:
    """The heads of one attention.

    Args:
        record: what its family's record says.
        projections: the module of every role; a fused one under three of them.
        head_dim: the size of a head.
        num_heads, num_key_value_heads: how many there are.
        turned: dimensions of a head that a rotary embedding turns.
    """

    record: AttentionAnatomy
    projections: dict[Role, nn.Module]
    head_dim: int
    num_heads: int
    num_key_value_heads: int
    turned: int = 0

    @classmethod
    def of(cls, module: nn.Module, record: AttentionAnatomy, output: nn.Module | None = None) -> Heads:
        """Of a dense attention; `output` where its output projection lies outside of it."""
        projections: dict[Role, nn.Module] = {
            role: read_attribute(module, getattr(record, role))
            for role in (*INPUTS, "output")
            if role != "output" or not record.output_outside
        }
        if output is not None:
            projections["output"] = output
        head_dim = int(read_attribute(module, record.head_dim))
        rows = len(dense_rows(projections["query"]))
        if record.fused is None:
            heads, key_heads = rows // head_dim, len(dense_rows(projections["key"])) // head_dim
        else:
            heads = dense_rows(projections["output"]).shape[1] // head_dim
            key_heads = (rows // head_dim - heads) // 2
        config = getattr(module, "config", None)
        turned = int(head_dim * turned_share(config)) if record.rotary else 0
        return cls(record, projections, head_dim, heads, key_heads, turned)

    @classmethod
    def of_block(cls, anatomy: ModelAnatomy, block: int, which: int = 0) -> Heads:
        """Of one of a block's attentions, see `ModelAnatomy.attention_path`."""
        get = anatomy.model.get_submodule
        module, output = (get(anatomy.attention_path(block, role, which)) for role in (None, "output"))
        return cls.of(module, anatomy.attention, output)

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_key_value_heads

    @property
    def hidden(self) -> int:
        """The size of the attention's input."""
        return int(dense_rows(self.projections["query"]).shape[1])

    def count(self, role: Role) -> int:
        return self.num_heads if role in ("query", "output") else self.num_key_value_heads

    def rows(self, role: Role) -> Int64[Tensor, " rows"] | None:
        """Which outputs of a projection are a role's, those that turn together in two halves; `None` for all of them
        as they are."""
        if role == "output":
            return None
        if self.record.rotary == "pairs" and role != "value":
            order = torch.arange(self.head_dim)
            order[: self.turned] = order[: self.turned].view(-1, 2).T.flatten()
            heads = self.head_dim * torch.arange(self.count(role))
            return (heads[:, None] + order).flatten()
        if self.record.fused is None:
            return None
        sizes = [self.count(part) * self.head_dim for part in INPUTS]
        start, place = sum(sizes[: INPUTS.index(role)]), torch.arange(sum(sizes))
        if self.record.fused == "side_by_side":
            return place[start : start + sizes[INPUTS.index(role)]]
        by_head = place.view(self.num_key_value_heads, self.groups + 2, self.head_dim)
        first, last = {"query": (0, self.groups), "key": (self.groups, -1), "value": (-1, None)}[role]
        return by_head[:, first:last].flatten()

    def weights(self, role: Role) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"] | None]:
        """Weight and bias of a role without gradients, a row an output."""
        weight, rows = dense_rows(self.projections[role]), self.rows(role)
        return weight if rows is None else weight[rows.to(weight.device)], self.bias(role)

    def bias(self, role: Role) -> Float[Tensor, " rows"] | None:
        projection: Any = self.projections[role]
        if projection.bias is None:
            return None
        bias: Tensor = projection.bias.detach()
        rows = self.rows(role)
        return bias if rows is None else bias[rows.to(bias.device)]

    def outputs(self, role: Role, output: Float[Tensor, "*place n"]) -> Float[Tensor, "*place rows"]:
        """The part of a projection's output that is a role's."""
        rows = self.rows(role)
        return output if rows is None else output[..., rows.to(output.device)]

    def state(self, matrices: dict[Role, Tensor], biases: dict[Role, Tensor | None]) -> dict[str, Tensor]:
        """The state dict of the dense projections from the roles' weights and biases."""
        state: dict[str, Tensor] = {}
        for role, matrix in matrices.items():
            name, rows, bias = getattr(self.record, role), self.rows(role), biases[role]
            projection: Any = self.projections[role]
            if rows is None:
                state[f"{name}.weight"] = matrix
                state |= {} if bias is None else {f"{name}.bias": bias}
            else:
                rows = rows.to(matrix.device)
                whole = state.setdefault(f"{name}.weight", matrix.new_empty(dense_rows(projection).shape))
                whole[rows] = matrix
                if bias is not None:
                    state.setdefault(f"{name}.bias", bias.new_empty(len(whole)))[rows] = bias
        transposed = {getattr(self.record, role) for role in matrices if isinstance(self.projections[role], Conv1D)}
        for name in transposed:
            state[f"{name}.weight"] = state[f"{name}.weight"].T
        return state

    def has_bias(self, role: Role) -> bool:
        projection: Any = self.projections[role]
        return projection.bias is not None

    def folds_value_bias(self, reduced: bool) -> bool:
        """Whether the value's bias becomes part of the output's: exact, and needed once the value is `reduced`."""
        return reduced and self.has_bias("value")

    def weight_count(self, kind: str, size: int | None = None) -> int:
        """Weights of a kind's two projections, with heads of `size`."""
        size = self.head_dim if size is None else size
        if kind == "query_key":
            return (self.num_heads + self.num_key_value_heads) * size * self.hidden
        outer = len(dense_rows(self.projections["output"]))
        return self.num_key_value_heads * size * self.hidden + self.num_heads * size * outer


def turned_share(config: Any) -> float:
    """The share of a head's dimensions that the rotary embedding turns, the least over a model's kinds of layers."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    return min(float(kind.get("partial_rotary_factor") or 1.0) for kind in kinds)
