"""Models and data that calibration once went wrong on: hidden caches, labels of classes, parts that no data reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import VOCABULARY, recipe, token_ids
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForSequenceClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import hf_compress
from hf_compress import CalibrationConfig, CalibrationError, CodebookConfig, ConfigurationError, PruningConfig
from hf_compress.anatomy import resolve_anatomy
from hf_compress.engine.blocks import BlockStream

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}


def data(batches: list[dict[str, torch.Tensor]], held_out: int = 0) -> CalibrationConfig:
    return CalibrationConfig(
        batches,
        data_collator=lambda examples: examples[0],
        num_samples=len(batches),
        num_held_out=held_out,
        batch_size=1,
    )


def texts(padded: bool = False) -> list[dict[str, torch.Tensor]]:
    batches = []
    for start in range(0, 16, 4):
        ids = token_ids()[start : start + 4]
        mask = torch.ones_like(ids)
        if padded:
            mask[1, :5] = 0
        batches.append({"input_ids": ids.clamp(max=90), "attention_mask": mask})
    return batches


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    language = LlamaConfig(vocab_size=VOCABULARY, **SIZES)
    config = LlavaConfig(
        text_config=language,
        vision_config=CLIPVisionConfig(**IMAGES),
        image_token_index=95,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_blocks_keep_nothing_between_their_runs(padded: bool) -> None:
    """LLaVA hands `use_cache` on to its language model, which makes a cache by default."""
    model = llava()
    stream = BlockStream(resolve_anatomy(model), texts(padded))
    first = [stream.run(0, 0), stream.run(0, 0)]
    assert torch.equal(first[0], first[1])
    for block in range(len(stream.anatomy)):
        stream.advance(block)
    with torch.no_grad():
        hidden = model.model(**texts(padded)[0], output_hidden_states=True).hidden_states[-1]
        real = texts(padded)[0]["attention_mask"].bool()
        normed = model.model.language_model.norm(stream.hidden[0])
    torch.testing.assert_close(normed[real], hidden[real], rtol=1e-5, atol=1e-5)
    hf_compress.compress(model, CodebookConfig(bits=3, calibration=data(texts(padded))))


def test_a_width_that_others_share_is_not_portable() -> None:
    model = SiglipVisionModel(SiglipVisionConfig(**IMAGES))
    images = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)]
    with pytest.raises(ConfigurationError, match=r"head\.mlp\.fc1"):
        hf_compress.compress(model, recipe(portable=True, calibration=data(images)))


def test_dequantizing_leaves_the_attentions_of_others_alone() -> None:
    def gpt2() -> Any:
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=4, n_positions=64)
        return GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()

    compressed = hf_compress.compress(gpt2(), recipe(reduction={"value_output": 0.5}))
    assert len(compressed(token_ids(2, 8), output_attentions=True).attentions) == 3
    dense = compressed.dequantize()
    for model in (dense, gpt2()):
        assert len(model(token_ids(2, 8), output_attentions=True).attentions) == 3


def test_texts_for_a_model_of_images() -> None:
    with pytest.raises(CalibrationError, match="reads 'pixel_values'"):
        hf_compress.compress(ViTModel(ViTConfig(**IMAGES)), CodebookConfig(bits=3, calibration=data(texts())))


def test_labels_of_classes_are_no_decoder_inputs() -> None:
    torch.manual_seed(0)
    model = BartForSequenceClassification(BartConfig(**BART, eos_token_id=2)).eval()
    batches = texts()
    for batch in batches:
        batch["input_ids"] = torch.cat((batch["input_ids"][:, :-1].clamp(min=3), torch.full((4, 1), 2)), dim=1)
        batch["labels"] = torch.zeros(4, dtype=torch.long)
    hf_compress.compress(model, CodebookConfig(bits=3, calibration=data(batches)))
    assert model.compression_report.modules


@pytest.mark.parametrize("config", [CodebookConfig(bits=3), PruningConfig(sparsity=0.5, criterion="wanda")])
def test_matrices_that_no_data_reach_are_named(config: Any) -> None:
    torch.manual_seed(0)
    model = BartForCausalLM(BartConfig(**BART)).eval()
    with pytest.warns(UserWarning, match=r"never run through .*encoder_attn"):
        hf_compress.compress(model, config, calibration=data(texts()))
    assert any("encoder_attn.k_proj" in row.path for row in model.compression_report.modules)
