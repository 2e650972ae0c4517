"""The records of the families that come with the package. Data only: no function of a method knows a family.

`README.md` next to this file shows how a family is added.
"""

from __future__ import annotations

from dataclasses import replace

from .records import Anatomy, AttentionAnatomy, ExpertsAnatomy, MlpAnatomy, register_anatomy

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
        mlp=MlpAnatomy(feeds_residual=False, output_normed=True),
    )
)
register_anatomy(
    Anatomy(
        model_types=("gemma3_text",),
        attention=AttentionAnatomy(
            query_norm="q_norm", key_norm="k_norm", norm_offset=1.0, sliding_window="sliding_window"
        ),
        mlp=MlpAnatomy(feeds_residual=False, output_normed=True),
    )
)
register_anatomy(Anatomy(model_types=("arcee",), mlp=MlpAnatomy(gate=None)))
# Its blocks add a multiple of the MLP's output.
register_anatomy(Anatomy(model_types=("granite",), mlp=MlpAnatomy(feeds_residual=False)))
register_anatomy(
    Anatomy(
        model_types=("starcoder2",),
        attention=AttentionAnatomy(sliding_window="config.sliding_window"),
        mlp=MlpAnatomy(up="c_fc", gate=None, down="c_proj"),
    )
)
# The router's choice of experts is no matrix to be changed.
register_anatomy(
    Anatomy(
        model_types=("mixtral",),
        attention=AttentionAnatomy(sliding_window="config.sliding_window"),
        mlp=None,
        experts=ExpertsAnatomy(path="mlp.experts", width_field="intermediate_size"),
    )
)
register_anatomy(
    Anatomy(
        model_types=("qwen3_moe",),
        attention=AttentionAnatomy(query_norm="q_norm", key_norm="k_norm", sliding_window="sliding_window"),
        # In blocks without experts.
        mlp=MlpAnatomy(),
        experts=ExpertsAnatomy(),
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


def _register_matrices(
    model_types: tuple[str, ...],
    blocks: str | tuple[str, ...],
    *,
    query_key: tuple[str, ...],
    value_output: tuple[str, ...],
    mlp: MlpAnatomy | tuple[MlpAnatomy, ...],
    decoder: bool = False,
    left_dense: tuple[str, ...] = (),
    fixed_heads: bool = False,
    more_outputs: int = 0,
    hands_on: bool = False,
) -> None:
    """A family whose attention is described matrix by matrix."""
    pairs = (*((path, "query_key") for path in query_key), *((path, "value_output") for path in value_output))
    register_anatomy(
        Anatomy(
            model_types=model_types,
            blocks=blocks,
            attention=None,
            mlp=mlp,
            kinds=pairs,
            decoder=decoder,
            left_dense=left_dense,
            fixed_heads=fixed_heads,
            more_outputs=more_outputs,
            hands_on=hands_on,
        )
    )


register_anatomy(
    Anatomy(
        model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
        blocks="encoder.layer",
        attention=AttentionAnatomy(
            path="attention.self",
            query="query",
            key="key",
            value="value",
            output="attention.output.dense",
            output_outside=True,
            head_dim="attention_head_size",
            rotary=None,
            dropout="dropout.p",
        ),
        mlp=MlpAnatomy(path="", up="intermediate.dense", gate=None, down="output.dense", feeds_residual=False),
        decoder=False,
    )
)
register_anatomy(
    Anatomy(
        model_types=("distilbert",),
        blocks="transformer.layer",
        attention=AttentionAnatomy(
            path="attention",
            query="q_lin",
            key="k_lin",
            value="v_lin",
            output="out_lin",
            head_dim="attention_head_size",
            rotary=None,
            dropout="dropout.p",
        ),
        mlp=MlpAnatomy(path="ffn", up="lin1", gate=None, down="lin2", width_field="hidden_dim", feeds_residual=False),
        decoder=False,
    )
)
# The block scales the output; the config has a ratio in place of a width. The largest has a gate.
_DINOV2 = MlpAnatomy(up="fc1", gate=None, down="fc2", width_field=None, feeds_residual=False)
_GIANT = MlpAnatomy(width_field=None, feeds_residual=False)
for _types, _blocks, _mlp_anatomy in (
    (("vit", "deit"), "layers", MlpAnatomy(up="fc1", gate=None, down="fc2")),
    (("dinov2",), "encoder.layer", (_DINOV2, _GIANT)),
):
    register_anatomy(
        Anatomy(
            model_types=_types,
            blocks=_blocks,
            attention=AttentionAnatomy(path="attention", rotary=None),
            mlp=_mlp_anatomy,
            decoder=False,
        )
    )

register_anatomy(
    Anatomy(
        model_types=("albert",),
        blocks="encoder.albert_layer_groups.*.albert_layers",
        attention=None,
        mlp=MlpAnatomy(path="", up="ffn", gate=None, down="ffn_output", feeds_residual=False),
        kinds=(
            ("attention.query", "query_key"),
            ("attention.key", "query_key"),
            ("attention.value", "value_output"),
            ("attention.dense", "value_output"),
        ),
        decoder=False,
        repeated=True,
    )
)

# Query, key and value are one matrix.
register_anatomy(
    Anatomy(
        model_types=("gpt2",),
        blocks="h",
        attention=AttentionAnatomy(
            path="attn",
            query="c_attn",
            key="c_attn",
            value="c_attn",
            fused="side_by_side",
            output="c_proj",
            rotary=None,
            dropout="attn_dropout.p",
            output_dropout="resid_dropout.p",
            left_if=("reorder_and_upcast_attn",),
        ),
        mlp=MlpAnatomy(up="c_fc", gate=None, down="c_proj", width_field="n_inner"),
    )
)
register_anatomy(
    Anatomy(
        model_types=("gpt_neox",),
        attention=AttentionAnatomy(
            path="attention",
            query="query_key_value",
            key="query_key_value",
            value="query_key_value",
            fused="by_head",
            output="dense",
            head_dim="head_size",
            cache="layer_past",
        ),
        mlp=MlpAnatomy(up="dense_h_to_4h", gate=None, down="dense_4h_to_h"),
    )
)
register_anatomy(
    Anatomy(
        model_types=("phi3",),
        attention=AttentionAnatomy(
            query="qkv_proj",
            key="qkv_proj",
            value="qkv_proj",
            fused="side_by_side",
            sliding_window="config.sliding_window",
        ),
        mlp=MlpAnatomy(up="gate_up_proj", gate="gate_up_proj"),
    )
)
register_anatomy(
    Anatomy(model_types=("resnet",), blocks="encoder.stages.*.layers", attention=None, mlp=None, decoder=False)
)

register_anatomy(
    Anatomy(
        model_types=("phi",),
        attention=AttentionAnatomy(output="dense", left_if=("qk_layernorm",)),
        mlp=MlpAnatomy(up="fc1", gate=None, down="fc2"),
    )
)
register_anatomy(
    Anatomy(model_types=("stablelm",), attention=AttentionAnatomy(left_if=("qk_layernorm",), fixed_heads=True))
)

register_anatomy(Anatomy(model_types=("olmo",), attention=AttentionAnatomy(left_if=("config.clip_qkv",))))

_NORMED = MlpAnatomy(feeds_residual=False, output_normed=True)
_SPANNING = AttentionAnatomy(query_norm="q_norm", key_norm="k_norm", norms_span_heads=True, fixed_heads=True)
register_anatomy(Anatomy(model_types=("olmo2",), attention=_SPANNING, mlp=_NORMED))
register_anatomy(
    Anatomy(model_types=("olmo3",), attention=replace(_SPANNING, sliding_window="sliding_window"), mlp=_NORMED)
)

# Decoders whose rotary embedding turns pairs of neighbours, or is left out of some layers.
_QUERY_KEY = ("self_attn.q_proj", "self_attn.k_proj")
_VALUE_OUTPUT = ("self_attn.v_proj", "self_attn.o_proj")
for _types, _mlp, _fixed in (
    (("helium",), MlpAnatomy(), False),
    (("cohere",), MlpAnatomy(), True),
    (("exaone4",), _NORMED, False),
    (("glm4",), MlpAnatomy(up="gate_up_proj", gate="gate_up_proj", feeds_residual=False, output_normed=True), False),
):
    _register_matrices(
        _types,
        "layers",
        mlp=_mlp,
        decoder=True,
        fixed_heads=_fixed,
        query_key=_QUERY_KEY,
        value_output=_VALUE_OUTPUT,
    )
_register_matrices(
    ("gptj",),
    "h",
    mlp=MlpAnatomy(up="fc_in", gate=None, down="fc_out", width_field="n_inner"),
    decoder=True,
    fixed_heads=True,
    more_outputs=1,
    query_key=("attn.q_proj", "attn.k_proj"),
    value_output=("attn.v_proj", "attn.out_proj"),
)
_register_matrices(
    ("gpt_bigcode",),
    "h",
    decoder=True,
    query_key=("attn.c_attn",),
    value_output=("attn.c_proj",),
    mlp=MlpAnatomy(up="c_fc", gate=None, down="c_proj", width_field="n_inner"),
)
_register_matrices(
    ("bloom", "falcon"),
    "h",
    decoder=True,
    more_outputs=1,
    query_key=("self_attention.query_key_value",),
    value_output=("self_attention.dense",),
    mlp=MlpAnatomy(up="dense_h_to_4h", gate=None, down="dense_4h_to_h", width_field=None, feeds_residual=False),
)
_register_matrices(
    ("modernbert",),
    "layers",
    query_key=("attn.Wqkv",),
    value_output=("attn.Wo",),
    mlp=MlpAnatomy(up="Wi", gate="Wi", down="Wo"),
)
_register_matrices(
    ("mpnet",),
    "encoder.layer",
    fixed_heads=True,
    more_outputs=1,
    query_key=("attention.attn.q", "attention.attn.k"),
    value_output=("attention.attn.v", "attention.attn.o"),
    mlp=MlpAnatomy(path="", up="intermediate.dense", gate=None, down="output.dense", feeds_residual=False),
)
_register_matrices(
    ("dinov3_vit",),
    "layer",
    fixed_heads=True,
    query_key=("attention.q_proj", "attention.k_proj"),
    value_output=("attention.v_proj", "attention.o_proj"),
    # The block scales the output.
    mlp=(MlpAnatomy(feeds_residual=False), MlpAnatomy(gate=None, feeds_residual=False)),
)
register_anatomy(
    Anatomy(
        model_types=("wav2vec2", "hubert"),
        blocks="encoder.layers",
        attention=AttentionAnatomy(path="attention", output="out_proj", rotary=None, dropout="dropout"),
        # One of the two kinds of both families norms the sum.
        mlp=MlpAnatomy(
            path="feed_forward", up="intermediate_dense", gate=None, down="output_dense", feeds_residual=False
        ),
        decoder=False,
    )
)

# Towers of text and of images: alone, and both.
for _towers, _lists, _field in (
    (
        ("clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model"),
        "encoder.layers",
        "intermediate_size",
    ),
    (("clip", "siglip"), ("text_model.encoder.layers", "vision_model.encoder.layers"), None),
):
    register_anatomy(
        Anatomy(
            model_types=_towers,
            blocks=_lists,
            attention=AttentionAnatomy(output="out_proj", rotary=None, scaling="scale", dropout="dropout"),
            mlp=MlpAnatomy(up="fc1", gate=None, down="fc2", width_field=_field),
            decoder=False,
        )
    )

# Encoders and decoders; the decoder's blocks attend to the encoder's output as well.
_ATTENTION = AttentionAnatomy(cross_path="encoder_attn", output="out_proj", rotary=None, dropout="dropout")
for _families, _both_attentions in (
    (("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "blenderbot-small"), _ATTENTION),
    (("speech_to_text",), replace(_ATTENTION, fixed_heads=True)),
    (("whisper",), replace(_ATTENTION, fixed_heads=True, query_prescaled=True)),
):
    register_anatomy(
        Anatomy(
            model_types=_families,
            blocks=("encoder.layers", "decoder.layers"),
            attention=_both_attentions,
            # Encoder and decoder have a field for the width each, and some families norm the sum.
            mlp=MlpAnatomy(path="", up="fc1", gate=None, down="fc2", width_field=None, feeds_residual=False),
            decoder=False,
        )
    )
_register_matrices(
    ("t5", "mt5"),
    ("encoder.block", "decoder.block"),
    more_outputs=2,
    hands_on=True,
    query_key=(
        "layer.0.SelfAttention.q",
        "layer.0.SelfAttention.k",
        "layer.1.EncDecAttention.q?",
        "layer.1.EncDecAttention.k?",
    ),
    value_output=(
        "layer.0.SelfAttention.v",
        "layer.0.SelfAttention.o",
        "layer.1.EncDecAttention.v?",
        "layer.1.EncDecAttention.o?",
    ),
    # Of decoder and encoder, with a gate and without.
    mlp=tuple(
        MlpAnatomy(path=f"layer.{_layer}.DenseReluDense", up=_up, gate=_gate, down="wo", width_field="d_ff")
        for _layer in (2, 1)
        for _up, _gate in (("wi_1", "wi_0"), ("wi", None))
    ),
    # The MLP turns its inner activations into the dtype of `wo`.
    left_dense=tuple(f"layer.{_layer}.DenseReluDense.wo" for _layer in (1, 2)),
)
