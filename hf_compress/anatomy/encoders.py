"""The records of encoders, of models of images and sounds, and of those with an encoder and a decoder. Data only."""

from __future__ import annotations

from dataclasses import replace

from .decoders import register_matrices
from .records import Anatomy, AttentionAnatomy, MlpAnatomy, register_anatomy

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

register_anatomy(
    Anatomy(model_types=("resnet",), blocks="encoder.stages.*.layers", attention=None, mlp=None, decoder=False)
)


register_matrices(
    ("modernbert",),
    "layers",
    query_key=("attn.Wqkv",),
    value_output=("attn.Wo",),
    mlp=MlpAnatomy(up="Wi", gate="Wi", down="Wo"),
)
register_matrices(
    ("mpnet",),
    "encoder.layer",
    fixed_heads=True,
    more_outputs=1,
    query_key=("attention.attn.q", "attention.attn.k"),
    value_output=("attention.attn.v", "attention.attn.o"),
    mlp=MlpAnatomy(path="", up="intermediate.dense", gate=None, down="output.dense", feeds_residual=False),
)
register_matrices(
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
register_matrices(
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
