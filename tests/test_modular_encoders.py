"""Modular decomposition of encoders of text and of images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from brute_force import Projections, best_down, inputs_of, matrix
from encoders import ENCODERS, IMAGES, inputs
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    CLIPTextConfig,
    CLIPVisionConfig,
    ElectraConfig,
    PreTrainedModel,
)

import hf_compress
from hf_compress import (
    CalibrationConfig,
    CodebookConfig,
    CompressionConfig,
    ConfigurationError,
    ModularDecompositionConfig,
    PruningConfig,
)
from hf_compress.anatomy import resolve_anatomy
from hf_compress.engine.blocks import BlockStream
from hf_compress.engine.losses import hidden_state_errors, mean_ratio
from hf_compress.layout import layout_of
from hf_compress.methods.modular.compress import compress_block
from hf_compress.methods.modular.statistics import collect_statistics

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_TEXT: dict[str, Any] = {**_SIZES, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}
MORE: dict[str, Callable[[], Any]] = {
    "electra": lambda: ElectraConfig(**_TEXT, embedding_size=32),
    "clip_text": lambda: CLIPTextConfig(**_TEXT, bos_token_id=1, eos_token_id=2),
    "clip_vision": lambda: CLIPVisionConfig(**_SIZES, image_size=16, patch_size=4),
}
ALL = {**ENCODERS, **MORE}
OF_IMAGES = (*IMAGES, "clip_vision")
ALL_KINDS = ("mlp", "query_key", "value_output")
WIDTHS = {"dinov2": 256}


@pytest.fixture(params=sorted(ALL))
def encoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModel.from_config(ALL[name](), dtype=dtype)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in path:
                parameter.mul_(4)
            elif parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def batch_of(name: str, count: int = 6, seed: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    found = inputs("vit" if name in OF_IMAGES else "bert", count, seed=seed)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


def data(name: str, num_held_out: int = 8) -> CalibrationConfig:
    rows = batch_of(name, 48, seed=1)

    def collate(chosen: list[int]) -> dict[str, Tensor]:
        return {key: tensor[torch.tensor(chosen)] for key, tensor in rows.items()}

    return CalibrationConfig(
        list(range(48)), data_collator=collate, num_samples=40, num_held_out=num_held_out, batch_size=20
    )


def recipe(name: str, **fields: Any) -> ModularDecompositionConfig:
    defaults = {"reduction": 0.25, "kinds": ALL_KINDS, "calibration": data(name)}
    return ModularDecompositionConfig(**{**defaults, **fields})


def compressed(name: str, dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    return hf_compress.compress(make(name, dtype), recipe(name, **fields))


@functools.cache
def compressed_once(name: str) -> PreTrainedModel:
    """For tests that leave the model as it is."""
    return compressed(name)


def states(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**{**batch}).last_hidden_state
    mask = batch.get("attention_mask")
    return found.flatten(end_dim=1) if mask is None else found[mask.bool()]


def reduce(model: PreTrainedModel, name: str, block: int, sizes: dict[str, int], **fields: Any) -> Any:
    anatomy = resolve_anatomy(model)
    stream = BlockStream(anatomy, [batch_of(name, 24, seed=3)])
    for earlier in range(block):
        stream.advance(earlier)
    with collect_statistics(anatomy, block, set(sizes)) as statistics:  # type: ignore[arg-type]
        stream.advance(block)
    return compress_block(anatomy, recipe(name, **fields), block, sizes, statistics)  # type: ignore[arg-type]


def assert_same(one: PreTrainedModel, other: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Bit-equal tensors, and the same function: a convolution in float64 depends on where its weights lie in memory,
    of a dense model as well."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    torch.testing.assert_close(states(one, batch), states(other, batch), rtol=1e-12, atol=1e-12)


def test_reduction_zero_changes_nothing(encoder: str) -> None:
    model = hf_compress.compress(make(encoder), recipe(encoder, reduction=0.0, calibration=None))
    batch = batch_of(encoder)
    assert torch.equal(states(model, batch), states(make(encoder), batch)) and layout_of(model) == []


def test_full_rank_is_exact(encoder: str) -> None:
    model, batch = make(encoder), batch_of(encoder)
    dense = states(model, batch)
    sizes = {"mlp": WIDTHS.get(encoder, 96), "query_key": 16, "value_output": 16}
    for block in range(3):
        for path, module in reduce(model, encoder, block, sizes, ridge=1e-12).modules.items():
            model.set_submodule(path, module)
    torch.testing.assert_close(states(model, batch), dense, rtol=1e-9, atol=1e-9 * float(dense.abs().max()))


def _attention(name: str, model: PreTrainedModel) -> tuple[str, Any, Any]:
    """The attention of block 1 with its output projection, and what its projections are called."""
    if name in ("bert", "roberta", "electra"):
        layer: Any = model.get_submodule("encoder.layer.1")
        return "query key value", layer.attention.self, layer.attention.output.dense
    if name == "distilbert":
        attention: Any = model.get_submodule("transformer.layer.1.attention")
        return "q_lin k_lin v_lin", attention, attention.out_lin
    if name.startswith("clip"):
        attention = model.get_submodule("encoder.layers.1.self_attn")
        return "q_proj k_proj v_proj", attention, attention.out_proj
    attention = model.get_submodule("encoder.layer.1.attention" if name == "dinov2" else "layers.1.attention")
    return "q_proj k_proj v_proj", attention, attention.o_proj


def test_attention_is_the_optimum(encoder: str) -> None:
    model, batch = make(encoder), batch_of(encoder, 24, seed=3)
    names, attention, output = _attention(encoder, model)
    found = []
    for name in names.split():
        layer = getattr(attention, name)
        projected = layer(inputs_of(model, layer, batch)).detach().unflatten(-1, (4, 16)).transpose(0, 1)
        found.append((projected, layer.bias.detach().view(4, 1, 16)))
    (query, _), (key, _), (value, bias) = found
    wanted = Projections(query, key, value, bias, matrix(output).unflatten(0, (4, 16)))
    rows = reduce(model, encoder, 1, {"query_key": 6, "value_output": 6}).rows
    errors = {row.kind: row.error for row in rows}
    # Grams are sums of float32 products.
    assert errors["value_output"] == pytest.approx(wanted.value_output_error(6), rel=1e-3)
    assert errors["query_key"] == pytest.approx(wanted.query_key_error(6), rel=1e-3)


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_mlp_is_the_least_squares_optimum(name: str) -> None:
    model, batch = make(name), batch_of(name, 24, seed=3)
    path = {
        "bert": "encoder.layer.1.output.dense",
        "distilbert": "transformer.layer.1.ffn.lin2",
        "vit": "layers.1.mlp.fc2",
    }[name]
    down: Any = model.get_submodule(path)
    inner = inputs_of(model, down, batch)
    result = reduce(model, name, 1, {"mlp": 64}, ridge=1e-10)
    for place, module in result.modules.items():
        model.set_submodule(place, module)
    new_down: Any = model.get_submodule(path)
    new_inner = inputs_of(model, new_down, batch)
    kept = torch.cdist(new_inner.T, inner.T).argmin(dim=1)
    torch.testing.assert_close(new_inner, inner[:, kept])
    dense, small = inner @ matrix(down), new_inner @ matrix(new_down)
    best = new_inner @ best_down(inner, matrix(down), kept)
    error, least = (float((each - dense).square().sum()) for each in (small, best))
    assert error == pytest.approx(least, rel=1e-3)
    assert torch.equal(new_down.bias, down.bias)


@pytest.mark.parametrize("kinds", ["auto", ALL_KINDS, ("mlp",)])
def test_budget_is_met_as_planned(encoder: str, kinds: Any) -> None:
    config = recipe(encoder, kinds=kinds)
    plan = hf_compress.plan(make(encoder), config)
    model = hf_compress.compress(make(encoder), config)
    report = model.compression_report
    step = max(row.parameters_before / row.size_before for row in report.modules) * 16
    tolerance = max(0.005, step / 2 / report.block_linear_before)
    assert report.block_linear_reduction == pytest.approx(0.25, abs=tolerance)
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after < report.parameters_before
    assert plan.bytes_on_disk <= report.bytes_after * 1.05 and report.bytes_after <= plan.bytes_at_most
    if kinds == "auto":
        assert {"dense_hidden_state_error", *ALL_KINDS} <= set(report.notes["probe"])
        assert report.notes["probe"]["dense_hidden_state_error"] < 1e-9


def test_a_uniform_plan_is_exact(encoder: str) -> None:
    config = recipe(encoder, allocation="uniform")
    plan = hf_compress.plan(make(encoder), config)
    assert plan.bytes_on_disk == hf_compress.compress(make(encoder), config).compression_report.bytes_after


def test_reload_back_ends_padding_and_gradients(encoder: str, tmp_path: Path) -> None:
    model, batch = compressed_once(encoder), batch_of(encoder)
    found = states(model, batch)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same(again, model, batch)

    again.set_attn_implementation("eager")
    # Some families' softmax is in float32 there.
    torch.testing.assert_close(states(again, batch), found, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        attentions = again(**batch, output_attentions=True).attentions
    assert len(attentions) == 3
    torch.testing.assert_close(attentions[1].sum(-1), torch.ones_like(attentions[1].sum(-1)))
    again.set_attn_implementation("sdpa")

    if "attention_mask" in batch:
        longer = {key: torch.nn.functional.pad(tensor, (0, 5)) for key, tensor in batch.items()}
        torch.testing.assert_close(states(again, longer), found, rtol=1e-6, atol=1e-6)

    again.train()
    output = again(**batch)
    (output.last_hidden_state * torch.randn_like(output.last_hidden_state)).sum().backward()
    blocks = resolve_anatomy(again).block_paths
    inside = [(name, p) for name, p in again.named_parameters() if name.startswith(blocks)]
    assert [name for name, parameter in inside if parameter.grad is None] == []


def test_dequantize_gives_the_same_function(encoder: str) -> None:
    model, batch = compressed(encoder), batch_of(encoder)
    before = states(model, batch)
    model.dequantize()
    assert layout_of(model) == []
    assert {type(module) for module in model.modules()} == {type(module) for module in make(encoder).modules()}
    torch.testing.assert_close(states(model, batch), before, rtol=1e-6, atol=1e-6)


def test_a_portable_model_is_plain(encoder: str, tmp_path: Path) -> None:
    if encoder == "dinov2":  # its config has a whole number as a ratio
        with pytest.raises(ConfigurationError, match="does not have"):
            compressed(encoder, kinds="auto", portable=True)
        return
    model = compressed(encoder, kinds="auto", portable=True)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert layout_of(plain) == [] and not hasattr(plain.config, "quantization_config")
    assert_same(plain, model, batch_of(encoder))
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in make(encoder).parameters())


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("second", ["codebook", "pruning"])
def test_another_stage_on_top(name: str, second: str, tmp_path: Path) -> None:
    stage = (
        CodebookConfig(bits=3, rows_per_codebook=8)
        if second == "codebook"
        else PruningConfig(sparsity=0.5, criterion="wanda")
    )
    config = CompressionConfig(stages=[recipe(name, calibration=None), stage], calibration=data(name))
    model = hf_compress.compress(make(name, torch.float32), config)
    batch = batch_of(name, dtype=torch.float32)
    before = states(model, batch)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(states(again, batch), before)
    again.dequantize()
    torch.testing.assert_close(states(again, batch), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_options_that_are_measured(name: str) -> None:
    """Search, temperature and sequential order work on hidden states."""
    notes = compressed(name, allocation="search", search_minutes=0.05).compression_report.notes["search"]
    assert notes["held_out_hidden_state_error_after"] <= notes["held_out_hidden_state_error_before"]
    trials = compressed(name, temperature="auto").compression_report.notes["temperature_trials"]
    assert all(0 < float(error) < 1 for error in trials.values())
    batch = batch_of(name)
    dense = states(make(name), batch)
    errors = [
        float((states(compressed(name, order=order), batch) - dense).square().sum())
        for order in ("dense", "sequential")
    ]
    assert errors[1] < 1.1 * errors[0]


def test_the_criterion_is_the_error_of_the_hidden_states(encoder: str) -> None:
    model, batch = make(encoder), batch_of(encoder)
    anatomy = resolve_anatomy(model)
    dense, other = (BlockStream(anatomy, [batch]) for _ in range(2))
    for block in range(3):
        dense.advance(block)
        other.advance(block)
    other.hidden[0] = other.hidden[0] + 0.1 * torch.randn_like(other.hidden[0])
    found = mean_ratio([hidden_state_errors(other, dense)])
    assert mean_ratio([hidden_state_errors(dense, dense)]) == 0.0
    # The same through the model, whose last block is made to put out the other states.
    last: Any = anatomy.block(2)
    wanted, replaced = states(model, batch), other.hidden[0]
    handle = last.register_forward_hook(lambda *_: replaced)
    moved = states(model, batch)
    handle.remove()
    assert found == pytest.approx(float((moved - wanted).square().sum() / wanted.square().sum()))


def test_kinds_auto_needs_held_out_data() -> None:
    with pytest.raises(ConfigurationError, match="hidden states on held-out.*num_held_out"):
        compressed("vit", kinds="auto", calibration=data("vit", num_held_out=0))


@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "dinov2"])
def test_a_model_with_a_head_is_compressed_while_loading(name: str, tmp_path: Path) -> None:
    """One argument of `from_pretrained`; what is saved loads with the head and without."""
    kind = AutoModelForImageClassification if name in OF_IMAGES else AutoModelForSequenceClassification
    torch.manual_seed(0)
    dense = kind.from_config(ALL[name]()).eval()
    dense.save_pretrained(tmp_path / "dense")
    config = recipe(name, reduction=0.3, kinds="auto")
    model = kind.from_pretrained(tmp_path / "dense", compression_config=config)
    assert model.compression_report.block_linear_reduction == pytest.approx(0.3, abs=0.03)
    model.save_pretrained(tmp_path / "small")
    again, alone = (each.from_pretrained(tmp_path / "small") for each in (kind, AutoModel))
    batch = batch_of(name, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        assert torch.equal(alone(**batch)[0], model.base_model(**batch)[0])
