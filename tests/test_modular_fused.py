"""Modular decomposition of families whose query, key and value, or gate and up, are one matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from brute_force import Projections, best_down, inputs_of, matrix
from conftest import ALL_KINDS, calibration, recipe, token_ids
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    Phi3Config,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

import hf_compress
from hf_compress import CodebookConfig, CompressionConfig, ConfigurationError
from hf_compress.anatomy import resolve_anatomy
from hf_compress.layout import layout_of
from hf_compress.methods.modular.compress import compress_block
from hf_compress.methods.modular.statistics import collect_statistics

IDS = token_ids(3, 20, seed=5)
_SIZES: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LAYERS: dict[str, Any] = {**_SIZES, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_PHI: dict[str, Any] = {**_LAYERS, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 64}
FUSED: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(
        **_SIZES, n_embd=64, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_LAYERS, intermediate_size=96, max_position_embeddings=64, rotary_pct=0.5),
    "gpt_neox_serial": lambda: GPTNeoXConfig(
        **_LAYERS, intermediate_size=96, max_position_embeddings=64, rotary_pct=1.0, use_parallel_residual=False
    ),
    "phi3": lambda: Phi3Config(**_PHI, sliding_window=8),
    "phi3_partial": lambda: Phi3Config(
        **_PHI, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    ),
}
# A part of every head turns: queries and keys stay dense.
PARTIAL = ("gpt_neox", "phi3_partial")
KINDS = {name: ("mlp", "value_output") if name in PARTIAL else ALL_KINDS for name in FUSED}


@pytest.fixture(params=sorted(FUSED))
def fused(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FUSED[name](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.shape[0] != 96 or parameter.shape[1] != 64:
                parameter.mul_(4)
    return model.eval()


def compressed(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    return hf_compress.compress(make(name, dtype), recipe(**{"kinds": KINDS[name], "reduction": 0.2, **fields}))


@functools.cache
def compressed_once(name: str) -> PreTrainedModel:
    """For tests that leave the model as it is."""
    return compressed(name)


def logits(model: PreTrainedModel, ids: Tensor = IDS, **kwargs: object) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **kwargs).logits
    return found


def reduce(model: PreTrainedModel, block: int, sizes: dict[str, int], **fields: Any) -> Any:
    anatomy = resolve_anatomy(model)
    with collect_statistics(anatomy, block, set(sizes)) as statistics:  # type: ignore[arg-type]
        logits(model, token_ids(16, 32))
    return compress_block(anatomy, recipe(**fields), block, sizes, statistics)  # type: ignore[arg-type]


def test_reduction_zero_changes_nothing(fused: str) -> None:
    model = hf_compress.compress(make(fused), recipe(reduction=0.0, calibration=None))
    assert torch.equal(logits(model), logits(make(fused))) and layout_of(model) == []


def test_full_rank_is_exact(fused: str) -> None:
    model = make(fused)
    dense = logits(model)
    for block in range(3):
        size = resolve_anatomy(model).model.config.hidden_size // 4
        width = {"gpt2": 256}.get(fused, 96)
        sizes = {"mlp": width, "value_output": size} | ({} if fused in PARTIAL else {"query_key": size})
        for path, module in reduce(model, block, sizes, ridge=1e-12).modules.items():
            model.set_submodule(path, module)
    # Phi-3 norms in float32.
    tolerance = 1e-5 if fused.startswith("phi3") else 1e-9
    torch.testing.assert_close(logits(model), dense, rtol=tolerance, atol=tolerance * float(dense.abs().max()))


def _projections(name: str, model: Any) -> Projections:
    """Query, key and value of block 1, taken apart as the dense classes do it."""
    batch = {"input_ids": token_ids(16, 32)}
    if name == "gpt2":
        attention = model.transformer.h[1].attn
        states = inputs_of(model, attention.c_attn, batch) @ matrix(attention.c_attn) + attention.c_attn.bias
        parts = [part.unflatten(-1, (4, 16)) for part in states.split(64, dim=-1)]
        bias, output = attention.c_attn.bias[128:].view(4, 16), attention.c_proj
    elif name.startswith("gpt_neox"):
        attention = model.gpt_neox.layers[1].attention
        states = attention.query_key_value(inputs_of(model, attention.query_key_value, batch))
        parts = list(states.unflatten(-1, (4, 48)).chunk(3, dim=-1))
        bias, output = attention.query_key_value.bias.view(4, 48)[:, 32:], attention.dense
    else:
        attention = model.model.layers[1].self_attn
        states = attention.qkv_proj(inputs_of(model, attention.qkv_proj, batch))
        parts = [part.unflatten(-1, (-1, 16)) for part in states.split([64, 32, 32], dim=-1)]
        bias, output = torch.zeros(2, 16, dtype=torch.float64), attention.o_proj
    query, key, value = (part.detach().transpose(0, 1) for part in parts)
    return Projections(query, key, value, bias.detach(), matrix(output).unflatten(0, (4, 16)))


def test_attention_is_the_optimum(fused: str) -> None:
    model = make(fused)
    wanted = _projections(fused, model)
    with_query_key = fused == "gpt2"
    sizes = {"value_output": 6} | ({"query_key": 6} if with_query_key else {})
    errors = {row.kind: row.error for row in reduce(model, 1, sizes).rows}
    # Grams are sums of float32 products.
    assert errors["value_output"] == pytest.approx(wanted.value_output_error(6), rel=1e-3)
    if with_query_key:
        assert errors["query_key"] == pytest.approx(wanted.query_key_error(6), rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_mlp_is_the_least_squares_optimum(name: str) -> None:
    model: Any = make(name)
    block = {"gpt2": "transformer.h.1", "gpt_neox": "gpt_neox.layers.1", "phi3": "model.layers.1"}[name]
    up, down = {
        "gpt2": ("mlp.c_fc", "mlp.c_proj"),
        "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
    }[name]
    dense_down, batch = model.get_submodule(f"{block}.{down}"), {"input_ids": token_ids(16, 32)}
    inner = inputs_of(model, dense_down, batch)
    entry = inputs_of(model, model.get_submodule(f"{block}.{up}"), batch)
    dense = inner @ matrix(dense_down)
    result = reduce(model, 1, {"mlp": 64}, ridge=1e-10)
    for path, module in result.modules.items():
        model.set_submodule(path, module)
    with torch.no_grad():
        small = model.get_submodule(f"{block}.mlp")(entry)
    small_down = model.get_submodule(f"{block}.{down}")
    bias = getattr(small_down, "bias", None)
    small = small if bias is None else small - bias.detach()
    # Which channels were kept shows in the new inner states, which are some columns of the old.
    new_inner = inputs_of(model, small_down, batch)
    kept = torch.cdist(new_inner.T, inner.T).argmin(dim=1)
    torch.testing.assert_close(new_inner, inner[:, kept])
    assert len(kept.unique()) == 64
    best = inner[:, kept] @ best_down(inner, matrix(dense_down), kept)
    error, least = (float((states - dense).square().sum()) for states in (small, best))
    assert error == pytest.approx(least, rel=1e-3)
    assert result.rows[0].error == pytest.approx(least / float(dense.square().sum()), rel=1e-2)


@pytest.mark.parametrize("kinds", ["auto", None, ("mlp",), ("value_output",)])
def test_budget_is_met_as_planned(fused: str, kinds: Any) -> None:
    config = recipe(reduction=0.1 if kinds == ("value_output",) else 0.2, kinds=kinds or KINDS[fused])
    plan = hf_compress.plan(make(fused), config)
    model = hf_compress.compress(make(fused), config)
    report = model.compression_report
    step = max(row.parameters_before / row.size_before for row in report.modules) * 16
    tolerance = max(0.005, step / 2 / report.block_linear_before)
    assert report.block_linear_reduction == pytest.approx(config.reduction, abs=tolerance)
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after < report.parameters_before
    assert plan.bytes_on_disk <= report.bytes_after * 1.05 and report.bytes_after <= plan.bytes_at_most


def test_a_uniform_plan_is_exact(fused: str) -> None:
    config = recipe(reduction=0.2, kinds=KINDS[fused], allocation="uniform")
    plan = hf_compress.plan(make(fused), config)
    assert plan.bytes_on_disk == hf_compress.compress(make(fused), config).compression_report.bytes_after


def test_cache_padding_and_back_ends(fused: str) -> None:
    model = compressed_once(fused)
    assert {entry["type"] for entry in layout_of(model)} >= {"attention"}
    whole = logits(model)
    tolerance: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4} if fused.startswith("phi3") else {}
    with torch.no_grad():
        cache, steps = None, []
        for position in range(IDS.shape[1]):
            out = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **tolerance)
    padded = torch.cat((torch.zeros(3, 4, dtype=torch.long), IDS), dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    shifted = logits(model, padded, attention_mask=mask, position_ids=positions)[:, 4:]
    torch.testing.assert_close(shifted, whole, rtol=1e-4, atol=1e-4)
    generated = [model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*generated)
    model.set_attn_implementation("eager")
    eager = logits(model)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(eager, whole, rtol=1e-4, atol=1e-4)


def test_reload_is_bit_equal_and_gradients_flow(fused: str, tmp_path: Path) -> None:
    model = compressed_once(fused)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(again), logits(model))
    again.train()
    again(IDS, labels=IDS).loss.backward()
    without = [name for name, parameter in again.named_parameters() if parameter.grad is None]
    assert without == []


def test_dequantize_gives_the_same_function(fused: str) -> None:
    model = compressed(fused)
    before = logits(model)
    model.dequantize()
    assert layout_of(model) == []
    assert {type(module) for module in model.modules()} == {type(module) for module in make(fused).modules()}
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_a_portable_model_is_plain(name: str, tmp_path: Path) -> None:
    model = compressed(name, torch.float32, kinds="auto", reduction=0.2, portable=True)
    assert layout_of(model) == []
    field = "n_inner" if name == "gpt2" else "intermediate_size"
    width = getattr(model.config, field)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert getattr(plain.config, field) == width and not hasattr(plain.config, "quantization_config")
    assert torch.equal(logits(plain), logits(model))
    if isinstance(model, GPT2LMHeadModel):
        assert type(model.transformer.h[0].mlp.c_fc) is Conv1D and model.transformer.h[0].mlp.c_fc.nf == width


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_codebooks_on_top(name: str, tmp_path: Path) -> None:
    stages = [recipe(kinds=ALL_KINDS, calibration=None), CodebookConfig(bits=3, rows_per_codebook=8)]
    config = CompressionConfig(stages=stages, calibration=calibration())
    model = hf_compress.compress(make(name, torch.float32), config)
    types = {entry["type"] for entry in layout_of(model)}
    assert types >= {"attention", "codebook_linear"}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = logits(model)
    assert torch.equal(logits(again), before)
    again.dequantize()
    torch.testing.assert_close(logits(again), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PARTIAL)
def test_partly_rotary_heads_are_left_alone(name: str) -> None:
    model = compressed_once(name)
    assert any("rotary embedding on a part" in line for line in model.compression_report.left_alone)
    assert all(row.kind != "query_key" for row in model.compression_report.modules)
    with pytest.raises(ConfigurationError, match="query_key"):
        compressed(name, kinds=("query_key",))


def test_attention_that_computes_otherwise_is_left_alone() -> None:
    torch.manual_seed(0)
    config = FUSED["gpt2"]()
    config.reorder_and_upcast_attn = True
    model = AutoModelForCausalLM.from_config(config)
    hf_compress.compress(model, recipe(reduction=0.2, kinds="auto"))
    assert any("reorder_and_upcast_attn" in line for line in model.compression_report.left_alone)
    assert all(not isinstance(module, nn.Linear) or name == "lm_head" for name, module in model.named_modules())
