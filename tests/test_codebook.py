"""Learned codebooks on models: sizes, what learning brings, casts, adapters, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import IDS, calibration, logits, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_compress
from hf_compress import CodebookConfig
from hf_compress.methods.codebook import CodebookLinear
from hf_compress.methods.codebook.weight import CodebookFormat


def coded(family: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    defaults: dict[str, Any] = {"bits": 3, "learning": "none"}
    return hf_compress.compress(make_model(family, dtype), CodebookConfig(**{**defaults, **fields}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    coded().save_pretrained(tmp_path / "coded")
    return tmp_path / "coded"


def packed_layers(model: PreTrainedModel) -> dict[str, CodebookLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CodebookLinear)}


def test_learning_earns_its_time() -> None:
    dense = logits(make_model("llama"))

    def error(**fields: Any) -> float:
        return float((logits(coded(**fields)) - dense).square().mean() / dense.square().mean())

    alone = error()
    feedback = error(learning="feedback", calibration=calibration())
    joint = error(learning="joint", calibration=calibration())
    assert joint < 0.9 * feedback < 0.8 * alone


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_are_counted_with_all_that_belongs_to_them(bits: int, tmp_path: Path) -> None:
    model = coded(bits=bits, rows_per_codebook=16)
    layers = packed_layers(model)
    assert len(layers) == 4 * 7
    stored = sum(t.numel() * t.element_size() for layer in layers.values() for t in layer.buffers())
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    report = model.compression_report
    assert report.bits_per_weight == pytest.approx(8 * stored / weights)
    assert report.block_linear_reduction == 0
    assert report.parameters_after == report.parameters_before
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == report.bytes_after


def test_the_plan_is_met_to_the_byte(tmp_path: Path) -> None:
    make_model("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    recipe = CodebookConfig(bits={"mlp": 2, "value_output": 4}, learning="none")
    plan = hf_compress.plan(tmp_path / "dense", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", compression_config=recipe)
    assert plan.bytes_on_disk == model.compression_report.bytes_after


def test_kinds_without_bits_stay_dense_and_are_named() -> None:
    model = coded(bits={"mlp": 2, "value_output": 4}, modules_to_not_convert=["layers.3"])
    bits = {name.removeprefix("model.layers."): layer.bits for name, layer in packed_layers(model).items()}
    assert bits["0.mlp.up_proj"] == 2
    assert bits["2.self_attn.o_proj"] == 4
    assert not any("q_proj" in name or name.startswith("3.") for name in bits)
    left = "\n".join(model.compression_report.left_alone)
    assert "layers.0.self_attn.q_proj: no bits for its kind" in left
    assert "layers.3.mlp.up_proj: excluded" in left


@pytest.mark.parametrize("options", [{"column_group": None}, {"column_group": 64}, {"integer_scales": False}])
def test_options_of_the_format_reload_bit_equal(options: dict[str, Any], tmp_path: Path) -> None:
    model = coded(**options)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_indices_are_wide_enough_for_a_vocabulary() -> None:
    def index(books: int) -> torch.Tensor | None:
        format = CodebookFormat(bits=4, books=books, column_group=32, integer_scales=True)
        return CodebookLinear(32, 50_000, False, format=format, device="meta").row_codebook

    assert index(32_767).dtype == torch.int16
    assert index(32_768).dtype == torch.int32
    assert index(1) is None


def test_casts_leave_the_format_alone(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.codebooks.dtype == layer.row_scales.dtype == torch.float16
    reference = layer.matrix()
    for cast in (model.float, model.half, lambda: model.to(torch.bfloat16)):
        cast()
        assert torch.equal(layer.matrix(), reference)
        assert layer.weight.dtype == torch.int32
    assert model.dtype == torch.bfloat16


def test_gradients_reach_the_inputs() -> None:
    model = coded()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    dense = coded()
    dense.dequantize()
    other = embedded.detach().clone().requires_grad_()
    dense(inputs_embeds=other, labels=IDS).loss.backward()
    torch.testing.assert_close(embedded.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_lora_attaches_trains_saves_and_refuses_to_merge(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(adapted))
    with pytest.raises(hf_compress.CompressionError, match="keeps its weights as codes"):
        adapted.merge_and_unload()
    with pytest.raises(hf_compress.CompressionError, match="keeps its weights as codes"):
        adapted.merge_adapter()


def test_compiled_without_graph_breaks(unchecked_types: None) -> None:
    model = coded()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 5, 8, True, 2.5, {"mlp": 7}, {}, {"mpl": 3}])
def test_bits_that_do_not_exist(bits: Any) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match="bits"):
        CodebookConfig(bits=bits)


def test_learning_needs_data() -> None:
    with pytest.raises(hf_compress.CalibrationError, match="calibration"):
        hf_compress.compress(make_model("llama"), CodebookConfig(bits=3))


def test_rows_shorter_than_a_codebook() -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(8, 64, bias=False)
    with pytest.raises(hf_compress.ConfigurationError, match=r"up_proj.*shorter than a codebook of 16"):
        hf_compress.compress(model, CodebookConfig(bits=4, learning="none"))


def tampered(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.1.mlp.up_proj.{name}"
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_codebook_that_does_not_exist_is_refused(saved: Path) -> None:
    tampered(saved, "row_codebook", lambda t: torch.full_like(t, 1000))
    with pytest.raises(hf_compress.CheckpointError, match=r"layers\.1\.mlp\.up_proj.*codebook"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_scales_that_are_not_finite_are_refused(saved: Path) -> None:
    tampered(saved, "row_scales", lambda t: torch.full_like(t, torch.nan))
    with pytest.raises(hf_compress.CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("name", ["weight", "codebooks", "scales", "row_scales", "row_codebook"])
def test_a_missing_tensor_is_refused(saved: Path, name: str) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{name}"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_compress.CheckpointError, match=rf"lacks the tensor.*up_proj\.{name}"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("learning", ["none", "feedback", "joint", "latent"])
def test_zero_and_constant_rows_are_exact(learning: str) -> None:
    model = make_model("llama")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[3], weight[5], weight[7] = 0, 0.7, -0.01
        model.model.layers[2].self_attn.v_proj.weight.zero_()  # so that the inputs of o_proj are zero
    source = None if learning == "none" else calibration()
    hf_compress.compress(model, CodebookConfig(bits=3, learning=learning, calibration=source))
    matrix = model.model.layers[1].mlp.up_proj.matrix()
    assert not matrix[3].any()
    torch.testing.assert_close(matrix[5], torch.full_like(matrix[5], 0.7), rtol=2e-3, atol=0)
    torch.testing.assert_close(matrix[7], torch.full_like(matrix[7], -0.01), rtol=2e-3, atol=0)
    assert not model.model.layers[2].self_attn.v_proj.matrix().any()


@pytest.mark.parametrize("integer_scales", [True, False])
def test_large_weights_fit_or_are_refused(integer_scales: bool) -> None:
    def run(size: float) -> torch.Tensor:
        model = make_model("llama")
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = size
        recipe = CodebookConfig(bits=3, learning="none", integer_scales=integer_scales)
        matrix: torch.Tensor = hf_compress.compress(model, recipe).model.layers[1].mlp.up_proj.matrix()
        return matrix

    assert run(1e6).isfinite().all()
    with pytest.raises(hf_compress.NumericalError, match=r"up_proj.*too large"):
        run(1e20)


def test_dequantize_follows_casts() -> None:
    model = coded(bits={"mlp": 2}).half()
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    model = coded(bits={"mlp": 2})
    model.dequantize(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_truncated_codes_are_refused(saved: Path) -> None:
    tampered(saved, "weight", lambda t: t[:-1])
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 9), ("books", 10**9), ("books", 0), ("column_group", 7), ("integer_scales", 1)]
)
def test_a_hostile_layout_is_refused(saved: Path, field: str, value: object) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["layout"][0]["spec"][field] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(hf_compress.CheckpointError, match=field):
        AutoModelForCausalLM.from_pretrained(saved)
