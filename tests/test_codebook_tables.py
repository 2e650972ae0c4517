"""Embedding and head as codes, tied and untied: one table, every way to load, move, train and undo it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import FAMILIES, IDS, calibration, logits, make_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
)

import hf_compress
from hf_compress import CodebookConfig
from hf_compress.methods.codebook.modules import CodebookEmbedding, CodebookLinear, CodebookTiedLinear

TABLES: dict[str, Any] = {"mlp": 3, "embedding": 4}


def tied_llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = True
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def untied_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = False
    return AutoModelForCausalLM.from_config(config).eval()


def compressed(model: PreTrainedModel, bits: Any = None, **fields: Any) -> PreTrainedModel:
    options = {"learning": "none", **fields}
    return hf_compress.compress(model, CodebookConfig(bits=bits or TABLES, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "opt", "qwen2"])
def test_a_coded_table_is_the_dense_table_of_its_values(family: str, tmp_path: Path) -> None:
    model = compressed(make_model(family))
    layer = model.get_input_embeddings()
    assert isinstance(layer, CodebookEmbedding)
    reference = make_model(family)
    with torch.no_grad():
        reference.get_input_embeddings().weight.copy_(layer.matrix())
        if not reference.config.get_text_config().tie_word_embeddings:
            reference.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
    for path, module in model.named_modules():
        if isinstance(module, CodebookLinear):
            reference.get_submodule(path).weight.data.copy_(module.matrix())
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_tied_table_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model = compressed(tied_llama())
    head = model.lm_head
    assert isinstance(head, CodebookTiedLinear)
    assert not head.state_dict()
    assert head.source is model.model.embed_tokens
    assert [row.kind for row in model.compression_report.modules if row.block < 0] == ["embedding"]
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.embed_tokens.codebooks" in names
    assert not any(name.startswith("lm_head") for name in names)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert again.lm_head.source is again.model.embed_tokens
        again.tie_weights()
        assert torch.equal(logits(again), logits(model))
    moved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert moved.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert moved.float().model.embed_tokens(IDS).dtype == torch.float32
    assert torch.equal(moved.model.embed_tokens.matrix(), model.model.embed_tokens.matrix())


def test_untied_tables_have_bits_of_their_own(tmp_path: Path) -> None:
    bits = {"mlp": 2, "embedding": 3, "head": 4}
    model = compressed(untied_llama(), bits, learning="joint", calibration=calibration())
    assert (model.model.embed_tokens.format.bits, model.lm_head.bits) == (3, 4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_learning_the_head_lowers_the_error_of_the_logits() -> None:
    dense = logits(tied_llama())

    def error(**fields: Any) -> float:
        return float((logits(compressed(tied_llama(), {"embedding": 2}, **fields)) - dense).square().mean())

    assert error(learning="joint", calibration=calibration()) < 0.9 * error()


def test_the_base_model_and_other_heads_load_without_the_head(tmp_path: Path) -> None:
    model = compressed(tied_llama())
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS)[0], model.model(IDS)[0])
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert isinstance(classifier.model.embed_tokens, CodebookEmbedding)


def test_a_table_compressed_without_a_head_serves_one(tmp_path: Path) -> None:
    base = tied_llama().model
    compressed(base).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.source is model.model.embed_tokens
    assert torch.isfinite(logits(model)).all()


def test_adapters_train_beside_a_coded_table(tmp_path: Path) -> None:
    compressed(tied_llama()).save_pretrained(tmp_path / "coded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(adapted))


def test_resizing_a_coded_table_is_refused() -> None:
    model = compressed(tied_llama())
    assert model.resize_token_embeddings(96) is model.model.embed_tokens
    with pytest.raises(hf_compress.CompressionError, match="cannot be resized"):
        model.resize_token_embeddings(100)


def test_dequantize_ties_again(tmp_path: Path) -> None:
    model = compressed(tied_llama())
    before = logits(model)
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_gradients_pass_through_a_tied_head_and_generation_works() -> None:
    model = compressed(tied_llama()).train()
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].input_layernorm.weight.grad.abs().max() > 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    model.eval()
    assert torch.equal(model.generate(IDS[:, :8], **options), model.generate(IDS[:, :8], use_cache=False, **options))


def test_an_interrupted_run_keeps_the_table(tmp_path: Path) -> None:
    recipe = CodebookConfig(bits=TABLES, calibration=calibration())
    whole = hf_compress.compress(tied_llama(), recipe)
    hf_compress.compress(tied_llama(), recipe, working_directory=tmp_path)
    (tmp_path / "stage-0" / "block-00002.safetensors").unlink()
    again = hf_compress.compress(tied_llama(), recipe, working_directory=tmp_path)
    assert torch.equal(logits(again), logits(whole))


def test_the_plan_counts_the_table(tmp_path: Path) -> None:
    tied_llama(torch.bfloat16).save_pretrained(tmp_path)
    recipe = CodebookConfig(bits=TABLES, learning="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=recipe)
    assert hf_compress.plan(tmp_path, recipe).bytes_on_disk == model.compression_report.bytes_after
    assert model.compression_report.parameters_after == model.compression_report.parameters_before


def test_a_masked_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    model = AutoModelForMaskedLM.from_config(config).eval()
    dense = logits(model)
    compressed(model, {"mlp": 4, "embedding": 4})
    assert isinstance(model.cls.predictions.decoder, CodebookTiedLinear)
    assert float((logits(model) - dense).square().mean() / dense.square().mean()) < 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path)), logits(model))


def test_wishes_that_cannot_be_met() -> None:
    with pytest.raises(hf_compress.ConfigurationError, match="one table"):
        compressed(tied_llama(), {"embedding": 4, "head": 3})
    base = AutoModel.from_config(LlamaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, intermediate_size=64))
    with pytest.raises(hf_compress.ConfigurationError, match="no linear head"):
        compressed(base, {"head": 4})
    model = tied_llama()
    model.model.embed_tokens = torch.nn.Embedding(96, 48, max_norm=1.0)
    with pytest.raises(hf_compress.ConfigurationError, match="more than look vectors up"):
        compressed(model, {"embedding": 4})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"target_modules": ["lm_head"]}, "target_modules"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_adapters_that_need_dense_weights_are_refused(options: dict[str, Any], field: str) -> None:
    model = compressed(tied_llama(), {"mlp": 2, "query_key": 3, "embedding": 4})
    with pytest.raises(hf_compress.CompressionError, match=f"`{field}`.*keeps codes"):
        peft.get_peft_model(model, peft.LoraConfig(**options))


def test_prompt_tuning_on_a_coded_table_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(hf_compress.CompressionError, match="`peft_type`"):
        peft.get_peft_model(compressed(tied_llama()), config)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_dequantize_restores_a_scaled_table(family: str) -> None:
    model = compressed(make_model(family), {"embedding": 4}, rows_per_codebook=8)
    before = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_config_that_ties_what_has_codes_of_its_own(tmp_path: Path) -> None:
    compressed(untied_llama(), {"embedding": 4, "head": 4}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(hf_compress.CheckpointError, match="codes of its own"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_head_tied_to_what_is_not_there(tmp_path: Path) -> None:
    compressed(tied_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = next(e for e in config["quantization_config"]["layout"] if e["path"] == "lm_head")
    entry["spec"]["source"] = "model.nope"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hf_compress.CheckpointError, match="is tied to 'model.nope'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("trainable", [False, True])
def test_offloaded_to_disk(trainable: bool, tmp_path: Path) -> None:
    model = compressed(untied_llama(), {"mlp": 1.58, "embedding": 4}, trainable_codebooks=trainable)
    model.save_pretrained(tmp_path / "coded")
    for buffers in (False, True):
        options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off", "offload_buffers": buffers}
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "coded", **options)
        assert torch.equal(logits(again), logits(model))
