"""Attention with fewer query/key and value dimensions a head."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward as grouped_eager_attention

from ...anatomy import AttentionAnatomy, dense_rows, find_record, read_attribute
from ...checked import short
from ...errors import CompressionError
from ...layout import checked_size, register_module_type
from .heads import INPUTS, Heads, Role, turned_share

# Fused attention kernels want equal head sizes in multiples of this.
KERNEL_MULTIPLE = 8
# The least that flex_attention takes on a GPU.
FLEX_MINIMUM = 16


class HeadRMSNorm(nn.Module):
    """RMS norm over the kept dimensions of a head, with one weight a key/value head.

    The weight already holds the family's offset and the factor that makes up for the dropped dimensions' share of the
    mean square.
    """

    def __init__(self, heads: int, dim: int, epsilon: float, **tensor_options: Any) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(heads, dim, **tensor_options))

    def forward(self, states: Float[Tensor, "batch tokens heads group dim"]) -> Float[Tensor, "..."]:
        wide = states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return normed.to(states.dtype) * self.weight[:, None, :]


@register_module_type
class DecomposedAttention(nn.Module):
    """The attention of a block after modular decomposition.

    Query and key keep `query_key_dim` dimensions a head, value and output `value_dim`. Everything between projection
    and output stays the family's own: the attention function comes from Transformers' attention interface, the softmax
    scale from the dense module, the key/value cache holds the small heads unpadded. Where the two head sizes differ,
    the smaller is padded with zeros inside the call, because fused kernels are many times faster on equal sizes.
    """

    layout_type: ClassVar[str] = "attention"
    recorded_outputs: ClassVar[tuple[str, ...]] = ("attentions", "cross_attentions")
    rotary_pairs: Tensor | None

    def __init__(
        self, dense: nn.Module, record: AttentionAnatomy, query_key_dim: int, value_dim: int, output_bias: bool
    ) -> None:
        super().__init__()
        heads = Heads.of(dense, record)
        self.record, self.dense_class = record, type(dense)
        attributes: Any = dense
        self.config: Any = attributes.config
        self.layer_idx = getattr(dense, "layer_idx", None)
        self.head_dim, self.num_heads = heads.head_dim, heads.num_heads
        self.num_key_value_heads, self.num_key_value_groups = heads.num_key_value_heads, heads.groups
        self.query_key_dim = query_key_dim
        self.value_dim = value_dim
        self.scaling = read_attribute(dense, record.scaling)
        self.attention_dropout = float(read_attribute(dense, record.dropout))
        self.output_dropout = read_attribute(dense, record.output_dropout) if record.output_dropout else 0.0
        self.output_bias = output_bias
        self.is_causal = getattr(dense, "is_causal", True)
        self.softcap = read_attribute(dense, record.softcap) if record.softcap else None
        self.sliding_window = read_attribute(dense, record.sliding_window) if record.sliding_window else None
        self.uses_rotary = record.rotary is not None and (
            record.rotary_flag is None or bool(read_attribute(dense, record.rotary_flag))
        )
        # Not every dense eager function repeats key/value heads; the family's own does what its masks expect.
        home = sys.modules[type(dense).__module__]
        self.eager: Callable[..., Any] = getattr(home, "eager_attention_forward", grouped_eager_attention)

        reference: Any = heads.projections["query"]
        options = {"device": reference.weight.device, "dtype": reference.weight.dtype}

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            module: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, **options)
            return module

        sizes = self._input_sizes()
        if record.fused is not None:
            setattr(self, record.query, linear(heads.hidden, sum(sizes.values()), heads.has_bias("query")))
        for role, size in sizes.items() if record.fused is None else ():
            keeps_bias = heads.has_bias(role) and not (role == "value" and output_bias)
            setattr(self, getattr(record, role), linear(heads.hidden, size, keeps_bias))
        if not record.output_outside:
            has_bias = output_bias or heads.has_bias("output")
            outer = len(dense_rows(heads.projections["output"]))
            setattr(self, record.output, linear(self.num_heads * value_dim, outer, has_bias))

        pairs = None
        if self.uses_rotary and query_key_dim < self.head_dim:
            shape = (self.num_key_value_heads, query_key_dim // 2)
            pairs = torch.zeros(shape, dtype=torch.int32, device=options["device"])
        self.register_buffer("rotary_pairs", pairs)
        for name in (record.query_norm, record.key_norm):
            if name is None:
                continue
            if query_key_dim == self.head_dim:
                setattr(self, name, read_attribute(dense, name))
            else:
                norm = read_attribute(dense, name)
                epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
                setattr(self, name, HeadRMSNorm(self.num_key_value_heads, query_key_dim, epsilon, **options))

    def _input_sizes(self) -> dict[Role, int]:
        """The outputs of query, key and value."""
        key_heads = self.num_key_value_heads
        return {
            "query": self.num_heads * self.query_key_dim,
            "key": key_heads * self.query_key_dim,
            "value": key_heads * self.value_dim,
        }

    def spec(self) -> dict[str, Any]:
        return {"query_key_dim": self.query_key_dim, "value_dim": self.value_dim, "output_bias": self.output_bias}

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> DecomposedAttention:
        family = find_record(getattr(getattr(dense, "config", None), "model_type", ""))
        if family is None or family.attention is None:
            raise ValueError(f"no anatomy record describes the attention {type(dense).__name__}")
        head_dim = int(read_attribute(dense, family.attention.head_dim))
        query_key_dim = checked_size(spec, "query_key_dim", head_dim)
        value_dim = checked_size(spec, "value_dim", head_dim)
        if not isinstance(spec["output_bias"], bool):
            raise ValueError(f"`output_bias` must be true or false, got {short(spec['output_bias'])}")
        if family.attention.rotary is not None and query_key_dim % 2:
            raise ValueError(f"`query_key_dim` must be even under a rotary embedding, got {query_key_dim}")
        if family.attention.rotary is not None and query_key_dim < head_dim and turned_share(dense.config) < 1:
            raise ValueError("`query_key_dim` must be that of the dense head where a part of it is rotary")
        if family.attention.norms_span_heads and query_key_dim < head_dim:
            raise ValueError("`query_key_dim` must be that of the dense head where a norm is over all heads")
        return cls(dense, family.attention, query_key_dim, value_dim, spec["output_bias"])

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        attention_mask: Any = None,  # of the back end's kind: a tensor, or the BlockMask of flex_attention
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        key_value_states: Float[Tensor, "batch context hidden"] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        record = self.record
        if key_value_states is not None:
            return self._attend_elsewhere(hidden_states, key_value_states, attention_mask, **kwargs)
        batch, tokens, _ = hidden_states.shape
        heads = (batch, tokens, self.num_key_value_heads)
        if record.fused is None:
            query, key, value = (getattr(self, getattr(record, role))(hidden_states) for role in INPUTS)
        else:
            query, key, value = getattr(self, record.query)(hidden_states).split([*self._input_sizes().values()], -1)
        if record.norms_span_heads:
            query, key = self._normed(query, key)
        query = query.reshape(*heads, self.num_key_value_groups, self.query_key_dim)
        key = key.reshape(*heads, 1, self.query_key_dim)
        value = value.reshape(*heads, self.value_dim)
        if not record.norms_span_heads:
            query, key = self._normed(query, key)
        if record.query_prescaled:
            query = query * self.scaling
        if self.uses_rotary:
            assert position_embeddings is not None
            cosine, sine = (self._rotation(table) for table in position_embeddings)
            # Queries and keys of a group turn alike: together they take half the kernel launches.
            turned = _rotate(torch.cat((query, key), dim=3), cosine, sine)
            query, key = turned[:, :, :, :-1], turned[:, :, :, -1:]
        query = query.reshape(batch, tokens, self.num_heads, self.query_key_dim).transpose(1, 2)
        key = key.squeeze(3).transpose(1, 2)
        value = value.transpose(1, 2)
        cache = kwargs.pop(record.cache, None)
        if cache is not None:
            # A decoder with cross attention has two.
            key, value = getattr(cache, "self_attention_cache", cache).update(key, value, self.layer_idx)
        mixed, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self._projected(mixed.flatten(start_dim=2)), weights

    def _normed(self, query: Float[Tensor, "*heads"], key: Float[Tensor, "*others"]) -> tuple[Tensor, Tensor]:
        names = self.record.query_norm, self.record.key_norm
        query, key = (
            states if name is None else getattr(self, name)(states)
            for name, states in zip(names, (query, key), strict=True)
        )
        return query, key

    def _projected(self, mixed: Float[Tensor, "batch tokens inner"]) -> Float[Tensor, "batch tokens outer"]:
        if self.record.output_outside:
            return mixed
        output: Tensor = getattr(self, self.record.output)(mixed)
        if self.output_dropout:
            output = nn.functional.dropout(output, self.output_dropout, self.training)
        return output

    def _attend_elsewhere(
        self,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        key_value_states: Float[Tensor, "batch context hidden"],
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """A decoder's attention to the encoder's output, whose keys and values are the same for every new token."""
        record = self.record
        query = getattr(self, record.query)(hidden_states)
        query = query.unflatten(-1, (self.num_heads, self.query_key_dim)).transpose(1, 2)
        if record.query_prescaled:
            query = query * self.scaling
        caches = kwargs.pop(record.cache, None)
        cache = getattr(caches, "cross_attention_cache", caches)
        known = getattr(caches, "is_updated", {})
        if cache is not None and known.get(self.layer_idx):
            layer = cache.layers[self.layer_idx]
            key, value = layer.keys, layer.values
        else:
            heads = (*key_value_states.shape[:2], self.num_key_value_heads)
            key, value = (getattr(self, getattr(record, role))(key_value_states) for role in ("key", "value"))
            key = key.reshape(*heads, self.query_key_dim).transpose(1, 2)
            value = value.reshape(*heads, self.value_dim).transpose(1, 2)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                known[self.layer_idx] = True
        mixed, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self._projected(mixed.flatten(start_dim=2)), weights

    def _rotation(self, table: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens heads 1 half"]:
        """The columns of a cosine or sine table for the kept pairs; the table has each twice."""
        columns = table[..., ::2] if self.record.rotary_table == "pairs" else table[..., : table.shape[-1] // 2]
        if self.rotary_pairs is None:
            return columns[:, :, None, None]
        if table.shape[-1] != self.head_dim:
            raise CompressionError(
                f"the model turns {table.shape[-1]} dimensions of a head, and the layout keeps pairs of "
                f"{self.head_dim}: the config and the layout belong to different models."
            )
        columns = columns.index_select(-1, self.rotary_pairs.flatten())
        gathered: Tensor = columns.unflatten(-1, self.rotary_pairs.shape)
        return gathered[:, :, :, None, :]

    def _attend(
        self,
        query: Float[Tensor, "batch heads tokens qk"],
        key: Float[Tensor, "batch kv_heads context qk"],
        value: Float[Tensor, "batch kv_heads context v"],
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch tokens heads v"], Tensor | None]:
        name: str = self.config._attn_implementation
        if self.record.softcap:
            kwargs["softcap"] = self.softcap
        if self.record.sliding_window:
            kwargs["sliding_window"] = self.sliding_window
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)
        width = self._kernel_width(name, paged=kwargs.get("cache") is not None)
        mixed, weights = attention(
            self,
            _pad(query, width),
            _pad(key, width),
            _pad(value, width),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=1.0 if self.record.query_prescaled else self.scaling,
            **kwargs,
        )
        return mixed[..., : self.value_dim], weights

    def _kernel_width(self, implementation: str, paged: bool = False) -> int | None:
        """The head size handed to the attention function; `None` leaves the sizes as they are.

        Fused kernels take equal sizes only; with unequal ones `scaled_dot_product_attention` falls back to plain
        products, slower than the padding even for a single new token. The paged cache of continuous batching, which
        the attention function fills itself, has the dense head size in every block.
        """
        if paged:
            return self.head_dim
        widest = max(self.query_key_dim, self.value_dim, FLEX_MINIMUM if implementation == "flex_attention" else 0)
        if implementation == "eager" or self.query_key_dim == self.value_dim == widest:
            return None
        return -(-widest // KERNEL_MULTIPLE) * KERNEL_MULTIPLE

    def check_tensors(self) -> None:
        """After loading: indices that point outside the head would read other memory on some devices."""
        pairs = self.rotary_pairs
        if pairs is not None and not pairs.is_meta and bool(((pairs < 0) | (pairs >= self.head_dim // 2)).any()):
            raise ValueError(f"`rotary_pairs` must lie in 0 to {self.head_dim // 2 - 1}")

    @torch.no_grad()
    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        """Projections of the dense size with zeros for what was removed: the same function.

        Raises:
            NotImplementedError: query/key norms over fewer dimensions have no dense equivalent, nor has an output bias
                where the dense class has none.
        """
        record, state = self.record, dict[str, Tensor]()
        heads = Heads.of(dense, record)
        matrices: dict[Role, Tensor] = {}
        biases: dict[Role, Tensor | None] = {}
        for role in INPUTS:
            weight, bias = self._own(role)
            size = self.value_dim if role == "value" else self.query_key_dim
            index = self._dense_rows(heads.count(role), weight.device, role)
            if bias is None and heads.has_bias(role):
                bias = weight.new_zeros(len(weight))
            matrices[role] = _scatter_rows(weight, index, heads.count(role), self.head_dim)
            biases[role] = (
                None if bias is None else _scatter_rows(bias[:, None], index, len(index), self.head_dim)[:, 0]
            )
            norm = None if role == "value" else getattr(record, f"{role}_norm")
            if norm is not None:
                if size < self.head_dim:
                    raise NotImplementedError(
                        "attention with query/key norms over fewer dimensions has no dense equivalent: a dense norm "
                        "has one weight for all heads. Keep the compressed model, or leave `query_key` out of `kinds`."
                    )
                state[f"{norm}.weight"] = getattr(self, norm).weight
        if not record.output_outside:
            output = getattr(self, record.output)
            if output.bias is not None and not heads.has_bias("output"):
                raise NotImplementedError(
                    "the value bias was folded into an output bias, which the dense class does not have. Keep the "
                    "compressed model, or leave `value_output` out of `kinds`."
                )
            columns = torch.arange(self.value_dim, device=output.weight.device).expand(self.num_heads, -1)
            matrices["output"] = _scatter_rows(output.weight.T, columns, self.num_heads, self.head_dim).T
            biases["output"] = output.bias
        state |= heads.state(matrices, biases)
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def _own(self, role: Role) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"] | None]:
        """Weight and bias of query, key or value."""
        projection = getattr(self, getattr(self.record, role))
        if self.record.fused is None:
            return projection.weight, projection.bias
        sizes, place = [*self._input_sizes().values()], INPUTS.index(role)
        bias = None if projection.bias is None else projection.bias.split(sizes)[place]
        return projection.weight.split(sizes)[place], bias

    @torch.no_grad()
    def fill(
        self,
        parts: dict[Role, tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"] | None]],
        others: dict[str, Tensor],
    ) -> None:
        """Take over weights and biases by role, and other tensors by name."""
        for role in INPUTS:
            for own, tensor in zip(self._own(role), parts[role], strict=True):
                if own is not None:
                    # The value's part of a fused bias stays where the rest of it has gone into the output's.
                    own.copy_(tensor) if tensor is not None else own.zero_()
        if not self.record.output_outside:
            output = getattr(self, self.record.output)
            output.weight.copy_(parts["output"][0])
            if output.bias is not None:
                output.bias.copy_(parts["output"][1])
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, tensor in others.items():
            tensors[name].copy_(tensor)

    def _dense_rows(self, heads: int, device: torch.device, role: Role) -> Int[Tensor, "heads kept"]:
        """Where the kept dimensions of every head stand in the dense head."""
        if self.rotary_pairs is None or role == "value":
            return torch.arange(self.value_dim if role == "value" else self.query_key_dim, device=device).expand(
                heads, -1
            )
        pairs = self.rotary_pairs.long()
        dims = torch.cat((pairs, pairs + self.head_dim // 2), dim=-1)
        return dims.repeat_interleave(heads // self.num_key_value_heads, dim=0)


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of the half type on (batch, tokens, heads, group, dim), tables of half that width, or of less
    where only the first dimensions turn. Some families keep their tables in float32."""
    turned = 2 * cosine.shape[-1]
    first, second = states[..., :turned].chunk(2, dim=-1)
    parts = (first * cosine - second * sine, second * cosine + first * sine)
    whole = torch.cat(parts if turned == states.shape[-1] else (*parts, states[..., turned:]), dim=-1)
    return whole.to(states.dtype)


def _pad(states: Tensor, width: int | None) -> Tensor:
    if width is None or states.shape[-1] == width:
        return states
    return nn.functional.pad(states, (0, width - states.shape[-1]))


def _scatter_rows(
    matrix: Float[Tensor, "rows columns"], index: Int[Tensor, "heads kept"], heads: int, head_dim: int
) -> Float[Tensor, "dense_rows columns"]:
    result = matrix.new_zeros(heads, head_dim, matrix.shape[1])
    blocks = matrix.reshape(heads, index.shape[1], -1)
    result.scatter_(1, index.long()[:, :, None].expand_as(blocks), blocks)
    return result.reshape(heads * head_dim, -1)
