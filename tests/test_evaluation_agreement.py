"""Agreement with the dense model and peak memory against brute force, and a comparison of it all."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, token_ids
from encoders import make_encoder
from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import ConfigurationError, NumericalError
from hf_compress.evaluation import Score, agreement, compare, measure_memory
from hf_compress.evaluation.agreement import compare_logits
from hf_compress.evaluation.memory import bytes_in_memory, peak_growth


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("count", [5, 32, 50, 64])
def test_agreement_equals_brute_force(count: int, batch_size: int) -> None:
    dense, other = make_model("llama", seed=0), make_model("llama", seed=1)
    ids = token_ids(1, count)[0]
    result = agreement(dense, other, ids, context=16, batch_size=batch_size)
    divergence, equal = 0.0, 0
    for start in range(0, count, 16):
        with torch.no_grad():
            p, q = (model(ids[None, start : start + 16]).logits[0].double().softmax(-1) for model in (dense, other))
        divergence += float((p * (p.log() - q.log())).sum())
        equal += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert result.num_tokens == count
    assert result.kl == pytest.approx(divergence / count, rel=1e-4)
    assert result.top1 == equal / count


def test_a_model_agrees_with_itself_and_less_with_its_noise() -> None:
    dense, noisy = make_model("llama"), make_model("llama")
    ids = token_ids(1, 100)[0]
    same = agreement(dense, make_model("llama"), ids, context=32)
    assert (same.kl, same.top1) == (pytest.approx(0, abs=1e-7), 1.0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert agreement(dense, noisy, ids, context=32).kl > 1e-4


def test_logits_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = torch.randn(2, 11, 7)
    whole = compare_logits(expected, found)
    monkeypatch.setattr(import_module("hf_compress.evaluation.agreement"), "LOGIT_ELEMENTS", 21)
    assert compare_logits(expected, found) == (pytest.approx(whole[0], rel=1e-6), whole[1])


def test_agreement_refuses() -> None:
    dense, ids = make_model("llama"), token_ids(1, 40)[0]
    with pytest.raises(ConfigurationError, match="context >= 1"):
        agreement(dense, dense, ids, context=0)
    with pytest.raises(ConfigurationError, match="128 positions"):
        agreement(dense, dense, token_ids(1, 200)[0], context=200)
    wider = make_model("llama")
    wider.resize_token_embeddings(100)
    with pytest.raises(ConfigurationError, match="96 and 100 logits"):
        agreement(dense, wider, ids, context=16)
    broken = make_model("llama")
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        agreement(dense, broken, ids, context=16)


def test_compare_with_everything() -> None:
    models = {"dense": make_model("llama", seed=0), "other": make_model("llama", seed=1)}

    def count_layers(model: PreTrainedModel, processing_class: Any) -> list[Score]:
        return [Score("layers", float(len(model.model.layers)), 1, higher_is_better=False, note="a note")]

    ids = token_ids(1, 64)[0]
    comparison = compare(
        models, ids, context=32, agreement=True, memory=True, tasks=[count_layers], prompt_length=8, new_tokens=2
    )
    dense, other = comparison.measurements
    assert dense.agreement is None
    assert other.agreement == agreement(models["dense"], models["other"], ids, context=32)
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert plain["other"]["scores"]["layers"]["value"] == 4
    assert plain["other"]["memory"]["peak"] >= plain["other"]["memory"]["weights"]
    assert [row.title for row in comparison.rows] == [
        *("parameters", "peak memory (bytes)", "perplexity", "KL from the first (nats/token)"),
        *("top-1 agreement with the first", "layers", "prompt tokens/s", "generated tokens/s", "first token (ms)"),
    ]
    assert comparison.rows[5].cell(other, dense) == "4.0000 (1.00x)"
    assert any("a note" in note for note in comparison.notes)
    first = other.speed
    assert first is not None
    # The prompt has to be read before the first token is known.
    assert first.first_token_milliseconds >= 1000 * 8 / first.prompt_tokens_per_second * 0.5


def test_peak_growth_sees_what_a_run_takes() -> None:
    size = 2**26
    kept: list[torch.Tensor] = []
    growth = peak_growth(lambda: kept.append(torch.ones(size, dtype=torch.uint8)), torch.device("cpu"))
    # The kernel counts in batches of pages.
    assert 0.98 * size < growth < 1.5 * size
    kept.clear()
    # What was freed before does not hide what is taken again, and a run that takes nothing shows nothing.
    again = peak_growth(lambda: torch.ones(size, dtype=torch.uint8).max(), torch.device("cpu"))
    assert 0.98 * size < again < 1.5 * size
    assert peak_growth(lambda: None, torch.device("cpu")) < size / 8


def test_memory_of_a_model_counts_its_logits_and_its_cache() -> None:
    model = make_model("llama")
    small = measure_memory(model, prompt_length=8, new_tokens=1)
    large = measure_memory(model, prompt_length=100, new_tokens=20, batch_size=256)
    assert small.weights == large.weights == bytes_in_memory(model)
    # Two heads of 16 for keys and values, four layers: the cache alone.
    assert large.growth - small.growth > 256 * 100 * 2 * 16 * 2 * 4 * 4
    assert large.peak == large.weights + large.growth
    assert large.workload == "a prompt of 256×100 tokens and 20 generated ones"


def test_memory_of_encoders() -> None:
    assert measure_memory(make_encoder("bert"), prompt_length=32).workload == "a forward pass of 1×32 tokens"
    assert measure_memory(make_encoder("vit"), batch_size=2).workload == "a forward pass of 2 images of 16×16"


def test_bytes_in_memory_counts_tied_ones_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert bytes_in_memory(model) == 2 * 8 * 8 * 4
    model[1].weight = model[0].weight
    model.register_buffer("extra", torch.zeros(5, dtype=torch.bfloat16))
    assert bytes_in_memory(model) == 8 * 8 * 4 + 10


def test_memory_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="128 positions"):
        measure_memory(make_model("llama"), prompt_length=120, new_tokens=20)
    with pytest.raises(ConfigurationError, match="at least one"):
        measure_memory(make_model("llama"), prompt_length=0)
    monkeypatch.setattr("hf_compress.evaluation.memory._CLEAR", Path("/proc/self/nothing"))
    with pytest.raises(ConfigurationError, match="Linux"):
        measure_memory(make_model("llama"), prompt_length=8, new_tokens=1)
