"""Records that do not fit are told so: by contradictions in themselves, by the model, and by what it computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import encoders
import families
import pytest
import torch
from conftest import FAMILIES, make_model, recipe
from test_modular_fused import FUSED
from test_modular_fused import make as make_fused
from transformers import AutoModel, AutoModelForCausalLM, Phi3Config, PreTrainedModel, ResNetConfig

import hf_compress
from hf_compress import (
    Anatomy,
    CodebookConfig,
    ConfigurationError,
    LayerSharingConfig,
    MlpAnatomy,
    PruningConfig,
    UnsupportedModelError,
)
from hf_compress.anatomy import check_record, find_record, records, resolve_anatomy


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(records, "_RECORDS", dict(records._RECORDS))


def with_attention(model_type: str, **fields: Any) -> Anatomy:
    record = find_record(model_type)
    assert record is not None and record.attention is not None
    return replace(record, model_types=(model_type,), attention=replace(record.attention, **fields))


def with_mlp(model_type: str, **fields: Any) -> Anatomy:
    record = find_record(model_type)
    assert record is not None and record.mlp is not None
    return replace(record, model_types=(model_type,), mlp=replace(record.mlp, **fields))


def tiny(model_type: str) -> PreTrainedModel:
    return make_model(model_type) if model_type in FAMILIES else make_fused(model_type)


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (("gpt2", {"fused": "sidebyside"}), "`fused` is 'sidebyside', expected 'side_by_side' or 'by_head' or None"),
        (("gpt2", {"fused": None}), "one projection for all three needs `fused`"),
        (("gpt2", {"output_outside": True}), "`fused` and `output_outside` cannot both be"),
        (("gpt2", {"output": "c_attn"}), "`output` is 'c_attn', which is also the projection of an input"),
        (("llama", {"fused": "by_head"}), r"needs one projection.*found \('q_proj', 'k_proj', 'v_proj'\)"),
        (("llama", {"value": "k_proj"}), "one projection for all three needs `fused`"),
        (("llama", {"rotary": "full"}), "`rotary` is 'full', expected 'half' or 'pairs' or None"),
        (("llama", {"scaling": None}), "`scaling` is None, expected the name of an attribute"),
        (("llama", {"softcap": ""}), "`softcap` is '', expected the name"),
        (("llama", {"left_if": "is_cross"}), "`left_if` is 'is_cross', expected a tuple"),
        (("llama", {"norm_offset": 1.0}), "`norm_offset` is 1.0 without `query_norm`"),
        (("smollm3", {"rotary": None}), "`rotary_flag` is 'use_rope' without `rotary`"),
        (("bert", {"output": "attention.self.dense"}), "`output_outside` is true.*lies in the attention module"),
        (("bert", {"output_dropout": "dropout.p"}), "`output_dropout` is that of"),
    ],
)
def test_an_attention_that_contradicts_itself_is_refused(
    record: tuple[str, dict[str, Any]], found: str, unchecked_types: None
) -> None:
    with pytest.raises(ConfigurationError, match=f"AttentionAnatomy: .*{found}"):
        hf_compress.register_anatomy(with_attention(record[0], **record[1]), replace=True)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"mlp": {"down": "up_proj"}}, "MlpAnatomy: `down` is 'up_proj', which is also"),
        ({"mlp": {"up": ""}}, "MlpAnatomy: `up` is '', expected the name of an attribute"),
        ({"left_dense": "mlp.wo"}, "Anatomy: `left_dense` is 'mlp.wo', expected a tuple"),
        ({"kinds": ("grow", "mlp")}, "Anatomy: `kinds` has 'grow', expected one of"),
    ],
)
def test_other_contradictions_are_refused(fields: dict[str, Any], found: str, unchecked_types: None) -> None:
    if "mlp" in fields:
        fields = {"mlp": MlpAnatomy(**fields["mlp"])}
    with pytest.raises(ConfigurationError, match=found):
        hf_compress.register_anatomy(Anatomy(model_types=("new",), **fields))


WRONG: dict[str, tuple[Callable[[], Anatomy], str]] = {
    "gpt2 cache": (lambda: with_attention("gpt2", cache="kv"), "`cache` is 'kv', expected 'past_key_values'"),
    "gpt_neox cache": (lambda: with_attention("gpt_neox", cache="past_key_values"), "expected 'layer_past'"),
    "gpt2 head_dim": (lambda: with_attention("gpt2", head_dim="head_dimm"), "`head_dim` is 'head_dimm', an attribute"),
    "gpt2 scaling": (lambda: with_attention("gpt2", scaling="scale"), "`scaling` is 'scale', an attribute that the "
                     "GPT2Attention at 'transformer.h.0.attn' does not have"),
    "gpt2 dropout": (lambda: with_attention("gpt2", dropout="attn_dropout.q"), "`dropout` is 'attn_dropout.q'"),
    "gpt2 no number": (lambda: with_attention("gpt2", dropout="attn_dropout"), "expected a number there.*Dropout"),
    "gpt2 output_dropout": (lambda: with_attention("gpt2", output_dropout="drop.p"), "`output_dropout` is 'drop.p'"),
    "gpt2 left_if": (lambda: with_attention("gpt2", left_if=("reorder",)), "`left_if` is 'reorder', an attribute"),
    "gpt2 rotary": (lambda: with_attention("gpt2", rotary="half"), "`rotary` is 'half', which needs the argument"),
    "gpt2 output": (lambda: with_attention("gpt2", output="c_attn2"), "attn.c_attn2'"),
    "gpt2 mlp fused": (lambda: with_mlp("gpt2", gate="c_fc"), "256 outputs, expected twice the 256 inputs"),
    "gpt2 mlp swapped": (lambda: with_mlp("gpt2", up="c_proj", down="c_fc"), "`up` and `down` look swapped"),
    "phi3 mlp gate": (lambda: with_mlp("phi3", gate=None), "192 outputs, expected the 96 inputs.*as `gate` too"),
    "phi3 by size": (lambda: with_attention("phi3", head_dim="layer_idx"), "expected a size of 1 or more"),
    "llama rotary": (lambda: with_attention("llama", rotary=None), "`rotary` is None, and there is a rotary"),
    "llama mlp swapped": (lambda: with_mlp("llama", up="down_proj", down="up_proj"), "expected the 48 of the `up`"),
    "llama field": (lambda: with_mlp("llama", feeds_residual_field="norm_first"), "`feeds_residual_field` is 'norm_"),
    "llama grouped": (lambda: with_attention("llama", query="k_proj", key="q_proj"), "32 outputs, expected the 64"),
    "llama norm": (lambda: with_attention("llama", query_norm="q_norm"), "`query_norm` is 'q_norm', an attribute"),
    "qwen3 norm": (lambda: with_attention("qwen3", query_norm="q_proj"), "expected an RMS norm over the 16 dim"),
    "gemma2 softcap": (lambda: with_attention("gemma2", softcap="softcap"), "`softcap` is 'softcap', an attribute"),
    "mistral window": (lambda: with_attention("mistral", sliding_window="window"), "`sliding_window` is 'window'"),
    "smollm3 flag": (lambda: with_attention("smollm3", rotary_flag="rope"), "`rotary_flag` is 'rope', an attribute"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_record_that_does_not_fit_the_model_is_refused(case: str) -> None:
    make, found = WRONG[case]
    hf_compress.register_anatomy(make(), replace=True)
    model = tiny(case.split()[0])
    with pytest.raises(UnsupportedModelError, match=found):
        hf_compress.plan(model, CodebookConfig(bits=3))
    with pytest.raises(UnsupportedModelError, match=found):
        resolve_anatomy(model)


def test_heads_that_cannot_be_shared_evenly_are_refused() -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 4, "intermediate_size": 64}
    config = Phi3Config(**sizes, num_hidden_layers=1, vocab_size=96, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match="6 query heads cannot share 4 key/value heads evenly"):
        resolve_anatomy(AutoModelForCausalLM.from_config(config))


def test_families_tells_what_is_wrong_with_a_record() -> None:
    hf_compress.register_anatomy(with_attention("gpt2", scaling="scale"), replace=True)
    (found,) = hf_compress.families(["gpt2"])
    assert {support.works for support in found.methods.values()} == {"no"}
    assert "`scaling` is 'scale'" in found.methods["attention"].reason


CONFIGS = [
    *((families.auto_class(name), make) for name, make in families.CONFIGS.items()),
    *((AutoModelForCausalLM, make) for make in [*FAMILIES.values(), *FUSED.values()]),
    *((AutoModel, make) for make in encoders.ENCODERS.values()),
]


@pytest.mark.parametrize(("auto", "make"), CONFIGS)
def test_right_records_fit(auto: Any, make: Callable[[], Any]) -> None:
    with torch.device("meta"):
        model = auto.from_config(make())
    assert len(resolve_anatomy(model))


def states(model: PreTrainedModel) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", [*FAMILIES, *FUSED, "clip_text_model", "siglip_vision_model", "llava", "stablelm"])
def test_right_records_describe_what_is_computed(name: str) -> None:
    model = families.make(name) if name in families.CONFIGS and name not in FUSED else tiny(name)
    before = states(model.train())
    check_record(model)
    assert model.training and all(module.training for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(tensor, after[path]) for path, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_right_records_of_encoders_describe_what_is_computed(name: str) -> None:
    check_record(encoders.make_encoder(name), encoders.inputs(name, 2))


@pytest.mark.parametrize(
    ("record", "path"),
    [
        (lambda: with_attention("gpt2", fused="by_head"), "transformer.h.0.attn"),
        (lambda: with_attention("gpt_neox", fused="side_by_side"), "gpt_neox.layers.0.attention"),
        (lambda: with_attention("phi3", fused="by_head"), "model.layers.0.self_attn"),
        (lambda: with_attention("qwen3", query_norm=None, key_norm=None), "model.layers.0.self_attn"),
        (lambda: with_attention("smollm3", rotary_flag=None), "model.layers.1.self_attn"),
        (lambda: with_attention("llama", scaling="head_dim"), "model.layers.0.self_attn"),
    ],
    ids=["gpt2", "gpt_neox", "phi3", "qwen3", "smollm3", "llama"],
)
def test_what_only_the_outputs_show(record: Callable[[], Anatomy], path: str) -> None:
    wrong = hf_compress.register_anatomy(record(), replace=True)
    model = tiny(wrong.model_types[0])
    resolve_anatomy(model)
    with pytest.raises(UnsupportedModelError, match=f"'{path}' of .* computes something else than its record says"):
        check_record(model)


def test_swapped_matrices_of_equal_sizes_show_in_the_outputs() -> None:
    config = copy.deepcopy(FAMILIES["opt"]())
    assert config.ffn_dim == config.hidden_size
    hf_compress.register_anatomy(with_mlp("opt", up="fc2", down="fc1"), replace=True)
    with pytest.raises(UnsupportedModelError, match=r"layers.0.fc1' of .* computes something else.*MlpAnatomy"):
        check_record(make_model("opt"))


def test_check_record_says_what_it_needs() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    with pytest.raises(ConfigurationError, match="on the meta device"):
        check_record(model)
    with pytest.raises(ConfigurationError, match="reads 'input_values', of which check_record makes none"):
        check_record(families.make("wav2vec2"))


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in ("llama", "phi3", "gpt2") for method in ("modular", "codebook", "sharing")]
    + [("llama", "structured"), ("opt", "modular")],
)
def test_modules_that_a_stage_has_replaced_are_left_out(name: str, method: str) -> None:
    stage = {
        "modular": lambda: recipe(reduction=0.2, kinds="auto"),
        "structured": lambda: PruningConfig(sparsity=0.3, structured=True, criterion="magnitude"),
        "codebook": lambda: CodebookConfig(bits=3, learning="none", rows_per_codebook=8),
        "sharing": lambda: LayerSharingConfig(unique_layers=1),
    }[method]
    model = hf_compress.compress(tiny(name).float(), stage())
    resolve_anatomy(model)
    check_record(model)


def test_modular_decomposition_names_the_models_own_record() -> None:
    resnet = AutoModel.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    with pytest.raises(UnsupportedModelError, match=r"the record of 'resnet' \(ResNetModel\) describes only single"):
        hf_compress.plan(resnet, recipe(reduction=0.1))


def test_a_block_has_the_first_of_several_mlps_that_fits() -> None:
    anatomy = resolve_anatomy(families.make("t5_gated"))
    assert [anatomy.mlp_paths(index) for index in (0, 2)] == [
        {role: f"{stack}.DenseReluDense.{name}" for role, name in (("up", "wi_1"), ("gate", "wi_0"), ("down", "wo"))}
        for stack in ("encoder.block.0.layer.1", "decoder.block.0.layer.2")
    ]
    with pytest.raises(ConfigurationError, match=r"Anatomy: `mlp` is \(\), expected an MlpAnatomy, or several"):
        records.register_anatomy(Anatomy(model_types=("none",), mlp=()))
    twice = MlpAnatomy(up="down", gate=None, down="down")
    with pytest.raises(ConfigurationError, match="MlpAnatomy: `down` is 'down', which is also"):
        records.register_anatomy(Anatomy(model_types=("none",), mlp=(MlpAnatomy(), twice)))


def test_blocks_that_run_by_turns_are_not_calibrated() -> None:
    model = AutoModel.from_config(
        families.CONFIGS["albert"]().from_dict({**families.CONFIGS["albert"]().to_dict(), "inner_group_num": 2})
    )
    with pytest.raises(UnsupportedModelError, match=r"layers.0' again after another block.*needs no data"):
        hf_compress.compress(model, CodebookConfig(bits=3, calibration=families.calibration("albert")))


def test_an_attention_without_its_config_is_refused() -> None:
    model: Any = make_model("llama")
    del model.model.layers[2].self_attn.config
    with pytest.raises(UnsupportedModelError, match=r"`config`.*'model.layers.2.self_attn' does not have"):
        resolve_anatomy(model)
