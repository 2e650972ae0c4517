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

from ...anatomy import AttentionAnatomy, find_record, read_attribute
from ...checked import short
from ...errors import CompressionError
from ...layout import checked_size, register_module_type

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
    recorded_outputs: ClassVar[tuple[str, ...]] = ("attentions",)
    rotary_pairs: Tensor | None

    def __init__(
        self, dense: nn.Module, record: AttentionAnatomy, query_key_dim: int, value_dim: int, output_bias: bool
    ) -> None:
        super().__init__()
        projections = {
            role: read_attribute(dense, getattr(record, role)) for role in ("query", "key", "value", "output")
        }
        query, key, value, output = projections.values()
        self.record = record
        attributes: Any = dense
        self.config: Any = attributes.config
        self.layer_idx = attributes.layer_idx
        self.head_dim = int(attributes.head_dim)
        self.num_heads = query.out_features // self.head_dim
        self.num_key_value_heads = key.out_features // self.head_dim
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.query_key_dim = query_key_dim
        self.value_dim = value_dim
        self.scaling = read_attribute(dense, record.scaling)
        self.attention_dropout = read_attribute(dense, record.dropout)
        self.is_causal = getattr(dense, "is_causal", True)
        self.softcap = read_attribute(dense, record.softcap) if record.softcap else None
        self.sliding_window = read_attribute(dense, record.sliding_window) if record.sliding_window else None
        self.uses_rotary = record.rotary is not None and (
            record.rotary_flag is None or bool(read_attribute(dense, record.rotary_flag))
        )
        # Not every dense eager function repeats key/value heads; the family's own does what its masks expect.
        home = sys.modules[type(dense).__module__]
        self.eager: Callable[..., Any] = getattr(home, "eager_attention_forward", grouped_eager_attention)

        options = {"device": query.weight.device, "dtype": query.weight.dtype}
        hidden, width = query.in_features, self.num_heads * value_dim

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            module: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, **options)
            return module

        setattr(self, record.query, linear(hidden, self.num_heads * query_key_dim, query.bias is not None))
        setattr(self, record.key, linear(hidden, self.num_key_value_heads * query_key_dim, key.bias is not None))
        keeps_value_bias = value.bias is not None and not output_bias
        setattr(self, record.value, linear(hidden, self.num_key_value_heads * value_dim, keeps_value_bias))
        setattr(self, record.output, linear(width, output.out_features, output_bias or output.bias is not None))

        pairs = None
        if self.uses_rotary and query_key_dim < self.head_dim:
            shape = (self.num_key_value_heads, query_key_dim // 2)
            pairs = torch.zeros(shape, dtype=torch.int32, device=options["device"])
        self.register_buffer("rotary_pairs", pairs)
        for role in ("query_norm", "key_norm"):
            name = getattr(record, role)
            if name is None:
                continue
            if query_key_dim == self.head_dim:
                setattr(self, name, read_attribute(dense, name))
            else:
                norm = read_attribute(dense, name)
                epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
                setattr(self, name, HeadRMSNorm(self.num_key_value_heads, query_key_dim, epsilon, **options))

    def spec(self) -> dict[str, Any]:
        value, output = getattr(self, self.record.value), getattr(self, self.record.output)
        return {
            "query_key_dim": self.query_key_dim,
            "value_dim": self.value_dim,
            "output_bias": output.bias is not None and value.bias is None,
        }

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> DecomposedAttention:
        family = find_record(getattr(getattr(dense, "config", None), "model_type", ""))
        if family is None or family.attention is None:
            raise ValueError(f"no anatomy record describes the attention {type(dense).__name__}")
        head_dim = int(read_attribute(dense, "head_dim"))
        query_key_dim = checked_size(spec, "query_key_dim", head_dim)
        value_dim = checked_size(spec, "value_dim", head_dim)
        if not isinstance(spec["output_bias"], bool):
            raise ValueError(f"`output_bias` must be true or false, got {short(spec['output_bias'])}")
        if family.attention.rotary is not None and query_key_dim % 2:
            raise ValueError(f"`query_key_dim` must be even under a rotary embedding, got {query_key_dim}")
        return cls(dense, family.attention, query_key_dim, value_dim, spec["output_bias"])

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,  # of the back end's kind: a tensor, or the BlockMask of flex_attention
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        record = self.record
        batch, tokens, _ = hidden_states.shape
        heads = (batch, tokens, self.num_key_value_heads)
        query = getattr(self, record.query)(hidden_states).view(*heads, self.num_key_value_groups, self.query_key_dim)
        key = getattr(self, record.key)(hidden_states).view(*heads, 1, self.query_key_dim)
        value = getattr(self, record.value)(hidden_states).view(*heads, self.value_dim)
        if record.query_norm is not None:
            query = getattr(self, record.query_norm)(query)
        if record.key_norm is not None:
            key = getattr(self, record.key_norm)(key)
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
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mixed, weights = self._attend(query, key, value, attention_mask, **kwargs)
        mixed = mixed.reshape(batch, tokens, self.num_heads * self.value_dim)
        return getattr(self, record.output)(mixed), weights

    def _rotation(self, table: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens heads 1 half"]:
        """The columns of a cosine or sine table for the kept pairs; both halves of the table are equal."""
        if self.rotary_pairs is None:
            return table[:, :, None, None, : self.head_dim // 2]
        if table.shape[-1] != self.head_dim:
            raise CompressionError(
                f"the model turns {table.shape[-1]} dimensions of a head, and the layout keeps pairs of "
                f"{self.head_dim}: the config and the layout belong to different models."
            )
        columns = table.index_select(-1, self.rotary_pairs.flatten())
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
        record = self.record
        state: dict[str, Tensor] = {}
        for role in ("query", "key"):
            name = getattr(record, role)
            heads = self.num_heads if role == "query" else self.num_key_value_heads
            projection = getattr(self, name)
            index = self._dense_rows(heads, projection.weight.device)
            state[f"{name}.weight"] = _scatter_rows(projection.weight, index, heads, self.head_dim)
            if projection.bias is not None:
                state[f"{name}.bias"] = _scatter_rows(projection.bias[:, None], index, heads, self.head_dim)[:, 0]
            norm = getattr(record, f"{role}_norm")
            if norm is not None:
                if self.query_key_dim < self.head_dim:
                    raise NotImplementedError(
                        "attention with query/key norms over fewer dimensions has no dense equivalent: a dense norm "
                        "has one weight for all heads. Keep the compressed model, or leave `query_key` out of `kinds`."
                    )
                state[f"{norm}.weight"] = getattr(self, norm).weight
        value, output = getattr(self, record.value), getattr(self, record.output)
        dense_value, dense_output = getattr(dense, record.value), getattr(dense, record.output)
        if output.bias is not None and dense_output.bias is None:
            raise NotImplementedError(
                "the value bias was folded into an output bias, which the dense class does not have. Keep the "
                "compressed model, or leave `value_output` out of `kinds`."
            )
        rows = torch.arange(self.value_dim, device=value.weight.device).expand(self.num_key_value_heads, -1)
        state[f"{record.value}.weight"] = _scatter_rows(value.weight, rows, self.num_key_value_heads, self.head_dim)
        columns = torch.arange(self.value_dim, device=output.weight.device).expand(self.num_heads, -1)
        state[f"{record.output}.weight"] = _scatter_rows(output.weight.T, columns, self.num_heads, self.head_dim).T
        if dense_value.bias is not None:
            bias = value.bias if value.bias is not None else value.weight.new_zeros(rows.numel())
            state[f"{record.value}.bias"] = _scatter_rows(bias[:, None], rows, len(rows), self.head_dim)[:, 0]
        if output.bias is not None:
            state[f"{record.output}.bias"] = output.bias
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def _dense_rows(self, heads: int, device: torch.device) -> Int[Tensor, "heads kept"]:
        """Where the kept query/key dimensions of every head stand in the dense head."""
        if self.rotary_pairs is None:
            return torch.arange(self.query_key_dim, device=device).expand(heads, -1)
        pairs = self.rotary_pairs.long()
        dims = torch.cat((pairs, pairs + self.head_dim // 2), dim=-1)
        return dims.repeat_interleave(heads // self.num_key_value_heads, dim=0)


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of the half type on (batch, tokens, heads, group, dim), tables of half that width."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


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
