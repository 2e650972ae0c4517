"""Declarative descriptions of model families: where a block keeps its attention and its MLP.

A record is data. A family needs one record and no code in any method; `register_anatomy` adds one from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class AttentionAnatomy:
    """The attention of a block. Names are attributes of the attention module, dotted where they lie deeper.

    Args:
        path: the attention module, relative to the block.
        cross_path: another module of the same kind, by which the blocks of a decoder attend to the encoder's output;
            other blocks lack it.
        query, key, value, output: the four projections, `nn.Linear` or the transposed `Conv1D` of GPT-2.
        fused: query, key and value name one projection, whose outputs are all queries, all keys and all values in turn
            (`"side_by_side"`), or for each key head its queries, its key and its value (`"by_head"`).
        output_outside: the family projects the heads outside of its attention module; `output` is relative to the
            block.
        head_dim: attribute that holds the size of a head.
        rotary: `"half"` when a rotary embedding couples dimensions `i` and `i + head_dim / 2`, `"pairs"` when it
            couples `2 i` and `2 i + 1`; `None` without one.
        rotary_table: the model's tables of cosines and sines have every column twice, in two halves or side by side.
        rotary_flag: attribute that is false on layers that leave the rotary embedding out (SmolLM3).
        query_norm, key_norm: RMS norms over the head dimension between projection and rotary embedding.
        norms_span_heads: those are over the dimensions of all heads together (OLMo-2).
        norm_offset: the norms multiply by `norm_offset + weight` (Gemma: 1).
        scaling: attribute that holds the softmax scale.
        query_prescaled: the dense class multiplies the query by the scale and passes 1 to the attention (OPT).
        softcap: attribute that holds the logit softcap, passed on as `softcap=`.
        sliding_window: attribute that holds the window, passed on as `sliding_window=`.
        dropout: attribute that holds the dropout probability.
        output_dropout: attribute that holds that of the output projection, where it lies in the attention module.
        cache: the argument that hands in the key/value cache.
        left_if: attributes that are true on modules that compute something else than this record describes; those are
            left alone.
        fixed_heads: the class takes the number of heads from the config, not from the projections' sizes: no head can
            be removed.
    """

    path: str = "self_attn"
    cross_path: str | None = None
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: Literal["side_by_side", "by_head"] | None = None
    output_outside: bool = False
    head_dim: str = "head_dim"
    rotary: Literal["half", "pairs"] | None = "half"
    rotary_table: Literal["half", "pairs"] = "half"
    rotary_flag: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norms_span_heads: bool = False
    norm_offset: float = 0.0
    scaling: str = "scaling"
    query_prescaled: bool = False
    softcap: str | None = None
    sliding_window: str | None = None
    dropout: str = "attention_dropout"
    output_dropout: str | None = None
    cache: str = "past_key_values"
    left_if: tuple[str, ...] = ()
    fixed_heads: bool = False

    @property
    def projections(self) -> tuple[str, str, str, str]:
        return self.query, self.key, self.value, self.output


@dataclass(frozen=True, kw_only=True)
class MlpAnatomy:
    """The MLP of a block: `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate.

    Args:
        path: the module that holds the projections, relative to the block; `""` for the block itself.
        up, gate, down: the projections, `nn.Linear` or the transposed `Conv1D` of GPT-2. Up and gate of the same name
            are one projection, whose first half of outputs is the gate's.
        width_field: the field of the model's config that holds the width between up and down; `None` without one.
        feeds_residual: the down projection's output is added to the residual stream as it is, and nothing norms the
            sum within the block.
        feeds_residual_field: the field of the model's config that says so, where a family has both kinds.
        output_normed: a norm stands between the down projection and the residual stream (Gemma): its scale is lost.
    """

    path: str = "mlp"
    up: str = "up_proj"
    gate: str | None = "gate_proj"
    down: str = "down_proj"
    width_field: str | None = "intermediate_size"
    feeds_residual: bool = True
    feeds_residual_field: str | None = None
    output_normed: bool = False

    @property
    def fused(self) -> bool:
        """Whether up and gate are one projection."""
        return self.gate == self.up

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections that read the MLP's input."""
        return (self.up,) if self.gate is None or self.fused else (self.up, self.gate)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that projections of their own have."""
        return ("up", "down") if len(self.inputs) == 1 else ("up", "gate", "down")


@dataclass(frozen=True, kw_only=True)
class ExpertsAnatomy:
    """The experts of a block: one module with all of them in parameters of three dimensions, of a class that
    Transformers makes with `use_experts_implementation`. A token goes through those that the router chooses, each
    `down(activation(gate(x)) * up(x))`, and their outputs are added up by the router's weights.

    Args:
        path: the module, relative to the block; one that ends in `?` is in some blocks only.
        width_field: the field of the model's config that holds an expert's width; `None` without one.
    """

    path: str = "mlp.experts?"
    width_field: str | None = "moe_intermediate_size"


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One family of models.

    Args:
        model_types: the `config.model_type` values that the record describes.
        blocks: path of the `nn.ModuleList` of blocks, relative to the base model (`model.base_model`, or of a
            multimodal model its language part); a `*` in it stands for every member of a list of stages. Several
            paths, in the order of execution, where a model has several stacks: encoder and decoder, or two towers.
            Those that a model lacks are left out, but one must be there.
        attention, mlp, experts: the parts of a block; `None` for a part that the record does not describe. Of several
            MLPs a block has the first whose projections it has (encoder and decoder, with a gate and without). Blocks
            with experts may have none.
        kinds: path relative to the block and kind of the matrices of a block that is described by them alone: enough
            for methods that treat every matrix by itself. A path that ends in `?` is in some blocks only.
        left_dense: paths relative to the block of matrices that no method may touch, `?` as above: the family's class
            looks at their dtype (T5).
        decoder: a causal language model.
        fixed_heads: of attention that is described by `kinds`, as in `AttentionAnatomy`.
        repeated: the model runs every block several times in turn (ALBERT).
        more_outputs: how many outputs a block has after the hidden states.
        hands_on: the first block works those out, and the model passes them to the next ones (T5: position biases of
            self and cross attention).

    A record without attention, MLP and kinds describes blocks whose matrices are all of kind "other".
    """

    model_types: tuple[str, ...]
    blocks: str | tuple[str, ...] = "layers"
    attention: AttentionAnatomy | None = AttentionAnatomy()
    mlp: MlpAnatomy | tuple[MlpAnatomy, ...] | None = MlpAnatomy()
    experts: ExpertsAnatomy | None = None
    kinds: tuple[tuple[str, str], ...] = ()
    left_dense: tuple[str, ...] = ()
    decoder: bool = True
    fixed_heads: bool = False
    repeated: bool = False
    more_outputs: int = 0
    hands_on: bool = False

    @property
    def stacks(self) -> tuple[str, ...]:
        """The paths of all lists of blocks."""
        return (self.blocks,) if isinstance(self.blocks, str) else self.blocks

    @property
    def mlps(self) -> tuple[MlpAnatomy, ...]:
        """The MLPs that a block may have."""
        if self.mlp is None:
            return ()
        return (self.mlp,) if isinstance(self.mlp, MlpAnatomy) else self.mlp


# What a matrix of a block is for.
KINDS = ("mlp", "query_key", "value_output")
_RECORDS: dict[str, Anatomy] = {}


def register_anatomy(record: Anatomy, *, replace: bool = False) -> Anatomy:
    """Make a family known.

    Raises:
        ConfigurationError: a model type has a record already and `replace` is false, or a field holds what it cannot
            hold or contradicts another.
    """
    _check(record)
    taken = [name for name in record.model_types if name in _RECORDS]
    if taken and not replace:
        raise ConfigurationError(
            f"model types {taken} already have an anatomy record; pass replace=True to replace it."
        )
    for name in record.model_types:
        _RECORDS[name] = record
    return record


def _check(record: Anatomy) -> None:
    """Raise `ConfigurationError` for a record that says too little, what nobody understands, or two things at once."""
    found = None
    strange = [pair for pair in record.kinds if not (isinstance(pair, tuple) and len(pair) == 2 and pair[1] in KINDS)]
    if isinstance(record.model_types, str) or not record.model_types:
        found = f"`model_types` is {record.model_types!r}, expected a tuple of names: (config.model_type,)"
    elif not all(record.stacks):
        found = f"`blocks` is {record.blocks!r}, expected the path of the list of blocks, such as 'layers'"
    elif strange:
        kind = (
            f"the kind {strange[0][1]!r}"
            if isinstance(strange[0], tuple) and len(strange[0]) == 2
            else repr(strange[0])
        )
        found = f"`kinds` has {kind}, expected one of {', '.join(map(repr, KINDS))} after every path: (path, kind)"
    elif isinstance(record.left_dense, str):
        found = f"`left_dense` is {record.left_dense!r}, expected a tuple of paths"
    if found is not None:
        raise ConfigurationError(f"Anatomy: {found}.")
    found = None if record.attention is None else _attention_fault(record.attention)
    if found is not None:
        raise ConfigurationError(f"AttentionAnatomy: {found}.")
    strangers = [part for part in record.mlps if not isinstance(part, MlpAnatomy)]
    if strangers or record.mlp == ():
        raise ConfigurationError(f"Anatomy: `mlp` is {record.mlp!r}, expected an MlpAnatomy, or several.")
    found = next((fault for part in record.mlps for fault in [_mlp_fault(part)] if fault is not None), None)
    if found is not None:
        raise ConfigurationError(f"MlpAnatomy: {found}.")
    if record.experts is not None and not (record.experts.path or "").removesuffix("?"):
        raise ConfigurationError(f"ExpertsAnatomy: `path` is {record.experts.path!r}, expected that of a module.")


def _unnamed(part: AttentionAnatomy | MlpAnatomy, needed: tuple[str, ...], optional: tuple[str, ...]) -> str | None:
    """What is wrong with a field that should hold a name."""
    for field in (*needed, *optional):
        value = getattr(part, field)
        if not ((isinstance(value, str) and value) or (value is None and field in optional)):
            return f"`{field}` is {value!r}, expected the name of an attribute"
    return None


def _attention_fault(record: AttentionAnatomy) -> str | None:
    """What contradicts itself in a record of an attention, or `None`."""
    choices = {
        "fused": ("side_by_side", "by_head", None),
        "rotary": ("half", "pairs", None),
        "rotary_table": ("half", "pairs"),
    }
    for field, allowed in choices.items():
        value = getattr(record, field)
        if value not in allowed:
            return f"`{field}` is {value!r}, expected {' or '.join(map(repr, allowed))}"
    unnamed = _unnamed(
        record,
        ("path", "query", "key", "value", "output", "head_dim", "scaling", "dropout", "cache"),
        ("cross_path", "rotary_flag", "query_norm", "key_norm", "softcap", "sliding_window", "output_dropout"),
    )
    if unnamed is not None:
        return unnamed
    if isinstance(record.left_if, str):
        return f"`left_if` is {record.left_if!r}, expected a tuple of names"
    inputs = (record.query, record.key, record.value)
    different = len(set(inputs))
    if record.fused is not None and different > 1:
        return f"`fused` is {record.fused!r}, which needs one projection as `query`, `key` and `value`; found {inputs}"
    if record.fused is None and different < 3:
        return (
            f"`query`, `key` and `value` are {inputs}; one projection for all three needs `fused`: 'side_by_side' or "
            "'by_head'. Name the matrices in `kinds`, and leave `attention` out, where two of the three are one"
        )
    if record.fused is not None and record.output_outside:
        return "`fused` and `output_outside` cannot both be: the number of heads is read from the output within"
    inside = not record.output_outside
    if inside and record.output in inputs:
        return f"`output` is {record.output!r}, which is also the projection of an input"
    if not inside and record.output.startswith(f"{record.path}."):
        return (
            f"`output_outside` is true, and `output` {record.output!r} lies in the attention module {record.path!r}: "
            "name it relative to that module, without `output_outside`"
        )
    if not inside and record.output_dropout is not None:
        return "`output_dropout` is that of an output projection in the attention module, and `output_outside` is true"
    if record.cross_path is not None and (record.rotary or record.fused or record.output_outside):
        return "`cross_path` is that of an attention with three projections of its own and without a rotary embedding"
    if record.rotary == "pairs" and (record.fused or record.query_norm or record.key_norm):
        return "`rotary` is 'pairs', which is not known beside `fused`, `query_norm` or `key_norm`"
    if record.rotary is None and record.rotary_flag is not None:
        return f"`rotary_flag` is {record.rotary_flag!r} without `rotary`"
    if record.query_norm is None and record.key_norm is None and (record.norm_offset or record.norms_span_heads):
        field = "norms_span_heads" if record.norms_span_heads else "norm_offset"
        return f"`{field}` is {getattr(record, field)} without `query_norm` or `key_norm`"
    return None


def _mlp_fault(record: MlpAnatomy) -> str | None:
    """What contradicts itself in a record of an MLP, or `None`."""
    unnamed = _unnamed(record, ("up", "down"), ("gate", "width_field", "feeds_residual_field"))
    if unnamed is None and record.down in record.inputs:
        return f"`down` is {record.down!r}, which is also the projection of an input"
    return unnamed


def find_record(model_type: str) -> Anatomy | None:
    return _RECORDS.get(model_type)


def known_model_types(decoder: bool | None = None) -> list[str]:
    """The model types with a record; of decoders or of encoders only, if asked."""
    return sorted(name for name, record in _RECORDS.items() if decoder in (None, record.decoder))
