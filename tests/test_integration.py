"""The doors through which a user comes: from_pretrained, compress, pipeline, GGUF, a family of his own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import ALL_KINDS, calibration, interrupt, make_model, recipe, token_ids
from peft import PeftMixedModel, PeftModel
from transformers import (
    AutoModelForCausalLM,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)
from transformers.integrations import PeftAdapterMixin

import hf_compress
from hf_compress import (
    Anatomy,
    AttentionAnatomy,
    CalibrationConfig,
    CalibrationError,
    CompressionConfig,
    ConfigurationError,
    MlpAnatomy,
    UnsupportedModelError,
    integration,
    register_anatomy,
)
from hf_compress.layout import layout_of

IDS = token_ids(2, 16, seed=7)


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
    places = [
        (PreTrainedModel, "from_pretrained"),
        (PreTrainedModel, "save_pretrained"),
        (PreTrainedModel, "push_to_hub"),
        (PeftAdapterMixin, "add_adapter"),
        (PeftModel, "__init__"),
        (PeftMixedModel, "__init__"),
    ]

    def wrapped() -> list[Any]:
        return [owner.__dict__[name] for owner, name in places]

    before, finders = wrapped(), list(sys.meta_path)
    integration.install()
    assert wrapped() == before
    assert sys.meta_path == finders
    integration.uninstall()
    integration.uninstall()
    assert not any(hasattr(getattr(owner, name), "_hf_compress_original") for owner, name in places)
    assert len(sys.meta_path) == len(finders) - 1
    integration.install()
    assert all(hasattr(getattr(owner, name), "_hf_compress_original") for owner, name in places)
    assert sys.meta_path == finders


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


def test_training_mode_is_kept() -> None:
    model = make_model("llama").train()
    assert hf_compress.compress(model, recipe()).training


def test_a_model_made_in_inference_mode_can_be_trained() -> None:
    model = make_model("llama")
    with torch.inference_mode():
        hf_compress.compress(model, recipe(kinds=ALL_KINDS))
    model(IDS, labels=IDS).loss.backward()


def test_the_random_state_of_the_caller_is_kept() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    model = make_model("llama")
    torch.manual_seed(3)
    hf_compress.compress(model, recipe())
    assert torch.equal(torch.rand(1), expected)


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in a GGUF file and nothing else."""
    folder = tmp_path_factory.mktemp("gguf")
    model = make_model("llama")
    config = model.config
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained])
@pytest.mark.parametrize("keyword", ["compression_config", "quantization_config"])
def test_a_gguf_file_is_unpacked_and_compressed(gguf_folder: Path, keyword: str, load: Any) -> None:
    model = load(gguf_folder, gguf_file="m.gguf", **{keyword: recipe()})
    assert layout_of(model)
    dense = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file="m.gguf", quantization_config=GgufConfig(dequantize=True)
    )
    assert torch.equal(logits(model), logits(hf_compress.compress(dense, recipe())))


@pytest.mark.parametrize("source", ["dense", "gguf"])
def test_loading_info_comes_beside_the_compressed_model(source: str, dense: Path, gguf_folder: Path) -> None:
    options = {"gguf_file": "m.gguf"} if source == "gguf" else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        gguf_folder if source == "gguf" else dense, compression_config=recipe(), output_loading_info=True, **options
    )
    assert layout_of(model)
    assert not info["missing_keys"]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"reduction": 0.9, "kinds": ["mlp"]}, ConfigurationError, r"reaches reduction=0\."),
        ({"calibration": None}, CalibrationError, "Add calibration="),
        ({"calibration": CalibrationConfig("no/such/texts.txt")}, CalibrationError, "is no file or folder"),
    ],
)
@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained])
def test_a_gguf_file_is_not_unpacked_for_a_recipe_that_cannot_be_met(
    gguf_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    load: Any,
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.GgufHfQuantizer.get_state_dict", interrupt)
    with pytest.raises(error, match=message):
        load(gguf_folder, gguf_file="m.gguf", compression_config=recipe(**fields))
