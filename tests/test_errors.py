"""Models, data and recipes that do not fit are refused with an error that names the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import calibration, compressed, interrupt, make_model, recipe, token_ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
)

import hf_compress
from hf_compress import (
    CalibrationConfig,
    CalibrationError,
    CheckpointError,
    CompressionConfig,
    ConfigurationError,
    NumericalError,
    UnsupportedModelError,
)
from hf_compress.layout import layout_of


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


def test_unreachable_reduction_stops_before_the_weights(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dense / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel._load_pretrained_model", interrupt)
    with pytest.raises(ConfigurationError, match=r"reaches reduction=0\."):
        AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe(reduction=0.9, kinds=["mlp"]))
    with pytest.raises(CalibrationError, match="Add calibration="):
        AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe(calibration=None))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("no/such/texts.txt", {}, "is no file or folder"),
        ("rows.jsonl", {"text_column": "body"}, "no column 'body'"),
    ],
)
@pytest.mark.parametrize("keyword", ["compression_config", "quantization_config"])
def test_missing_calibration_data_stop_before_the_weights(
    dense: Path, monkeypatch: pytest.MonkeyPatch, keyword: str, dataset: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(dense)
    Path("rows.jsonl").write_text('{"a": "x", "b": "y"}\n')
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel._load_pretrained_model", interrupt)
    config = recipe(calibration=CalibrationConfig(dataset, **options))
    with pytest.raises(CalibrationError, match=message):
        AutoModelForCausalLM.from_pretrained(dense, **{keyword: config})
    # Nothing is to be measured, so nothing is missing.
    with pytest.raises(KeyboardInterrupt):
        AutoModelForCausalLM.from_pretrained(dense, **{keyword: config.model_copy(update={"reduction": 0.0})})


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
        (
            lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
            "only single matrices",
        ),
        (lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=96)), "no anatomy record"),
        (lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2)), "register_anatomy"),
    ],
)
def test_unknown_families_say_what_was_found(build: Any, message: str, tmp_path: Path) -> None:
    model = build()
    with pytest.raises(UnsupportedModelError, match=message) as found:
        hf_compress.compress(model, recipe())
    with pytest.raises(UnsupportedModelError) as planned:
        hf_compress.plan(model, recipe())
    assert str(planned.value) == str(found.value)
    # From the config alone the class is not known: Transformers may know another one for it.
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        hf_compress.plan(tmp_path, recipe())


def test_an_image_model_given_text() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    model = AutoModel.from_config(ViTConfig(**sizes, image_size=16, patch_size=4))
    with pytest.raises(CalibrationError, match="pixel_values"):
        hf_compress.compress(model, recipe())


@pytest.mark.usefixtures("unchecked_types")
def test_no_model_at_all() -> None:
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        hf_compress.compress(torch.nn.Linear(2, 2), recipe())  # type: ignore[arg-type]


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


def test_search_without_held_out_sequences_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r'allocation="search".*no held-out'):
        compressed("llama", allocation="search", calibration=calibration(num_held_out=0))


def test_two_stages_of_one_method_are_refused_before_work() -> None:
    model = make_model("llama")
    stages = [recipe(kinds=["query_key"], reduction=0.05), recipe(kinds=["value_output"], reduction=0.05)]
    with pytest.raises(ConfigurationError, match=r"stage 2 \(ModularDecompositionConfig\) cannot work on"):
        hf_compress.compress(model, CompressionConfig(stages=stages))
    assert layout_of(model) == []


def test_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="slf_attn"):
        compressed("llama", modules_to_not_convert=["slf_attn"])


def test_a_recipe_dictionary_as_quantization_config(dense: Path) -> None:
    config = {"quant_method": "hf_compress", "stages": [{"method": "modular_decomposition", "reduction": 0.25}]}
    with pytest.raises(CalibrationError, match="Add calibration="):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
