"""The records of the decoders that come with the package. Data only: no function of a method knows a family.

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


def register_matrices(
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

_PAIRS = AttentionAnatomy(rotary="pairs")
register_anatomy(Anatomy(model_types=("helium",), attention=_PAIRS))
register_anatomy(
    Anatomy(
        model_types=("cohere",),
        attention=replace(_PAIRS, rotary_table="pairs", left_if=("use_qk_norm",), fixed_heads=True),
    )
)
register_anatomy(
    Anatomy(
        model_types=("glm4",),
        attention=_PAIRS,
        mlp=MlpAnatomy(up="gate_up_proj", gate="gate_up_proj", feeds_residual=False, output_normed=True),
    )
)

# Decoders whose attention has more to it than a record says.
register_matrices(
    ("exaone4",),
    "layers",
    mlp=_NORMED,
    decoder=True,
    query_key=("self_attn.q_proj", "self_attn.k_proj"),
    value_output=("self_attn.v_proj", "self_attn.o_proj"),
)
register_matrices(
    ("gptj",),
    "h",
    mlp=MlpAnatomy(up="fc_in", gate=None, down="fc_out", width_field="n_inner"),
    decoder=True,
    fixed_heads=True,
    more_outputs=1,
    query_key=("attn.q_proj", "attn.k_proj"),
    value_output=("attn.v_proj", "attn.out_proj"),
)
register_matrices(
    ("gpt_bigcode",),
    "h",
    decoder=True,
    query_key=("attn.c_attn",),
    value_output=("attn.c_proj",),
    mlp=MlpAnatomy(up="c_fc", gate=None, down="c_proj", width_field="n_inner"),
)
register_matrices(
    ("bloom", "falcon"),
    "h",
    decoder=True,
    more_outputs=1,
    query_key=("self_attention.query_key_value",),
    value_output=("self_attention.dense",),
    mlp=MlpAnatomy(up="dense_h_to_4h", gate=None, down="dense_4h_to_h", width_field=None, feeds_residual=False),
)
