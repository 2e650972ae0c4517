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
        query, key, value, output: the four projections, `nn.Linear`.
        rotary: `"half"` when a rotary embedding couples dimensions `i` and `i + head_dim / 2`; `None` without one.
        rotary_flag: attribute that is false on layers that leave the rotary embedding out (SmolLM3).
        query_norm, key_norm: RMS norms over the head dimension between projection and rotary embedding.
        norm_offset: the norms multiply by `norm_offset + weight` (Gemma: 1).
        scaling: attribute that holds the softmax scale.
        query_prescaled: the dense class multiplies the query by the scale and passes 1 to the attention (OPT).
        softcap: attribute that holds the logit softcap, passed on as `softcap=`.
        sliding_window: attribute that holds the window, passed on as `sliding_window=`.
        dropout: attribute that holds the dropout probability.
        fixed_heads: the class takes the number of heads from the config, not from the projections' sizes: no head can
            be removed.
    """

    path: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    rotary: Literal["half"] | None = "half"
    rotary_flag: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    norm_offset: float = 0.0
    scaling: str = "scaling"
    query_prescaled: bool = False
    softcap: str | None = None
    sliding_window: str | None = None
    dropout: str = "attention_dropout"
    fixed_heads: bool = False

    @property
    def projections(self) -> tuple[str, str, str, str]:
        return self.query, self.key, self.value, self.output


@dataclass(frozen=True, kw_only=True)
class MlpAnatomy:
    """The MLP of a block: `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate.

    Args:
        path: the module that holds the projections, relative to the block; `""` for the block itself.
        up, gate, down: the projections, `nn.Linear`.
        width_field: the field of the model's config that holds the width between up and down.
        feeds_residual: the down projection's output is added to the residual stream as it is, and nothing norms the
            sum within the block.
        feeds_residual_field: the field of the model's config that says so, where a family has both kinds.
    """

    path: str = "mlp"
    up: str = "up_proj"
    gate: str | None = "gate_proj"
    down: str = "down_proj"
    width_field: str = "intermediate_size"
    feeds_residual: bool = True
    feeds_residual_field: str | None = None


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One family of models.

    Args:
        model_types: the `config.model_type` values that the record describes.
        blocks: path of the `nn.ModuleList` of blocks, relative to the base model (`model.base_model`); a `*` in it
            stands for every member of a list of stages.
        attention, mlp: the parts of a block; `None` for a part that the record does not describe.
        kinds: path relative to the block and kind of the matrices of a block that is described by them alone: enough
            for methods that treat every matrix by itself.
        decoder: a causal language model.
        repeated: the model runs every block several times (ALBERT).

    A record without attention, MLP and kinds describes blocks whose matrices are all of kind "other".
    """

    model_types: tuple[str, ...]
    blocks: str = "layers"
    attention: AttentionAnatomy | None = AttentionAnatomy()
    mlp: MlpAnatomy | None = MlpAnatomy()
    kinds: tuple[tuple[str, str], ...] = ()
    decoder: bool = True
    repeated: bool = False


_RECORDS: dict[str, Anatomy] = {}


def register_anatomy(record: Anatomy, *, replace: bool = False) -> Anatomy:
    """Make a family known. Raises `ConfigurationError` if a model type has a record already and `replace` is false."""
    taken = [name for name in record.model_types if name in _RECORDS]
    if taken and not replace:
        raise ConfigurationError(
            f"model types {taken} already have an anatomy record; pass replace=True to replace it."
        )
    for name in record.model_types:
        _RECORDS[name] = record
    return record


def find_record(model_type: str) -> Anatomy | None:
    return _RECORDS.get(model_type)


def known_model_types(decoder: bool | None = None) -> list[str]:
    """The model types with a record; of decoders or of encoders only, if asked."""
    return sorted(name for name, record in _RECORDS.items() if decoder in (None, record.decoder))


register_anatomy(Anatomy(model_types=("llama",)))
register_anatomy(Anatomy(model_types=("mistral",), attention=AttentionAnatomy(sliding_window="config.sliding_window")))
register_anatomy(Anatomy(model_types=("qwen2",), attention=AttentionAnatomy(sliding_window="sliding_window")))
register_anatomy(
    Anatomy(
        model_types=("qwen3",),
        attention=AttentionAnatomy(query_norm="q_norm", key_norm="k_norm", sliding_window="sliding_window"),
    )
)
register_anatomy(
    Anatomy(
        model_types=("smollm3",),
        attention=AttentionAnatomy(rotary_flag="use_rope", sliding_window="sliding_window"),
    )
)
register_anatomy(
    Anatomy(
        model_types=("gemma2",),
        attention=AttentionAnatomy(softcap="attn_logit_softcapping", sliding_window="sliding_window"),
        mlp=MlpAnatomy(feeds_residual=False),
    )
)
register_anatomy(
    Anatomy(
        model_types=("gemma3_text",),
        attention=AttentionAnatomy(
            query_norm="q_norm", key_norm="k_norm", norm_offset=1.0, sliding_window="sliding_window"
        ),
        mlp=MlpAnatomy(feeds_residual=False),
    )
)
register_anatomy(
    Anatomy(
        model_types=("opt",),
        blocks="decoder.layers",
        attention=AttentionAnatomy(
            output="out_proj", rotary=None, query_prescaled=True, dropout="dropout", fixed_heads=True
        ),
        mlp=MlpAnatomy(
            path="",
            up="fc1",
            gate=None,
            down="fc2",
            width_field="ffn_dim",
            feeds_residual_field="do_layer_norm_before",
        ),
    )
)


def _register_encoder(model_types: tuple[str, ...], blocks: str, **kinds: tuple[str, ...]) -> None:
    """An encoder of text or of images: every matrix by itself."""
    pairs = tuple((path, kind) for kind, paths in kinds.items() for path in paths)
    register_anatomy(
        Anatomy(model_types=model_types, blocks=blocks, attention=None, mlp=None, kinds=pairs, decoder=False)
    )


_register_encoder(
    ("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    "encoder.layer",
    query_key=("attention.self.query", "attention.self.key"),
    value_output=("attention.self.value", "attention.output.dense"),
    mlp=("intermediate.dense", "output.dense"),
)
_register_encoder(
    ("distilbert",),
    "transformer.layer",
    query_key=("attention.q_lin", "attention.k_lin"),
    value_output=("attention.v_lin", "attention.out_lin"),
    mlp=("ffn.lin1", "ffn.lin2"),
)
for _types, _blocks in ((("vit", "deit"), "layers"), (("dinov2",), "encoder.layer")):
    _register_encoder(
        _types,
        _blocks,
        query_key=("attention.q_proj", "attention.k_proj"),
        value_output=("attention.v_proj", "attention.o_proj"),
        mlp=("mlp.fc1", "mlp.fc2"),
    )

register_anatomy(
    Anatomy(
        model_types=("albert",),
        blocks="encoder.albert_layer_groups.*.albert_layers",
        attention=None,
        mlp=None,
        kinds=(
            ("attention.query", "query_key"),
            ("attention.key", "query_key"),
            ("attention.value", "value_output"),
            ("attention.dense", "value_output"),
            ("ffn", "mlp"),
            ("ffn_output", "mlp"),
        ),
        decoder=False,
        repeated=True,
    )
)

# Query, key and value are one matrix; only methods that treat every matrix by itself apply.
register_anatomy(
    Anatomy(
        model_types=("gpt2",),
        blocks="h",
        attention=None,
        mlp=None,
        kinds=(
            ("attn.c_attn", "query_key"),
            ("attn.c_proj", "value_output"),
            ("mlp.c_fc", "mlp"),
            ("mlp.c_proj", "mlp"),
        ),
    )
)
register_anatomy(
    Anatomy(model_types=("resnet",), blocks="encoder.stages.*.layers", attention=None, mlp=None, decoder=False)
)
