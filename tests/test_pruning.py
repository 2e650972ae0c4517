"""Pruning in one call: criteria, counts, the format, reloading, pruning again, whole heads and columns."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import IDS, calibration, logits, make_model, token_ids
from encoders import ENCODERS, IMAGES, features, inputs, make_encoder
from families import make
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
)

import hf_compress
from hf_compress import CalibrationConfig, PruningConfig
from hf_compress.evaluation import measure_layers
from hf_compress.methods.pruning import SparseLinear
from hf_compress.methods.pruning.masks import sparse_layer
from hf_compress.methods.pruning.modules import SPARSE_BELOW, SPARSE_ON_CPU
from hf_compress.resized import ResizedLinear


@pytest.fixture(autouse=True)
def tiny_matrices_run_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPARSE_BELOW, "cpu, small", SPARSE_BELOW["cpu"])


def pruned(model: PreTrainedModel | None = None, **fields: Any) -> PreTrainedModel:
    config = PruningConfig(**{"sparsity": 0.9, "criterion": "magnitude", **fields})
    return hf_compress.compress(make_model("llama") if model is None else model, config)


def layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseLinear)}


def sparsity(model: nn.Module) -> float:
    found = layers(model).values()
    return 1 - sum(layer.format.nonzeros for layer in found) / sum(layer.dense_weights for layer in found)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=64)).eval()


def image_task() -> CalibrationConfig:
    images, labels = inputs("vit", 32, seed=1)["pixel_values"], torch.arange(32) % 10

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": images[rows], "labels": labels[rows]}

    return CalibrationConfig(list(range(32)), data_collator=collate, num_samples=32, num_held_out=0, batch_size=8)


def classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("criterion", ["magnitude", "random", "snip", "snip_magnitude", "gradient", "sensitivity"])
def test_exactly_so_many_weights_stay(criterion: str, scope: str) -> None:
    dense = make_model("llama")
    model = pruned(copy.deepcopy(dense), criterion=criterion, scope=scope, calibration=calibration())
    for path, layer in layers(model).items():
        weight = dense.get_submodule(path).weight
        assert torch.equal(layer.matrix(), (weight * layer.mask()).half().float())
        if scope == "row":
            assert layer.mask().sum(dim=1).unique().tolist() == [round(0.1 * layer.in_features)]
        elif scope == "layer":
            assert layer.format.nonzeros == round(0.1 * layer.dense_weights)
    total = sum(layer.dense_weights for layer in layers(model).values())
    if scope == "global":
        assert sum(layer.format.nonzeros for layer in layers(model).values()) == round(0.1 * total)
        assert model.compression_report.notes["sparsity"] == pytest.approx(0.9, abs=1 / total)
    assert len(layers(model)) == 4 * 7


def test_snip_magnitude_is_the_score_of_one_large_batch() -> None:
    model = make_model("llama")
    source = calibration(num_samples=16, num_held_out=0, batch_size=4)
    found = pruned(copy.deepcopy(model), criterion="snip_magnitude", calibration=source)
    data = hf_compress.calibration.data.load_calibration_data(source)
    ids = torch.cat([batch["input_ids"] for batch in data.batches])
    model(ids, labels=ids).loss.backward()
    weights = {path: model.get_submodule(path).weight for path in layers(found)}
    scores = {path: (w * w.grad).abs() + 1e-3 * w.square() for path, w in weights.items()}
    threshold = torch.cat([score.flatten() for score in scores.values()]).quantile(0.9)
    agreement = [((scores[path] > threshold) == layer.mask()).float().mean() for path, layer in layers(found).items()]
    assert min(agreement) > 0.998
    assert found.compression_report.notes["sensitivity_to_magnitude"] > 0


def test_wanda_compares_within_rows_and_sees_the_inputs() -> None:
    model = make_model("llama")
    first = model.model.layers[0].self_attn
    caught: list[torch.Tensor] = []
    handle = first.q_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach()))
    ids = token_ids(20)
    with torch.no_grad():
        model(ids)
    handle.remove()
    score = first.q_proj.weight.detach().abs() * caught[0].flatten(0, 1).norm(dim=0)
    source = CalibrationConfig(ids, num_samples=20, num_held_out=0)
    found = pruned(copy.deepcopy(model), criterion="wanda", sparsity=0.5, calibration=source)
    mask = layers(found)["model.layers.0.self_attn.q_proj"].mask()
    assert mask.sum(dim=1).unique().tolist() == [24]
    assert (
        score[mask]
        .view(48 if len(mask) == 48 else len(mask), -1)
        .min(dim=1)
        .values.ge(score.masked_fill(mask, 0).max(dim=1).values)
        .all()
    )
    assert not torch.equal(
        mask, layers(pruned(model, sparsity=0.5, scope="row"))["model.layers.0.self_attn.q_proj"].mask()
    )


def test_delta_is_the_change_from_the_base(tmp_path: Path) -> None:
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    tuned = make_model("llama")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.mlp.up_proj.weight.add_(torch.randn(64, 48, generator=generator))
    tuned.save_pretrained(tmp_path / "tuned")
    share = 4 * 64 * 48 / sum(layer.dense_weights for layer in layers(pruned()).values())
    config = PruningConfig(sparsity=1 - share, criterion="delta", base_model=str(tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", compression_config=config)
    kept = {path: layer.density for path, layer in layers(model).items() if layer.format.nonzeros > 1}
    assert all(density > 0.99 for path, density in kept.items() if "up_proj" in path)
    assert sum("up_proj" in path for path in kept) == 4
    checksum = model.compression_report.notes["base_model_checksum"]
    again = config.model_copy(update={"base_model_checksum": checksum})
    hf_compress.compress(copy.deepcopy(tuned), again)
    other = config.model_copy(update={"base_model_checksum": checksum[::-1]})
    with pytest.raises(hf_compress.ConfigurationError, match="another one than recorded"):
        hf_compress.compress(tuned, other)


def test_a_base_that_is_none(tmp_path: Path) -> None:
    make_model("qwen2").save_pretrained(tmp_path / "qwen2")
    config = PruningConfig(sparsity=0.5, criterion="delta", base_model=str(tmp_path / "nothing"))
    with pytest.raises(hf_compress.ConfigurationError, match="cannot be loaded"):
        hf_compress.compress(make_model("llama"), config)
    with pytest.raises(hf_compress.ConfigurationError, match="base model"):
        hf_compress.compress(make_model("llama"), config.model_copy(update={"base_model": str(tmp_path / "qwen2")}))


@pytest.mark.parametrize("values", ["auto", "float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("density", [0.02, 0.4, 1.0])
def test_saved_and_reloaded_bit_equal(values: str, density: float, tmp_path: Path) -> None:
    model = pruned(sparsity=1 - density, values=values)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for path, layer in layers(model).items():
        assert torch.equal(layers(again)[path].mask(), layer.mask())
        assert torch.equal(layers(again)[path].matrix(), layer.matrix())
    assert torch.equal(logits(again), logits(model))
    report = model.compression_report
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == report.bytes_after
    assert str(again.compression_report) == str(report)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_matrix_of_which_nothing_is_left(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1e-6)
    pruned(model, sparsity=0.95).save_pretrained(tmp_path)
    assert layers(model)["model.layers.2.mlp.up_proj"].format.nonzeros == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_98_percent_take_less_than_2_percent_of_the_bytes(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    model = pruned(GPT2LMHeadModel(config), sparsity=0.98, scope="layer")
    rows = model.compression_report.modules
    assert sum(row.bytes_after for row in rows) < 0.0155 * sum(row.bytes_before for row in rows)
    assert model.compression_report.bits_per_weight < 0.49


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encoders_of_text_and_images(name: str, tmp_path: Path) -> None:
    model = pruned(make_encoder(name), sparsity=0.95)
    assert len(layers(model)) == 3 * 6
    model.save_pretrained(tmp_path)
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path), name), features(model, name))
    dense = copy.deepcopy(model)
    before = features(model, name)
    dense.dequantize()
    torch.testing.assert_close(features(dense, name), before, rtol=1e-4, atol=1e-4)


def test_gpt2_and_its_transposed_layers(tmp_path: Path) -> None:
    model = pruned(gpt2(), criterion="snip", scope="row", calibration=calibration())
    layer = layers(model)["transformer.h.0.attn.c_attn"]
    assert layer.mask().shape == (144, 48)
    assert layer.mask().sum(dim=1).unique().tolist() == [5]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.dequantize()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_a_classifier_with_labels_and_its_fresh_head(tmp_path: Path) -> None:
    make_encoder("vit").save_pretrained(tmp_path / "base")
    config = PruningConfig(sparsity=0.9, calibration=image_task())
    with pytest.warns(UserWarning, match=r"saved as ViTModel.*warmup_steps"):
        model = AutoModelForImageClassification.from_pretrained(
            tmp_path / "base", num_labels=10, compression_config=config
        )
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned(classifier(), criterion="snip", calibration=image_task())


def test_a_head_for_another_number_of_classes_is_fresh(tmp_path: Path) -> None:
    model = classifier()
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(tmp_path)

    def load(labels: int) -> None:
        config = PruningConfig(sparsity=0.9, criterion="snip", calibration=image_task())
        AutoModelForImageClassification.from_pretrained(
            tmp_path, num_labels=labels, ignore_mismatched_sizes=True, compression_config=config
        )

    with pytest.warns(UserWarning, match=r"biases of the head.*warmup_steps"):
        load(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(10)


def test_pruning_again_never_un_prunes(tmp_path: Path) -> None:
    first = pruned(sparsity=0.5)
    first.save_pretrained(tmp_path / "half")
    masks = {path: layer.mask() for path, layer in layers(first).items()}
    second = AutoModelForCausalLM.from_pretrained(
        tmp_path / "half", compression_config=PruningConfig(sparsity=0.8, criterion="random")
    )
    assert sparsity(second) == pytest.approx(0.8, abs=1e-4)
    assert all(not (layer.mask() & ~masks[path]).any() for path, layer in layers(second).items())
    second.save_pretrained(tmp_path / "more")
    recipe = AutoModelForCausalLM.from_pretrained(tmp_path / "more").config.quantization_config.recipe
    assert [(stage["criterion"], stage["sparsity"]) for stage in recipe["stages"]] == [
        ("magnitude", 0.5),
        ("random", 0.8),
    ]
    with pytest.warns(UserWarning, match="nothing is un-pruned"):
        looser = hf_compress.compress(second, PruningConfig(sparsity=0.2, criterion="magnitude"))
    assert sparsity(looser) == pytest.approx(0.8, abs=1e-4)


def test_rows_that_round_are_no_earlier_pruning() -> None:
    """48 columns of which 14.4 stay: 14, which is more sparsity than was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = hf_compress.compress(
            make_model("llama"), PruningConfig(sparsity=0.7, criterion="magnitude", scope="row")
        )
    assert sparsity(model) > 0.705


def test_another_method_on_top_is_refused(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    for recipe in (hf_compress.CodebookConfig(bits=3, learning="none"),):
        with pytest.raises(hf_compress.ConfigurationError, match="compressed already"):
            AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=recipe)
    with pytest.raises(hf_compress.ConfigurationError, match="compressed already"):
        hf_compress.compress(hf_compress.compress(make_model("llama"), recipe), PruningConfig(sparsity=0.5))


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_and_dense_products_agree(density: float, dtype: torch.dtype, monkeypatch: Any) -> None:
    model = pruned(make_model("llama", dtype), sparsity=1 - density)
    found = {}
    for limit in (0.0, 1.0):
        monkeypatch.setattr(hf_compress.methods.pruning.modules, "SPARSE_BELOW", dict.fromkeys(SPARSE_BELOW, limit))
        found[limit] = logits(model).float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found[0.0], found[1.0], rtol=tolerance, atol=tolerance * 5)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_kept_values_train_and_nothing_else(limit: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(hf_compress.methods.pruning.modules, "SPARSE_BELOW", dict.fromkeys(SPARSE_BELOW, limit))
    model = pruned().train()
    masks = {path: layer.mask() for path, layer in layers(model).items()}
    before = {path: layer.matrix() for path, layer in layers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for path, layer in layers(model).items():
        assert torch.equal(layer.mask(), masks[path])
        assert not torch.equal(layer.matrix(), before[path])
        assert not layer.matrix()[~masks[path]].any()
    assert torch.isfinite(logits(model.eval())).all()


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_inputs_of_another_width_are_refused(density: float) -> None:
    layer = layers(pruned(sparsity=1 - density))["model.layers.0.mlp.up_proj"]
    for width in (1, 47, 49):
        with pytest.raises((hf_compress.ConfigurationError, RuntimeError), match="shape"):
            layer(torch.randn(2, width))


def test_a_copy_made_in_inference_mode_serves_a_training() -> None:
    model = pruned(sparsity=0.5).requires_grad_(False)
    with torch.inference_mode():
        model(IDS)
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert embedded.grad.abs().max() > 0


def test_a_failed_second_pruning_cannot_be_saved(tmp_path: Path) -> None:
    model = pruned()
    with pytest.raises(hf_compress.ConfigurationError, match="cannot be loaded"):
        hf_compress.compress(model, PruningConfig(sparsity=0.95, criterion="delta", base_model=str(tmp_path / "x")))
    with pytest.raises(hf_compress.CheckpointError, match="interrupted or failed"):
        model.save_pretrained(tmp_path / "out")


def test_weights_beyond_the_range_of_their_file(tmp_path: Path) -> None:
    model = pruned()
    with torch.no_grad():
        layers(model)["model.layers.0.mlp.up_proj"].values[3] = 1e6
    with pytest.raises(hf_compress.CompressionError, match=r"up_proj.*beyond the float16"):
        model.save_pretrained(tmp_path)


def test_scores_that_decide_nothing_warn(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    config = PruningConfig(sparsity=0.5, criterion="delta", base_model=str(tmp_path))
    with pytest.warns(UserWarning, match="only 0 weights have a score"):
        hf_compress.compress(make_model("llama"), config)


def test_a_dense_copy_follows_the_values() -> None:
    model = pruned(sparsity=0.5)
    before = logits(model)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.values.mul_(1.5)
    after = logits(model)
    assert not torch.equal(after, before)
    # Fused optimizers change parameters without autograd's knowledge.
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), fused=True).step()
    assert not torch.equal(logits(model), after)


def test_int8_values_are_frozen_and_pass_gradients_on() -> None:
    model = pruned(values="int8")
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert embedded.grad.abs().max() > 0
    assert all(not isinstance(layer.values, nn.Parameter) for layer in layers(model).values())


def test_lora_trains_on_a_sparse_base_and_does_not_merge(tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
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
    with pytest.raises(hf_compress.CompressionError, match="cannot be merged"):
        adapted.merge_and_unload()


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_compiled_without_graph_breaks(density: float, unchecked_types: None) -> None:
    model = pruned(sparsity=1 - density)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen2", "qwen3", "opt", "gemma2"])
def test_whole_heads_and_columns(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    pruned(model, sparsity=0.4, structured=True)
    if name == "opt":  # its class takes the number of heads from the config
        assert any("q_proj: no head or column" in reason for reason in model.compression_report.left_alone)
    else:
        assert model.compression_report.block_linear_reduction == pytest.approx(0.4, abs=0.08)
    assert any(isinstance(module, ResizedLinear) for module in model.modules())
    assert not layers(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(again), logits(model))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = again.generate(IDS[:, :8], **options)
    assert torch.equal(cached, again.generate(IDS[:, :8], use_cache=False, **options))
    assert torch.equal(
        cached, again.generate(IDS[:, :8], cache_implementation="static", disable_compile=True, **options)
    )


def test_what_structure_cannot_remove_is_counted() -> None:
    """Query, key and value of GPT-NeoX are one matrix, which stays whole."""
    with pytest.warns(UserWarning, match=r"of the 50\.0% asked for"):
        model = pruned(make("gpt_neox"), sparsity=0.5, structured=True)
    report = model.compression_report
    assert report.notes["removed_share"] == pytest.approx(report.block_linear_reduction, abs=1e-3)
    assert all(0 < row.error < 0.5 for row in report.modules)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_whole_heads_and_columns_of_encoders(name: str, tmp_path: Path) -> None:
    model = pruned(make_encoder(name), sparsity=0.4, structured=True)
    assert 0.3 < model.compression_report.block_linear_reduction < 0.5
    model.save_pretrained(tmp_path)
    assert torch.equal(features(AutoModel.from_pretrained(tmp_path), name), features(model, name))


def test_removed_units_equal_zeroed_ones() -> None:
    """A smaller model computes what the dense one does with the removed columns and heads set to zero."""
    model = make_model("llama_bias")
    small = pruned(copy.deepcopy(model), sparsity=0.4, structured=True)
    widened = copy.deepcopy(small)
    widened.dequantize()
    mlp, dense = small.model.layers[0].mlp, model.model.layers[0].mlp
    x = torch.randn(3, 48)
    kept = [int((dense.up_proj.weight == row).all(dim=1).nonzero()) for row in mlp.up_proj.weight]
    with torch.no_grad():
        dense.down_proj.weight[:, [i for i in range(64) if i not in kept]] = 0
        torch.testing.assert_close(mlp(x), dense(x))


def tampered(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.1.mlp.up_proj.{name}"
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda t: torch.full_like(t, 254)),
        ("weight", torch.zeros_like),
        ("weight", lambda t: torch.full_like(t, 255)),
        # As many places as before, the last one where it was: only the checksum tells.
        ("weight", lambda t: t.flip(0)),
        ("weight", lambda t: torch.cat([t[:1] + 1, t[1:2] - 1, t[2:]])),
        ("values", lambda t: torch.full_like(t, torch.nan)),
    ],
)
def test_damaged_tensors_are_refused(name: str, change: Any, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    tampered(tmp_path, name, change)
    with pytest.raises(hf_compress.CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_files_without_a_checksum_load(tmp_path: Path) -> None:
    """Those of earlier versions."""
    model = pruned()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for entry in stored["quantization_config"]["layout"]:
        assert len(entry["spec"].pop("checksum")) == 8
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_could_not_be_loaded_is_not_saved(value: float, tmp_path: Path) -> None:
    model = pruned()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").values[3] = value
    with pytest.raises(hf_compress.CompressionError, match=r"layers\.1\.mlp\.up_proj"):
        model.save_pretrained(tmp_path)


def test_changes_behind_autograd_are_seen_after_eval() -> None:
    model = pruned(sparsity=0.5)
    before = logits(model)
    for layer in layers(model).values():
        layer.values.data.mul_(0.5)
    assert not torch.equal(logits(model.eval()), before)


@pytest.mark.parametrize("name", ["weight", "values"])
def test_a_missing_tensor_is_refused(name: str, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{name}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_compress.CheckpointError, match=rf"lacks the tensor.*up_proj\.{name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": 0.5, "criterion": "size"}, "criterion"),
        ({"sparsity": 0.5, "schedule": "cubic"}, "end_step"),
        ({"sparsity": 0.5, "schedule": "cubic", "start_step": 0.7, "end_step": 0.6}, "must come before"),
        ({"sparsity": 0.5, "start_step": 1.5}, "at most 1"),
        ({"sparsity": 0.5, "end_step": 9}, "no effect"),
        ({"sparsity": 0.5, "base_model_checksum": "x"}, "no effect without `base_model`"),
        ({"sparsity": 0.5, "structured": True, "scope": "row"}, "no meaning"),
        ({"sparsity": 0.5, "base_model": "x"}, "`base_model` has no effect"),
    ],
)
def test_recipes_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        PruningConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "movement"}, "PruningCallback"),
        ({"criterion": "delta"}, "base_model"),
        ({"schedule": "cubic", "end_step": 10}, "nothing is trained"),
        ({"warmup_steps": 3}, "nothing is trained"),
        ({"criterion": "wanda", "scope": "global"}, "not globally"),
    ],
)
def test_what_needs_a_training_says_so(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        pruned(calibration=calibration(), **fields)


def test_gradients_need_data_and_labels() -> None:
    with pytest.raises(hf_compress.CalibrationError, match="calibration"):
        pruned(criterion="snip")
    unlabelled = image_task().model_copy(
        update={"data_collator": lambda rows: {"pixel_values": inputs("vit", len(rows))["pixel_values"]}}
    )
    with pytest.raises(hf_compress.CalibrationError, match="labels"):
        pruned(classifier(), criterion="snip", calibration=unlabelled)
    with pytest.raises(hf_compress.CalibrationError, match="labels"):
        pruned(make_encoder("bert"), criterion="snip", calibration=calibration())


def test_batches_whose_gradients_are_nan_are_left_out() -> None:
    good = image_task()
    collate = good.data_collator
    assert collate is not None

    def broken(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        if 3 in rows:
            batch["pixel_values"] = torch.full_like(batch["pixel_values"], torch.nan)
        return batch

    model = pruned(classifier(), criterion="snip", calibration=good.model_copy(update={"data_collator": broken}))
    assert model.compression_report.notes["skipped_batches"] == 1
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)

    def hopeless(rows: list[int]) -> dict[str, torch.Tensor]:
        return {**collate(rows), "pixel_values": torch.full((len(rows), 3, 16, 16), torch.nan)}

    with pytest.raises(hf_compress.NumericalError, match="all 4 calibration batches"):
        pruned(classifier(), criterion="snip", calibration=good.model_copy(update={"data_collator": hopeless}))


def test_small_matrices_run_dense_at_densities_at_which_large_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = {
        (size, sparsity): sparse_layer(
            nn.Linear(size, size), torch.rand(size, size) > sparsity, "float32"
        ).runs_sparse(torch.ones(1, size))
        for size in (384, 768)
        for sparsity in (0.9, 0.98)
    }
    assert found == {
        (384, 0.9): False,
        (384, 0.98): SPARSE_ON_CPU,
        (768, 0.9): SPARSE_ON_CPU,
        (768, 0.98): SPARSE_ON_CPU,
    }


def test_layers_are_timed_beside_dense_ones() -> None:
    found = measure_layers(pruned(scope="layer"), tokens=3, repeats=1)
    assert sum(kind.count for kind in found) == 28
    assert all(kind.speedup > 0 and "density=" in kind.description for kind in found)
    with pytest.raises(hf_compress.ConfigurationError, match="no compressed linear layer"):
        measure_layers(make_model("llama"))


def test_modules_left_alone_are_named() -> None:
    model = pruned(modules_to_not_convert=["layers.3", "o_proj"])
    assert len(layers(model)) == 3 * 6
    assert any("layers.3.mlp.up_proj: excluded" in reason for reason in model.compression_report.left_alone)
    assert set(IMAGES) <= set(ENCODERS)


@pytest.mark.parametrize("fields", [{}, {"values": "int8"}, {"sparsity": 0.5}, {"sparsity": 0.0}])
def test_the_plan_is_within_two_percent_under_a_ceiling(fields: dict[str, Any], tmp_path: Path) -> None:
    config = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    dense = GPT2LMHeadModel(config)
    recipe = PruningConfig(**{"sparsity": 0.95, "criterion": "magnitude", "scope": "layer", **fields})
    plan = hf_compress.plan(dense, recipe)
    written = hf_compress.compress(dense, recipe).compression_report.bytes_after
    assert written <= plan.bytes_at_most
    assert plan.bytes_on_disk == pytest.approx(written, rel=0.02)
