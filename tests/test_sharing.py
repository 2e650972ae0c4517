"""Shared layers: conversion, corrections, steps, caches, reloading; ALBERT as it stands."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import EXPERTS, FAMILIES, IDS, calibration, logits, make_model
from encoders import ENCODERS, features, make_encoder
from safetensors.torch import load_file
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

import hf_compress
from hf_compress import LayerSharingConfig
from hf_compress.layout import layout_of
from hf_compress.methods.sharing import SharedLinear, mathematics
from hf_compress.methods.sharing.stepping import schedule_of

STEPPING = [name for name in sorted(FAMILIES) if not name.startswith("gemma")]


def shared(family: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    return hf_compress.compress(make_model(family, dtype), LayerSharingConfig(**{"unique_layers": 1, **fields}))


def albert(groups: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=96,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=6,
        num_hidden_groups=groups,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = AlbertForMaskedLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("depth", "unique", "order", "expected"),
    [
        (6, 2, "cycle", [0, 1, 0, 1, 0, 1]),
        (6, 2, "sequence", [0, 0, 0, 1, 1, 1]),
        (7, 3, "sequence", [0, 0, 0, 1, 1, 2, 2]),
        (3, 3, "cycle", [0, 1, 2]),
    ],
)
def test_which_layer_uses_which_block(depth: int, unique: int, order: Any, expected: list[int]) -> None:
    assert mathematics.assignment(depth, unique, order) == expected


def test_initial_layers() -> None:
    assigned = mathematics.assignment(18, 3, "cycle")
    assert mathematics.initial_layers(18, 3, assigned, "stepwise") == [[0], [8], [17]]
    assert mathematics.initial_layers(18, 3, assigned, "lower") == [[0], [1], [2]]
    assert mathematics.initial_layers(18, 3, assigned, "average")[1] == [1, 4, 7, 10, 13, 16]


def test_corrections_are_the_best_of_their_rank() -> None:
    matrix = torch.randn(12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = mathematics.low_rank(matrix, 4)
    values = torch.linalg.svdvals(matrix)
    assert (matrix - second @ first).square().sum() == pytest.approx(float(values[4:].square().sum()))


def test_steps_and_the_loops_nearest_in_time() -> None:
    assert mathematics.loops_in_time(mathematics.uniform_steps(6, 12), 12) == [0, 2, 4, 6, 8, 10]
    assert mathematics.loops_in_time([1, 1, 2, 4, 4], 12) == [0, 1, 2, 4, 8]
    assert mathematics.steps_of_groups(5, [4, 4]) == [[4 / 3] * 3, [2.0] * 2]
    found = schedule_of([0, 1, 0, 1, 0, 1, 0, 1], "cycle", 4, None)
    assert (found.loops, found.steps) == ((0, 1, 4, 5), (2.0,) * 4)


def test_adams_bashforth_is_of_second_order() -> None:
    """Halving the steps of h' = −h quarters the error; an Euler step halves it."""

    def error(count: int, solver: str, uneven: bool = False) -> float:
        sizes = [1 / count] * count
        if uneven:
            sizes = [size * (1.5 if index % 2 else 0.5) for index, size in enumerate(sizes)]
        state, before, last = torch.ones(1, dtype=torch.float64), None, 1.0
        for size in sizes:
            increment = -size * state
            state = state + (
                mathematics.adams_bashforth(increment, before, size, last) if solver == "ab2" else increment
            )
            before, last = increment, size
        return abs(float(state) - float(torch.exp(torch.tensor(-1.0, dtype=torch.float64))))

    assert error(64, "euler") / error(128, "euler") == pytest.approx(2, rel=0.05)
    assert error(64, "ab2") / error(128, "ab2") == pytest.approx(4, rel=0.1)
    assert error(64, "ab2", uneven=True) / error(128, "ab2", uneven=True) == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("order", ["cycle", "sequence"])
@pytest.mark.parametrize("start", ["stepwise", "average", "lower", "activation_aware"])
def test_full_rank_corrections_give_the_unshared_model(family: str, order: str, start: str) -> None:
    dense = logits(make_model(family, torch.float64))
    fields = {"order": order, "initialization": start, "calibration": calibration()}
    model = shared(family, torch.float64, unique_layers=2, lora_rank=64, **fields)
    torch.testing.assert_close(logits(model), dense, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encoders(name: str, tmp_path: Path) -> None:
    dense = features(make_encoder(name), name)
    model = hf_compress.compress(make_encoder(name), LayerSharingConfig(unique_layers=1, lora_rank=96))
    torch.testing.assert_close(features(model, name), dense, rtol=1e-3, atol=1e-3)
    small = hf_compress.compress(
        make_encoder(name), LayerSharingConfig(unique_layers=1, lora_rank=4, inference_iterations=2)
    )
    small.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(features(again, name), features(small, name))
    again.set_iterations(3)
    assert not torch.equal(features(again, name), features(small, name))


def test_shared_matrices_are_stored_once(tmp_path: Path) -> None:
    dense = make_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    model = shared(unique_layers=1)
    matrices = sum(m.weight.numel() for m in dense.model.layers.modules() if isinstance(m, nn.Linear))
    tensors = model.state_dict().values()
    before = sum(t.numel() for t in dense.state_dict().values())
    assert sum(t.numel() for t in tensors if t.is_floating_point()) == before - matrices * 3 // 4
    model.save_pretrained(tmp_path / "shared")
    saved = load_file(tmp_path / "shared" / "model.safetensors")
    written = sum(t.numel() * t.element_size() for t in saved.values())
    assert written == model.compression_report.bytes_after
    assert written < sum(p.numel() for p in dense.parameters()) * 4 - 3 * matrices + 200
    pointers = {module.source.weight.data_ptr() for module in model.modules() if isinstance(module, SharedLinear)}
    assert len(pointers) == 7
    assert hf_compress.plan(tmp_path / "dense", LayerSharingConfig(unique_layers=1)).parameters_after == (
        model.compression_report.parameters_after
    )


def test_groups_of_given_sizes(tmp_path: Path) -> None:
    model = shared(unique_layers=2, group_sizes=[1, 3], lora_rank=2)
    running = hf_compress.methods.sharing.stepping.running_blocks(model)
    assert running.assigned == [0, 1, 1, 1]
    # The first layer is as it was and has nothing to correct.
    assert [running._modules[str(layer)].mlp.up_proj.rank for layer in range(4)] == [0, 2, 2, 2]
    assert torch.equal(
        running._modules["0"].mlp.up_proj.shared_weight(), make_model("llama").model.layers[0].mlp.up_proj.weight
    )
    found = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), found)
    stage = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["recipe"]["stages"][0]
    assert stage.pop("method") == "sharing" and LayerSharingConfig(**stage).group_sizes == (1, 3)
    again = hf_compress.compress(make_model("llama"), LayerSharingConfig(group_sizes=(1, 3), lora_rank=2))
    assert torch.equal(logits(again), found)
    model.set_iterations(3)
    assert running.schedule.steps == (1.0, 1.5, 1.5)


@pytest.mark.parametrize("share_norms", [False, True])
def test_saved_and_reloaded(family: str, share_norms: bool, tmp_path: Path) -> None:
    model = shared(family, torch.bfloat16, unique_layers=2, lora_rank=3, share_norms=share_norms)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(again), logits(model))
    before = logits(model.double())
    model.dequantize()
    assert layout_of(model) == []
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)


# Not SmolLM3: every second layer has no rotary embedding, so its layers are not one function.
@pytest.mark.parametrize("name", [name for name in STEPPING if name != "smollm3"])
def test_a_step_of_size_two_is_two_small_ones_of_a_small_block(name: str) -> None:
    """Where a block changes its input little, one step of size 2 is nearly two steps of size 1, and not one."""
    model = make_model(name, torch.float64)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(part in path for part in ("o_proj", "out_proj", "down_proj", "fc2")):
                parameter.mul_(1e-4)
        base = model.base_model
        layers = base.layers if hasattr(base, "layers") else base.decoder.layers
        for layer in layers[1:]:
            layer.load_state_dict(layers[0].state_dict())
    hf_compress.compress(model, LayerSharingConfig(unique_layers=1))
    full = logits(model)
    model.set_iterations(2)
    larger = logits(model)
    hf_compress.methods.sharing.stepping.running_blocks(model).scaled.clear()
    model.set_iterations(2)
    for module in model.modules():
        if isinstance(module, SharedLinear):
            module.step = 1.0
    truncated = logits(model)
    assert (larger - full).norm() < 1e-2 * (truncated - full).norm()


@pytest.mark.parametrize("name", STEPPING)
@pytest.mark.parametrize("solver", ["euler", "adams_bashforth"])
def test_generation_with_fewer_iterations(name: str, solver: str, tmp_path: Path) -> None:
    model = shared(name, inference_iterations=2, solver=solver)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    ids = IDS[:, :9]
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, cached)
    cache = model(ids, use_cache=True).past_key_values
    assert sum(cache.get_seq_length(layer) > 0 for layer in range(4)) == 2
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_the_number_may_not_change_within_a_sequence() -> None:
    model = shared()
    cache = model(IDS[:, :8], use_cache=True).past_key_values
    model.set_iterations(2)
    with pytest.raises(hf_compress.CompressionError, match="filled with 4 iterations and the model now runs 2"):
        model(IDS[:, 8:9], past_key_values=cache)
    model.set_iterations()
    model(IDS[:, 8:9], past_key_values=cache)


@pytest.mark.parametrize("steps", [[0.5, 0.5, 2.0, 1.0], [3.0, 0.5, 0.5], [0.25, 3.75]])
@pytest.mark.parametrize("solver", ["euler", "adams_bashforth"])
def test_uneven_steps_against_a_loop_by_hand(steps: list[float], solver: Any) -> None:
    model = shared("llama", torch.float64, lora_rank=2, steps=steps, solver=solver)
    running = hf_compress.methods.sharing.stepping.running_blocks(model)
    assert len(set(running.schedule.loops)) == len(steps)
    found = logits(model)
    with torch.no_grad():
        hidden = model.model.embed_tokens(IDS)
        positions = torch.arange(IDS.shape[1]).unsqueeze(0)
        tables = model.model.rotary_emb(hidden, positions)
        before, last = None, 1.0
        for loop, step in zip(running.schedule.loops, steps, strict=True):
            block = running._modules[str(loop)]
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                layer.step = 1.0
            mask = torch.full((IDS.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
            normed = block.input_layernorm(hidden)
            mixed, _ = block.self_attn(normed, position_embeddings=tables, attention_mask=mask)
            after = hidden + step * mixed
            after = after + step * block.mlp(block.post_attention_layernorm(after))
            increment = after - hidden
            if solver == "adams_bashforth":
                moved = hidden + mathematics.adams_bashforth(increment, before, step, last)
            else:
                moved = after
            hidden, before, last = moved, increment, step
        reference = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9)


def test_an_adapter_keeps_the_step_sizes(tmp_path: Path) -> None:
    model = shared(inference_iterations=2)
    plain, full = logits(model), logits(shared())
    model.save_pretrained(tmp_path)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    torch.testing.assert_close(logits(adapted), plain)
    model.set_iterations()
    torch.testing.assert_close(logits(adapted), full)
    model.set_iterations(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    wrapper = model.model.layers._modules["0"].mlp.down_proj
    x = torch.randn(3, 64)
    inner, base = wrapper(x), wrapper.base_layer
    delta = wrapper.lora_B["default"](wrapper.lora_A["default"](x)) * wrapper.scaling["default"]
    torch.testing.assert_close(inner, 2 * (base(x) + delta))


def test_a_base_model_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    model = shared(lora_rank=2, share_norms=True)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_masks_of_another_kind_of_layer_are_refused() -> None:
    config = FAMILIES["qwen2"]()
    config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 8, 2
    config.layer_types = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(hf_compress.ConfigurationError, match="layers of one kind"):
        hf_compress.compress(model, LayerSharingConfig(unique_layers=1, inference_iterations=2))


@pytest.mark.parametrize(
    "arguments",
    [{"iterations": 2.0}, {"iterations": True}, {"iterations": 0}, {"steps": [5, -1]}, {"steps": [float("nan"), 2]}],
)
def test_iterations_that_are_none(arguments: dict[str, Any], unchecked_types: None) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=r"iterations|positive"):
        shared().set_iterations(**arguments)
    with pytest.raises(hf_compress.ConfigurationError, match="one of the two"):
        shared().set_iterations(4, [1, 1, 2])


def test_uneven_steps_and_groups() -> None:
    model = shared(steps=[1, 1, 2])
    assert model(IDS).logits.isfinite().all()
    model.set_iterations(steps=[0.5, 1.5, 2.0])
    grouped = shared(unique_layers=2, order="sequence", inference_iterations=3)
    running = hf_compress.methods.sharing.stepping.running_blocks(grouped)
    assert running.schedule.loops == (0, 1, 2)
    assert running.schedule.steps == (1.0, 1.0, 2.0)
    uneven = shared(unique_layers=3, order="sequence", uneven_groups=True)
    assert torch.isfinite(logits(uneven)).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_albert(groups: int, tmp_path: Path) -> None:
    dense = albert(groups)
    model = hf_compress.compress(copy.deepcopy(dense), LayerSharingConfig(inference_iterations=6))
    assert torch.equal(logits(model), logits(dense))
    model.set_iterations(4)
    assert not torch.allclose(logits(model), logits(dense))
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.set_iterations()
    assert torch.equal(logits(again), logits(dense))
    again.dequantize()
    assert torch.equal(logits(again), logits(dense))
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "dense", compression_config=LayerSharingConfig(inference_iterations=4)
    )
    assert torch.equal(logits(loaded), logits(model))


def test_steps_change_on_a_saved_model(tmp_path: Path) -> None:
    shared(unique_layers=1, lora_rank=2).save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", compression_config=LayerSharingConfig(inference_iterations=2)
    )
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    reference.set_iterations(2)
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_everything(checkpointing: bool) -> None:
    model = shared(unique_layers=2, lora_rank=2, order="sequence").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_from_scratch() -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    hf_compress.compress(model, LayerSharingConfig(unique_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for iterations in (4, 2, 4, 3, 4):
        model.set_iterations(iterations)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_some_kinds_alone() -> None:
    model = shared(unique_layers=2, share=["mlp"])
    assert not isinstance(model.model.layers[3].self_attn.q_proj, SharedLinear)
    assert isinstance(model.model.layers[3].mlp.up_proj, SharedLinear)
    assert any("self_attn.q_proj: not shared" in reason for reason in model.compression_report.left_alone)
    with pytest.raises(hf_compress.ConfigurationError, match="all of whose matrices are shared"):
        model.set_iterations(2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unique_layers": 3}, "does not divide the depth 4"),
        ({"unique_layers": 9}, "the model has 4 layers"),
        ({"unique_layers": 1, "inference_iterations": 5}, "5 iterations: expected 1 to 4"),
        ({"unique_layers": 1, "steps": [1, 2]}, "sum to 3"),
        ({"unique_layers": 1, "steps": [1, -2, 5]}, "positive"),
        ({"unique_layers": 2, "inference_iterations": 3}, "multiple of 2"),
        ({"unique_layers": 2, "order": "sequence", "inference_iterations": 1}, "at least 2"),
        ({"inference_iterations": 2}, "does not share its layers yet"),
        ({"group_sizes": [1, 2]}, "`group_sizes` are 3 layers in all, and the model has 4"),
        ({"group_sizes": [1, 0, 3]}, "from 1 on"),
        ({"group_sizes": []}, "from 1 on|greater than or equal to 1"),
        ({"group_sizes": [1, 3], "unique_layers": 3}, "`unique_layers` is 3"),
        ({"group_sizes": [1, 3], "order": "cycle"}, "'cycle'; leave these out"),
        ({"group_sizes": [1, 3], "inference_iterations": 1}, "at least 2"),
        ({}, "nothing to do"),
        ({"lora_rank": 3, "inference_iterations": 2}, "no effect without `unique_layers`"),
    ],
)
def test_what_cannot_be_shared(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        hf_compress.compress(make_model("llama"), LayerSharingConfig(**fields))


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_norms_of_experts_are_shared_without_their_routers(name: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model(name), LayerSharingConfig(unique_layers=1, share_norms=True))
    found = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), found)


def test_models_that_cannot_be_shared() -> None:
    model = make_model("llama")
    narrow = model.model.layers[2].mlp
    narrow.up_proj, narrow.gate_proj = (nn.Linear(48, 32, bias=False) for _ in range(2))
    narrow.down_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(hf_compress.UnsupportedModelError, match=r"not of one shape: 'mlp\.down_proj\.weight'"):
        hf_compress.compress(model, LayerSharingConfig(unique_layers=2))
    with pytest.raises(hf_compress.ConfigurationError, match="norm between"):
        shared("gemma2", inference_iterations=2)
    with pytest.raises(hf_compress.ConfigurationError, match="no shared blocks"):
        hf_compress.set_iterations(make_model("llama"), 2)
    with pytest.raises(hf_compress.ConfigurationError, match=r"leaves 'model\.layers\.1\.mlp\.up_proj' out"):
        shared(unique_layers=2, modules_to_not_convert=("layers.1.mlp.up_proj",))
    with pytest.raises(hf_compress.ConfigurationError, match="all of whose matrices are shared"):
        shared(inference_iterations=2, modules_to_not_convert=("layers.2.mlp.up_proj",))
    with pytest.raises(hf_compress.ConfigurationError, match="leave `unique_layers` out"):
        hf_compress.compress(albert(), LayerSharingConfig(unique_layers=1))


@pytest.mark.parametrize(
    ("path", "field", "value", "message"),
    [
        ("model.layers", "loops", [0, 1, 2, 9], "`loops` names a layer"),
        ("model.layers", "steps", [1.0, 1.0, 2.0], "equally long"),
        ("model.layers", "assigned", [0], "for each of 4 layers"),
        ("model.layers.1.mlp.up_proj", "source", "model.layers.9.mlp.up_proj", "does not have"),
        ("model.layers.1.mlp.up_proj", "source", "model.layers.0.mlp.down_proj", "another shape"),
        ("model.layers.1.mlp.up_proj", "source", "model.layers.2.mlp.up_proj", "keeps none"),
        ("model.layers.1.mlp.up_proj", "rank", 1000, "`rank` must be"),
    ],
)
def test_a_damaged_layout_is_refused(path: str, field: str, value: Any, message: str, tmp_path: Path) -> None:
    shared(unique_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for entry in config["quantization_config"]["layout"]:
        if entry["path"] == path:
            entry["spec"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hf_compress.CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
