"""The records of the families that come with the package. Data only: no function of a method knows a family.

`README.md` next to this file shows how a family is added.
"""

from __future__ import annotations

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
        mlp=None,
        experts=ExpertsAnatomy(),
        # Blocks without experts.
        kinds=(("mlp.gate_proj?", "mlp"), ("mlp.up_proj?", "mlp"), ("mlp.down_proj?", "mlp")),
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
    mlp: tuple[str, ...] | MlpAnatomy,
    decoder: bool = False,
    left_dense: tuple[str, ...] = (),
    fixed_heads: bool = False,
    more_outputs: int = 0,
    hands_on: bool = False,
) -> None:
    """A family whose attention, or all of whose block, is described matrix by matrix."""
    named = {"query_key": query_key, "value_output": value_output, "mlp": mlp if isinstance(mlp, tuple) else ()}
    pairs = tuple((path, kind) for kind, paths in named.items() for path in paths)
    register_anatomy(
        Anatomy(
            model_types=model_types,
            blocks=blocks,
            attention=None,
            mlp=None if isinstance(mlp, tuple) else mlp,
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
for _types, _blocks, _mlp_anatomy in (
    (("vit", "deit"), "layers", MlpAnatomy(up="fc1", gate=None, down="fc2")),
    # The block scales the output; the config has a ratio in place of a width.
    (
        ("dinov2",),
        "encoder.layer",
        MlpAnatomy(up="fc1", gate=None, down="fc2", width_field=None, feeds_residual=False),
    ),
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

# Decoders whose rotary embedding turns pairs of neighbours or a part of a head, or whose norms span all heads.
_QUERY_KEY = ("self_attn.q_proj", "self_attn.k_proj")
_VALUE_OUTPUT = ("self_attn.v_proj", "self_attn.o_proj")
_NORMED = MlpAnatomy(feeds_residual=False, output_normed=True)
for _types, _mlp, _fixed in (
    (("helium", "olmo"), MlpAnatomy(), False),
    (("cohere", "stablelm"), MlpAnatomy(), True),
    (("exaone4",), _NORMED, False),
    (("olmo2", "olmo3"), _NORMED, True),
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
    ("phi",),
    "layers",
    mlp=MlpAnatomy(up="fc1", gate=None, down="fc2"),
    decoder=True,
    query_key=_QUERY_KEY,
    value_output=("self_attn.v_proj", "self_attn.dense"),
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
    mlp=("mlp.gate_proj?", "mlp.up_proj", "mlp.down_proj"),
)
_register_matrices(
    ("wav2vec2", "hubert"),
    "encoder.layers",
    query_key=("attention.q_proj", "attention.k_proj"),
    value_output=("attention.v_proj", "attention.out_proj"),
    # One of the two families norms the sum.
    mlp=MlpAnatomy(path="feed_forward", up="intermediate_dense", gate=None, down="output_dense", feeds_residual=False),
)

# Towers of text and of images: alone, and both.
register_anatomy(
    Anatomy(
        model_types=("clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model"),
        blocks="encoder.layers",
        attention=AttentionAnatomy(output="out_proj", rotary=None, scaling="scale", dropout="dropout"),
        mlp=MlpAnatomy(up="fc1", gate=None, down="fc2"),
        decoder=False,
    )
)
_register_matrices(
    ("clip", "siglip"),
    ("text_model.encoder.layers", "vision_model.encoder.layers"),
    query_key=_QUERY_KEY,
    value_output=("self_attn.v_proj", "self_attn.out_proj"),
    mlp=MlpAnatomy(up="fc1", gate=None, down="fc2", width_field=None),
)

# Encoders and decoders; the decoder's blocks attend to the encoder's output as well.
for _families, _fixed in (
    (("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "blenderbot-small"), False),
    (("whisper", "speech_to_text"), True),
):
    _register_matrices(
        _families,
        ("encoder.layers", "decoder.layers"),
        fixed_heads=_fixed,
        query_key=(*_QUERY_KEY, "encoder_attn.q_proj?", "encoder_attn.k_proj?"),
        value_output=("self_attn.v_proj", "self_attn.out_proj", "encoder_attn.v_proj?", "encoder_attn.out_proj?"),
        # Encoder and decoder have a field for the width each, and some families norm the sum.
        mlp=MlpAnatomy(path="", up="fc1", gate=None, down="fc2", width_field=None, feeds_residual=False),
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
    # Of encoder and decoder, with a gate and without. The MLP turns its inner activations into the dtype of `wo`.
    mlp=tuple(f"layer.{_layer}.DenseReluDense.{_name}?" for _layer in (1, 2) for _name in ("wi", "wi_0", "wi_1")),
    left_dense=tuple(f"layer.{_layer}.DenseReluDense.wo" for _layer in (1, 2)),
)
