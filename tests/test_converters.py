"""A portable checkpoint goes through converters that know nothing of this package, and runs in their runtimes."""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
import torch
from conftest import VOCABULARY, recipe, token_ids
from ctranslate2.converters import TransformersConverter
from support.exporting import assert_same, through_onnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import hf_compress

DENSE_WIDTH = 96


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=DENSE_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    hf_compress.compress(model, recipe(portable=True, reduction=0.3))
    folder = tmp_path_factory.mktemp("portable")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["intermediate_size"] < DENSE_WIDTH
    assert "quantization_config" not in stored
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.usefixtures("unchecked_types")
def test_onnx(model: PreTrainedModel, tmp_path: Path) -> None:
    assert_same(through_onnx(model, tmp_path), model)


def test_ctranslate2(
    checkpoint: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its own converter reads the folder, as `ct2-transformers-converter --model` does."""
    TransformersConverter(str(checkpoint)).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", inter_threads=1, intra_threads=1)
    ids = token_ids(2, 20, seed=5)
    found = np.array(generator.forward_batch(ids.tolist()))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)

    prompt = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    (result,) = generator.generate_batch([prompt], max_length=8, sampling_topk=1, include_prompt_in_result=False)
    greedy = model.generate(ids[:1], max_new_tokens=8, do_sample=False)[0, 20:].tolist()
    assert result.sequences_ids[0] == greedy
