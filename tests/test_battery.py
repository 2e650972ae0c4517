"""What every method must do on every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import EXPERTS, FAMILIES, IDS, METHODS, compress_with, logits, make_model
from transformers import AutoModelForCausalLM

import hf_compress
from hf_compress.layout import layout_of

pytestmark = pytest.mark.parametrize("method", sorted(METHODS))


@pytest.fixture(params=sorted({**FAMILIES, **EXPERTS}))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_save_and_reload_is_bit_equal(method: str, family: str, tmp_path: Path) -> None:
    model = compress_with(method, family, torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    assert str(again.compression_report) == str(model.compression_report)
    assert again.name_or_path == str(tmp_path) == model.name_or_path


def test_generation_with_a_cache_equals_without(method: str, family: str) -> None:
    model = compress_with(method, family)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = IDS[:, :10]
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_static_cache_equals_dynamic(method: str, family: str) -> None:
    model = compress_with(method, family)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    ids = IDS[:, :6]
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids, **options))


def test_left_padding_changes_nothing(method: str, family: str) -> None:
    model = compress_with(method, family)
    ids = IDS[:1, :9]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 9:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 13:], alone)


def test_beam_search_runs(method: str, family: str) -> None:
    model = compress_with(method, family)
    result = model.generate(IDS[:, :8], num_beams=3, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert result.shape == (3, 13)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_back_ends_agree(method: str, family: str, implementation: str) -> None:
    if family == "gemma2":
        implementation = "eager"  # its softcap is refused by sdpa, for the dense model as well
    model = compress_with(method, family)
    reference = logits(model)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter(method: str, family: str) -> None:
    model = compress_with(method, family).train()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith(".k_proj.bias"):
            continue  # a constant on all keys of a head without rotary embedding leaves the softmax unchanged
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if "embed_positions" not in name:
            assert parameter.grad.abs().max() > 0, name


def test_the_same_inputs_give_the_same_bytes(method: str, family: str) -> None:
    again = hf_compress.compress(make_model(family), METHODS[method]())
    first, second = compress_with(method, family).state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dequantize_gives_the_same_function(method: str, family: str) -> None:
    if method == "modular" and family in ("qwen2", "qwen3", "qwen3_moe", "gemma3"):
        pytest.skip("no dense form, see test_modular.py")
    model = compress_with(method, family, torch.float64)
    before = logits(model)
    model.dequantize()
    assert layout_of(model) == []
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in make_model(family).named_parameters()
    }
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
