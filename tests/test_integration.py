"""The doors through which a user comes: from_pretrained, compress, pipeline, GGUF; and the errors at each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ALL_KINDS, calibration, compressed, make_model, recipe, token_ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

import hf_compress
from hf_compress import (
    Anatomy,
    AttentionAnatomy,
    CalibrationConfig,
    CalibrationError,
    CheckpointError,
    CompressionConfig,
    ConfigurationError,
    MlpAnatomy,
    ModularDecompositionConfig,
    NumericalError,
    UnsupportedModelError,
    integration,
    register_anatomy,
)
from hf_compress.layout import layout_of

IDS = token_ids(2, 16, seed=7)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("keyword", ["compression_config", "quantization_config"])
@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained])
def test_from_pretrained_compresses(dense: Path, keyword: str, load: Any) -> None:
    model = load(dense, **{keyword: recipe()})
    expected = hf_compress.compress(make_model("llama"), recipe())
    assert torch.equal(logits(model), logits(expected))
    assert model.compression_report.block_linear_reduction == pytest.approx(0.25, abs=0.02)


def test_quantization_config_needs_no_wrapper(dense: Path) -> None:
    integration.uninstall()
    try:
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=recipe())
    finally:
        integration.install()
    assert layout_of(model)


def test_install_is_idempotent_and_reversible() -> None:
    wrapped = PreTrainedModel.__dict__["from_pretrained"]
    integration.install()
    assert PreTrainedModel.__dict__["from_pretrained"] is wrapped
    integration.uninstall()
    assert not hasattr(PreTrainedModel.from_pretrained, "_hf_compress_original")
    assert not hasattr(PreTrainedModel.save_pretrained, "_hf_compress_original")
    integration.install()
    assert hasattr(PreTrainedModel.from_pretrained, "_hf_compress_original")


def test_other_models_load_and_save_as_ever(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.save_pretrained(tmp_path / "copy")
    assert model.name_or_path == str(dense)
    assert "quantization_config" not in json.loads((tmp_path / "copy" / "config.json").read_text())


def test_a_recipe_may_be_a_dictionary_or_stages(dense: Path) -> None:
    one = hf_compress.compress(make_model("llama"), recipe())
    staged = hf_compress.compress(make_model("llama"), CompressionConfig(stages=[recipe()]))
    plain = hf_compress.compress(
        make_model("llama"), {"method": "modular_decomposition", "reduction": 0.25}, calibration=calibration()
    )
    assert torch.equal(logits(one), logits(staged))
    assert torch.equal(logits(one), logits(plain))


def test_pipeline(dense: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    generate = pipeline(
        "text-generation", model=str(dense), tokenizer=tokenizer, model_kwargs={"quantization_config": recipe()}
    )
    assert layout_of(generate.model)
    assert generate("w5 w6", max_new_tokens=3)[0]["generated_text"]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_reload_with_a_device_map_and_shards(tmp_path: Path, device_map: Any) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(again), logits(model))


def test_reload_offloaded_to_disk(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path / "out")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_reload(tmp_path: Path, dtype: torch.dtype) -> None:
    compressed("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(logits(model)).all()


def test_half_float_and_to_work() -> None:
    model = compressed("llama")
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    pairs = [b for name, b in model.named_buffers() if name.endswith("rotary_pairs")]
    assert pairs and all(b.dtype == torch.int32 for b in pairs)


def test_an_overwritten_save_leaves_no_old_shards(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        compressed("llama", reduction=0.4).save_pretrained(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_portable_loads_without_the_package(tmp_path: Path) -> None:
    model = hf_compress.compress(make_model("llama"), recipe(portable=True, reduction=0.3))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["intermediate_size"] == model.model.layers[0].mlp.up_proj.out_features < 64
    expected = tmp_path / "expected.npy"
    np.save(expected, logits(model).numpy())
    code = (
        "import sys; sys.modules['hf_compress'] = None\n"
        "import numpy as np, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"with torch.no_grad(): found = model(torch.tensor({IDS.tolist()})).logits.numpy()\n"
        f"assert np.array_equal(found, np.load({str(expected)!r}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("family", ["opt", "gemma3", "qwen3", "mistral"])
def test_portable_on_other_families(family: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model(family), recipe(portable=True, reduction=0.15))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_compressed_checkpoint_is_not_compressed_again(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    for keyword in ("compression_config", "quantization_config"):
        with pytest.raises(ConfigurationError, match="compressed already"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **{keyword: recipe()})
    with pytest.raises(ConfigurationError, match="compressed already"):
        hf_compress.compress(model, recipe())
    with pytest.raises(ValueError, match="(?i)quantiz"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction": 1.0}, r"share in \[0, 1\)"),
        ({"reduction": -0.1}, r"share in \[0, 1\)"),
        ({"reduction": {}}, "at least one kind"),
        ({"reduction": {"mlp": 0.2}, "kinds": ["mlp"]}, "either one"),
        ({"reductoin": 0.2, "reduction": 0.2}, "Did you mean `reduction`"),
        ({"kinds": "mlp"}, "list of kinds"),
        ({"kinds": ["mlp", "heads"]}, "query_key"),
        ({"kinds": []}, "at least one kind"),
        ({"temperature": 0}, "above 0"),
        ({"ridge": 0}, "ridge"),
        ({"portable": True, "kinds": ["query_key"]}, "MLPs only"),
        ({"portable": True, "allocation": "search"}, "nothing to search"),
        ({}, "reduction"),
    ],
)
def test_recipes_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModularDecompositionConfig(**({"reduction": 0.2} | fields if fields else {}))


def test_recipes_are_immutable_and_serialise_without_inputs() -> None:
    config = recipe(reduction={"mlp": 0.25, "query_key": 0.1})
    with pytest.raises(Exception, match="frozen"):
        config.reduction = 0.5  # type: ignore[misc]
    stored = json.loads(json.dumps(CompressionConfig.wrap(config).to_dict()))
    assert "calibration" not in json.dumps(stored)
    assert CompressionConfig.wrap(stored).stages[0].to_dict() == config.to_dict()


def test_unreachable_reduction_stops_before_the_weights(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dense / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel._load_pretrained_model", _interrupt)
    with pytest.raises(ConfigurationError, match=r"reaches reduction=0\."):
        AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe(reduction=0.9, kinds=["mlp"]))
    with pytest.raises(CalibrationError, match="Add calibration="):
        AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe(calibration=None))


def test_reduction_per_kind(dense: Path) -> None:
    model = hf_compress.compress(make_model("llama"), recipe(reduction={"mlp": 0.25, "query_key": 0.5}))
    shares = {"mlp": [0, 0], "query_key": [0, 0]}
    for row in model.compression_report.modules:
        shares[row.kind][0] += row.parameters_before
        shares[row.kind][1] += row.parameters_after
    blocks = 4
    full = {"mlp": blocks * 3 * 48 * 64, "query_key": blocks * 48 * (64 + 32)}
    for kind, (before, after) in shares.items():
        expected = {"mlp": 0.25, "query_key": 0.5}[kind]
        assert (before - after) / full[kind] == pytest.approx(expected, abs=0.04)


def test_modules_to_not_convert() -> None:
    skip = ["model.layers.0", "mlp.down_proj"]
    model = compressed("llama", kinds=["query_key", "value_output"], reduction=0.1, modules_to_not_convert=skip)
    changed = [entry["path"] for entry in layout_of(model)]
    assert changed and not any("layers.0." in path or "mlp" in path for path in changed)
    assert any("modules_to_not_convert" in reason for reason in model.compression_report.left_alone)
    assert model.compression_report.block_linear_reduction == pytest.approx(0.1, abs=0.02)


def test_nan_weights_are_named() -> None:
    model = make_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        hf_compress.compress(model, recipe())


def test_overflowing_activations_are_named() -> None:
    model = make_model("llama", torch.float16)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(60000.0)
    with pytest.raises(NumericalError, match=r"model\.layers\.1"):
        hf_compress.compress(model, recipe(allocation="uniform", kinds=["mlp"]))


def test_a_module_that_the_data_never_reaches_is_named() -> None:
    model = make_model("opt")
    layer = model.model.decoder.layers[1]
    layer.fc1.weight.data.zero_()
    layer.fc1.bias.data.fill_(-1.0)
    with pytest.raises(NumericalError, match=r"layers\.1\.fc2.*never reaches"):
        hf_compress.compress(model, recipe(allocation="uniform", kinds=["mlp"], reduction=0.2))


def test_tokens_beyond_the_vocabulary() -> None:
    with pytest.raises(CalibrationError, match="500"):
        hf_compress.compress(make_model("llama"), recipe(calibration=CalibrationConfig(token_ids() * 0 + 500)))


def test_texts_without_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match="processing_class=tokenizer"):
        hf_compress.compress(make_model("llama"), recipe(calibration=CalibrationConfig(["some text " * 50])))


def test_no_held_out_sequences() -> None:
    with pytest.raises(ConfigurationError, match="num_held_out"):
        hf_compress.compress(make_model("llama"), recipe(calibration=calibration(num_held_out=0)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)), "decoder-only"),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, num_heads=2)), "decoder-only"),
        (
            lambda: FalconForCausalLM(FalconConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2)),
            "register_anatomy",
        ),
    ],
)
def test_unknown_families_say_what_was_found(build: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        hf_compress.compress(build(), recipe())


@pytest.mark.usefixtures("unchecked_types")
def test_no_model_at_all() -> None:
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        hf_compress.compress(torch.nn.Linear(2, 2), recipe())  # type: ignore[arg-type]


def test_a_family_can_be_registered_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_compress.anatomy import records

    monkeypatch.setattr(records, "_RECORDS", dict(records._RECORDS))
    model = make_model("llama")
    model.config.model_type = "mine"
    with pytest.raises(UnsupportedModelError, match="mine"):
        hf_compress.compress(model, recipe())
    with pytest.raises(ConfigurationError, match="already"):
        register_anatomy(Anatomy(model_types=("llama",)))
    register_anatomy(Anatomy(model_types=("mine",), mlp=MlpAnatomy(up="up_projection")))
    with pytest.raises(UnsupportedModelError, match=r"up_projection.*Found 4 blocks"):
        hf_compress.compress(model, recipe())
    register_anatomy(Anatomy(model_types=("mine",), attention=AttentionAnatomy()), replace=True)
    assert layout_of(hf_compress.compress(model, recipe(kinds=ALL_KINDS)))


def test_plan_tells_what_the_run_then_does(dense: Path) -> None:
    for kinds in (["mlp"], list(ALL_KINDS), "auto"):
        expected = hf_compress.plan(dense, recipe(kinds=kinds))
        model = hf_compress.compress(make_model("llama"), recipe(kinds=kinds))
        # Within half a step of the sizes, which on this tiny model is half a percent.
        assert expected.parameters_after == pytest.approx(model.compression_report.parameters_after, rel=0.01)
    assert "bytes on disk" in str(expected)
    assert os.path.getsize(dense / "model.safetensors") == pytest.approx(expected.bytes_before, rel=0.05)


def test_training_mode_is_kept() -> None:
    model = make_model("llama").train()
    assert hf_compress.compress(model, recipe()).training


@pytest.mark.parametrize("options", [{"allocation": "search", "search_minutes": 0.02}, {"temperature": "auto"}])
def test_choices_on_held_out_data_are_reported(options: dict[str, Any]) -> None:
    notes = compressed("llama", **options).compression_report.notes
    if "temperature" in options:
        assert notes["temperature"] in (0.02, 0.035, 0.05, 0.08, 0.15, 1.0)
    else:
        assert notes["search"]["held_out_perplexity_after"] <= notes["search"]["held_out_perplexity_before"]


def test_the_base_model_and_the_model_with_a_head_load_each_other(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert layout_of(again) == layout_of(model)


def test_dequantize_after_saving(tmp_path: Path) -> None:
    model = compressed("llama", torch.float64)
    before = logits(model)
    model.save_pretrained(tmp_path)
    model.dequantize()
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)


def failing(block: int) -> PreTrainedModel:
    """A model in training mode whose block yields NaN."""
    model = make_model("llama").train()
    model.model.layers[block].mlp.down_proj.register_forward_hook(lambda *a: a[2] * float("nan"))
    return model


def test_a_failure_before_the_first_block_leaves_the_model_as_it_was() -> None:
    model = failing(2)
    with pytest.raises(NumericalError, match=r"layers\.2"):
        hf_compress.compress(model, recipe(kinds=["mlp"]))
    assert layout_of(model) == []
    assert all(module.training for module in model.modules())


def test_a_half_compressed_model_is_neither_saved_nor_compressed_again(tmp_path: Path) -> None:
    model = failing(2)
    with pytest.raises(NumericalError, match=r"layers\.2"):
        hf_compress.compress(model, recipe(kinds=["mlp"], allocation="uniform"))
    assert model.training
    with pytest.raises(CheckpointError, match="Load the dense model again"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="Load the dense model again"):
        hf_compress.compress(model, recipe())
    assert list(tmp_path.iterdir()) == []


def test_a_model_made_in_inference_mode_can_be_trained() -> None:
    model = make_model("llama")
    with torch.inference_mode():
        hf_compress.compress(model, recipe(kinds=ALL_KINDS))
    model(IDS, labels=IDS).loss.backward()


def test_search_without_held_out_sequences_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r'allocation="search".*no held-out'):
        compressed("llama", allocation="search", calibration=calibration(num_held_out=0))


def test_search_with_nothing_to_give_says_so() -> None:
    notes = compressed("llama", allocation="search", reduction=0.001).compression_report.notes
    assert "nothing to search" in notes["search"]


def test_a_very_low_temperature_fills_up_to_the_cap() -> None:
    model = compressed("llama", temperature=0.0002, reduction=0.5)
    assert model.compression_report.block_linear_reduction == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kinds", [ALL_KINDS, "auto"])
def test_coarse_steps_still_meet_a_high_budget(kinds: Any) -> None:
    report = compressed("llama", reduction=0.7, rank_multiple=8, kinds=kinds).compression_report
    assert report.block_linear_reduction == pytest.approx(0.7, abs=0.025)


def test_two_stages_of_one_method_are_refused_before_work() -> None:
    model = make_model("llama")
    stages = [recipe(kinds=["query_key"], reduction=0.05), recipe(kinds=["value_output"], reduction=0.05)]
    with pytest.raises(ConfigurationError, match="two stages of the same method"):
        hf_compress.compress(model, CompressionConfig(stages=stages))
    assert layout_of(model) == []


def test_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="slf_attn"):
        compressed("llama", modules_to_not_convert=["slf_attn"])


def test_a_variant_leaves_the_default_weights(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"model.safetensors", "model.fp16.safetensors"}


def test_saving_through_a_link_stays_on_its_file_system(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    compressed("llama").save_pretrained(tmp_path / "link")
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors"]
    )


def test_names_after_saving(tmp_path: Path, dense: Path) -> None:
    portable = AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe(portable=True))
    portable.save_pretrained(tmp_path / "portable")
    assert portable.name_or_path == str(tmp_path / "portable")
    same = AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe(reduction=0.0))
    assert same.name_or_path == str(dense)


def test_a_fresh_model_from_a_compressed_config_is_dense(tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_config(compressed("llama").config)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student.eval()))


def test_a_recipe_dictionary_as_quantization_config(dense: Path) -> None:
    config = {"quant_method": "hf_compress", "stages": [{"method": "modular_decomposition", "reduction": 0.25}]}
    with pytest.raises(CalibrationError, match="Add calibration="):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_indices_outside_the_head_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    compressed("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("rotary_pairs"))
    tensors[name][0, 0] = 10**6
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_compress.CheckpointError, match="rotary_pairs"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_random_state_of_the_caller_is_kept() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    model = make_model("llama")
    torch.manual_seed(3)
    hf_compress.compress(model, recipe())
    assert torch.equal(torch.rand(1), expected)


def test_a_gguf_file_is_unpacked_and_compressed(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real file is a benchmark's and the demo's; here, that the pair of arguments reaches the right places."""
    seen: dict[str, Any] = {}

    def load(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return make_model("llama")

    model = integration._from_pretrained(
        load, LlamaForCausalLM, str(dense), gguf_file="m.gguf", compression_config=recipe()
    )
    assert layout_of(model)
    assert seen["quantization_config"].dequantize is True
    assert seen["gguf_file"] == "m.gguf"
