"""Gradient learners against autograd, mixed bits against brute force, tuning, trainable tables, 1.58 bits, kinds of
layers beside nn.Linear."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IDS, calibration, logits, make_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    PreTrainedModel,
    ResNetConfig,
)

import hf_compress
from hf_compress import CalibrationConfig, CodebookConfig
from hf_compress.kernels.ternary import pack_ternary, ternary_bytes, unpack_ternary
from hf_compress.methods.codebook import gradient, mathematics
from hf_compress.methods.codebook.allocation import allocate_bits
from hf_compress.methods.codebook.coded import Coded, as_stored
from hf_compress.methods.codebook.modules import CodebookConv2d, CodebookLinear


def coded(family: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    return hf_compress.compress(make_model(family, dtype), CodebookConfig(calibration=calibration(), **fields))


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, Coded]:
    torch.manual_seed(0)
    inputs = torch.randn(300, 64, dtype=torch.float64) @ torch.randn(64, 64, dtype=torch.float64)
    gram = mathematics.damped(inputs.T @ inputs, 0.01)
    weight = torch.randn(16, 64, dtype=torch.float64)
    start = mathematics.start(
        weight,
        gram.diagonal(),
        codes=4,
        column_group=32,
        rows_per_codebook=8,
        generator=torch.Generator().manual_seed(0),
    )
    stored = as_stored(start, True)
    return weight, gram, replace(stored, codebooks=stored.codebooks.double(), scales=stored.scales.double())


def test_logit_gradients_are_those_of_the_relaxation(problem: Any) -> None:
    weight, gram, start = problem
    choice = torch.nn.functional.one_hot(start.codes, 4).double().requires_grad_()
    relaxed = start.wide_scales() * (choice * start.tables()[:, None]).sum(dim=2)
    loss = 0.5 * (((relaxed - weight) @ gram) * (relaxed - weight)).sum()
    (found,) = torch.autograd.grad(loss, choice)
    relative = found - found.gather(2, start.codes[..., None])
    slope = (start.matrix() - weight) @ gram
    distance = gradient.logit_gradients(slope, start, "distance")
    torch.testing.assert_close(distance, relative)
    proximal = gradient.logit_gradients(slope, start, "proximal")
    assert torch.equal(proximal.sign(), distance.sign())
    # The further of two codes on the same side receives less.
    lowest = start.codes == 0
    assert bool((proximal[lowest][:, 3].abs() <= proximal[lowest][:, 1].abs()).all())


def test_codebook_gradient_is_autograds(problem: Any) -> None:
    weight, gram, start = problem
    books = start.codebooks.clone().requires_grad_()
    matrix = start.wide_scales() * books[start.row_codebook].gather(1, start.codes)
    (found,) = torch.autograd.grad(0.5 * (((matrix - weight) @ gram) * (matrix - weight)).sum(), books)
    ours = gradient.codebook_gradient((start.matrix() - weight) @ gram, gram, start)
    assert torch.equal(ours.sign(), found.sign())


@pytest.mark.parametrize("kind", ["proximal", "distance", "latent"])
def test_descent_lowers_the_error(problem: Any, kind: Any) -> None:
    weight, gram, start = problem
    weight, start = weight.float(), replace(start, codebooks=start.codebooks.float(), scales=start.scales.float())
    start = mathematics.assign_with_feedback(weight, mathematics.feedback_of(gram), start)
    found = gradient.descend(weight, gram, start, kind, True)
    before, after = (mathematics.relative_error(weight, one.matrix(), gram) for one in (start, found))
    assert after < 0.99 * before


def test_mixed_bits_are_the_best_ones() -> None:
    torch.manual_seed(0)
    sizes = [3, 5, 2, 4, 4]
    losses = [{bits: float(scale) * 4.0**-bits for bits in (2, 3, 4)} for scale in torch.rand(5) * 10]
    for average in (2.0, 2.4, 3.0, 3.7, 4.0):
        chosen = allocate_bits(losses, sizes, average)
        spent = sum(b * s for b, s in zip(chosen, sizes, strict=True))
        assert spent <= average * sum(sizes) + 1e-9
        best = min(
            sum(found[b] for found, b in zip(losses, bits, strict=True))
            for bits in itertools.product((2, 3, 4), repeat=5)
            if sum(b * s for b, s in zip(bits, sizes, strict=True)) <= spent
        )
        found = sum(one[b] for one, b in zip(losses, chosen, strict=True))
        assert found <= best * 1.05
    assert allocate_bits(losses, sizes, 4.0) == [4] * 5
    assert allocate_bits(losses, sizes, 2.0) == [2] * 5


def test_automatic_bits_keep_their_average_and_beat_an_even_spread() -> None:
    model = make_model("llama")
    with torch.no_grad():  # one block that matters and one that does not
        model.model.layers[1].mlp.down_proj.weight.mul_(8)
        model.model.layers[2].mlp.down_proj.weight.mul_(0.05)
    state = model.state_dict()

    def run(**fields: Any) -> PreTrainedModel:
        model = make_model("llama")
        model.load_state_dict(state)
        return hf_compress.compress(model, CodebookConfig(calibration=calibration(), **fields))

    dense = logits(model)
    mixed, even = run(bits="auto", average_bits=3), run(bits=3)
    assert 2.9 < mixed.compression_report.notes["average_bits"] <= 3
    assert {row.size_after for row in mixed.compression_report.modules} == {2, 3, 4}
    errors = [float((logits(one) - dense).square().mean()) for one in (mixed, even)]
    assert errors[0] < 0.9 * errors[1]


def test_automatic_bits_on_heads_of_other_kinds() -> None:
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64)
    for kind in (AutoModelForTokenClassification, AutoModelForMaskedLM, AutoModelForQuestionAnswering):
        model = kind.from_config(config).eval()
        hf_compress.compress(model, CodebookConfig(bits="auto", average_bits=2.5, calibration=calibration()))
        assert model.compression_report.notes["average_bits"] <= 2.5


def test_tuning_lowers_the_error_of_a_block() -> None:
    def first_block(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            states: torch.Tensor = model(IDS, output_hidden_states=True).hidden_states[1]
        return states

    dense = first_block(make_model("llama"))

    def error(epochs: int) -> float:
        found = first_block(coded(bits=2, block_epochs=epochs))
        return float((found - dense).square().mean() / dense.square().mean())

    assert error(3) < 0.95 * error(0)


def test_a_run_that_tunes_resumes(tmp_path: Path) -> None:
    recipe = CodebookConfig(bits=2, block_epochs=1, calibration=calibration())
    whole = hf_compress.compress(make_model("llama"), recipe, working_directory=tmp_path)
    for block in (1, 3):
        (tmp_path / "stage-0" / f"block-0000{block}.safetensors").unlink()
    again = hf_compress.compress(make_model("llama"), recipe, working_directory=tmp_path)
    assert torch.equal(logits(again), logits(whole))


@pytest.mark.parametrize("family", ["llama_bias", "gemma2", "opt"])
def test_tuning_keeps_dtypes_and_reloads(family: str, tmp_path: Path) -> None:
    model = coded(family, torch.bfloat16, bits=2, block_epochs=1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("integer_scales", [True, False])
def test_trainable_tables_are_trained_saved_and_loaded(integer_scales: bool, tmp_path: Path) -> None:
    model = coded(bits=3, learning="none", trainable_codebooks=True, integer_scales=integer_scales)
    names = {name for name, _ in model.named_parameters() if "mlp.up_proj" in name and "layers.0" in name}
    scale = "row_scales" if integer_scales else "scales"
    assert names == {f"model.layers.0.mlp.up_proj.{name}" for name in ("codebooks", scale)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] in ("codebooks", "row_scales", "scales"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = half.model.layers[0].mlp.up_proj
    assert layer.codebooks.dtype == torch.float32
    assert torch.equal(layer.matrix(), model.model.layers[0].mlp.up_proj.matrix())
    assert half.float().dtype == torch.float32
    assert isinstance(layer.codebooks, torch.nn.Parameter)


def test_ternary_codes() -> None:
    codes = torch.randint(3, (7, 33), dtype=torch.uint8)
    packed = pack_ternary(codes)
    assert packed.shape == (7, ternary_bytes(33)) == (7, 7)
    assert torch.equal(unpack_ternary(packed, 33), codes)
    with pytest.raises(hf_compress.ConfigurationError, match="largest is 2"):
        pack_ternary(codes + 1)
    with pytest.raises(hf_compress.ConfigurationError, match="largest is 242"):
        unpack_ternary(torch.full((1, 1), 243, dtype=torch.uint8), 5)
    with pytest.raises(hf_compress.ConfigurationError, match="2 bytes"):
        unpack_ternary(packed, 6)


def test_three_codes_take_1_6_bits(tmp_path: Path) -> None:
    model = coded(bits=1.58, column_group=None, rows_per_codebook=64)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.matrix().unique().numel() <= 3 * layer.out_features
    report = model.compression_report
    codes = sum(m.get_buffer("weight").nbytes for m in model.modules() if isinstance(m, CodebookLinear))
    assert 8 * codes / sum(row.parameters_before for row in report.modules) == pytest.approx(1.6, abs=0.1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == report.bytes_after
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: torch.full_like(tensors[name], 250)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(hf_compress.CheckpointError, match=r"up_proj.*242"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_transposed_matrices_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=48, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    dense = logits(model)
    recipe = CodebookConfig(
        bits={"mlp": 4, "query_key": 4, "value_output": 4, "embedding": 4}, calibration=calibration()
    )
    hf_compress.compress(model, recipe)
    assert sum(isinstance(module, CodebookLinear) for module in model.modules()) == 2 * 4
    assert float((logits(model) - dense).square().mean() / dense.square().mean()) < 0.02
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.dequantize()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_convolutions(layer_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[64, 128], depths=[2, 2], layer_type=layer_type)
    images = torch.randn(40, 3, 32, 32)

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": images[torch.tensor(rows)]}

    source = CalibrationConfig(list(range(32)), data_collator=collate, num_samples=32, num_held_out=0, batch_size=8)
    dense_model = AutoModel.from_config(config).eval()
    state = dense_model.state_dict()

    def features(model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model(images[32:]).last_hidden_state
        return result

    dense = features(dense_model)

    def run(**fields: Any) -> tuple[PreTrainedModel, float]:
        model = AutoModel.from_config(config).eval()
        model.load_state_dict(state)
        hf_compress.compress(model, CodebookConfig(**fields))
        return model, float((features(model) - dense).square().mean() / dense.square().mean())

    learned, error = run(bits=3, calibration=source)
    _, error_alone = run(bits=3, learning="none")
    layers = [module for module in learned.modules() if isinstance(module, CodebookConv2d)]
    assert len(layers) == len(learned.compression_report.modules) > 8
    assert error < 0.9 * error_alone < 0.5
    learned.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(features(again), features(learned))
    again.dequantize()
    torch.testing.assert_close(features(again), features(learned), rtol=1e-4, atol=1e-4)
    mixed, _ = run(bits="auto", average_bits=3, calibration=source)
    assert mixed.compression_report.notes["average_bits"] <= 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": "auto"}, "belong together"),
        ({"bits": 3, "average_bits": 3}, "belong together"),
        ({"bits": "auto", "average_bits": 5}, "average_bits"),
        ({"bits": 2, "block_epochs": -1}, "block_epochs"),
        ({"bits": 2, "block_epochs": 2, "learning": "none"}, "needs data"),
        ({"bits": 2, "block_epochs": 2, "order": "dense"}, "sequential"),
    ],
)
def test_recipes_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        CodebookConfig(**fields)
