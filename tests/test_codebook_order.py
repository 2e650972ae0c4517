"""Channels that change places so that alike ones share scales, and codebooks that need no index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, FAMILIES, IDS, calibration, logits, make_model
from families import CONFIGS, make, outputs
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_compress
from hf_compress import CodebookConfig, LayerSharingConfig, ModularDecompositionConfig
from hf_compress.anatomy import dense_rows, resolve_anatomy
from hf_compress.methods.codebook import CodebookLinear
from hf_compress.methods.codebook.modules import CodebookEmbedding
from hf_compress.methods.codebook.order import Channels, channels_of_block

# Their MLPs end in a matrix that stays dense, and their attention is described by its matrices alone.
NOTHING = ("t5", "t5_gated")


def reordered(family: str = "llama", **fields: Any) -> PreTrainedModel:
    defaults: dict[str, Any] = {"bits": 3, "calibration": calibration(), "reorder_channels": True}
    return hf_compress.compress(make_model(family), CodebookConfig(**{**defaults, **fields}))


def all_channels(model: PreTrainedModel) -> list[Channels]:
    anatomy = resolve_anatomy(model)
    return [
        channels
        for block in range(len(anatomy))
        for channels in channels_of_block(anatomy, block, {path for path, _ in anatomy.block_weights(block)})
    ]


def turn(model: PreTrainedModel, channels: Channels) -> None:
    """Bring the channels of a dense model in their new order."""
    reader = dense_rows(model.get_submodule(channels.reader))
    order = channels.order(reader)
    assert not torch.equal(order, order.sort(dim=1).values)
    for path in channels.writers:
        module: Any = model.get_submodule(path)
        rows = channels.rows(order)
        assert torch.equal(rows.sort().values, torch.arange(len(dense_rows(module))))
        dense_rows(module).copy_(dense_rows(module)[rows].clone())
        if module.bias is not None:
            module.bias.copy_(module.bias[rows].clone())
    reader.copy_(reader[:, channels.columns(order)].clone())


@pytest.mark.parametrize("name", sorted({**FAMILIES, **EXPERTS, **CONFIGS}))
def test_the_order_of_channels_is_nobody_elses_business(name: str) -> None:
    known = name in FAMILIES or name in EXPERTS
    model = make_model(name, torch.float64) if known else make(name, torch.float32)
    before = [logits(model)] if known else outputs(model, name)
    found = all_channels(model)
    with torch.no_grad():
        for channels in found:
            turn(model, channels)
    for after, wanted in zip([logits(model)] if known else outputs(model, name), before, strict=True):
        torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)
    assert bool(found) == (name not in NOTHING)


def test_queries_of_a_key_head_keep_to_their_values() -> None:
    channels = Channels(("value",), "output", heads=2, readers=2)
    energy = torch.tensor([1.0, 5, 2, 2, 0, 3, 1, 0, 7, 2, 3, 4])  # of a head 3, 5, 5 and 3, 3, 11
    order = channels.order(energy[None].sqrt())
    assert order.tolist() == [[1, 2, 0], [2, 0, 1]]
    assert channels.rows(order).tolist() == [1, 2, 0, 5, 3, 4]
    assert channels.columns(order).tolist() == [1, 2, 0, 4, 5, 3, 8, 6, 7, 11, 9, 10]


def test_the_rows_that_write_channels_need_no_index(tmp_path: Path) -> None:
    model = reordered("llama_bias", learning="none", calibration=None, rows_per_codebook=8)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, CodebookLinear)}
    for name, layer in packed.items():
        writes = name.endswith(("up_proj", "gate_proj", "v_proj"))
        assert layer.format.books > 1 and (layer.row_codebook is None) == writes == layer.format.in_turn, name
    plain = hf_compress.compress(
        make_model("llama_bias"), CodebookConfig(bits=3, learning="none", rows_per_codebook=8)
    )
    spared = plain.compression_report.bytes_after - model.compression_report.bytes_after
    assert spared == 4 * 2 * (64 + 64 + 32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    before = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), before, rtol=1e-5, atol=1e-5)


def test_the_plan_is_met_to_the_byte(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    # Three codebooks serve 22 of 64 rows in turn; two of the 32 values would take 16, so those keep their index.
    for rows in (16, 22):
        recipe = CodebookConfig(bits=3, learning="none", reorder_channels=True, rows_per_codebook=rows)
        plan = hf_compress.plan(tmp_path, recipe)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=recipe)
        assert plan.bytes_on_disk == model.compression_report.bytes_after
        layers = model.model.layers[0].mlp.up_proj, model.model.layers[0].self_attn.v_proj
        assert [layer.format.in_turn for layer in layers] == [True, rows == 16]


def test_columns_of_alike_size_share_scales() -> None:
    """The errors are those of the same channels, and lower where sizes differ."""
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            sizes = torch.tensor([1.0, 30.0]).repeat(32)
            layer.mlp.down_proj.weight.mul_(sizes)
            layer.mlp.up_proj.weight.div_(sizes[:, None])
    state = model.state_dict()

    def errors(**fields: Any) -> tuple[float, float]:
        model = make_model("llama")
        model.load_state_dict(state)
        before = logits(model)
        hf_compress.compress(model, CodebookConfig(bits=3, calibration=calibration(), **fields))
        rows = [row for row in model.compression_report.modules if row.path.endswith("down_proj")]
        after = float((logits(model) - before).square().mean() / before.square().mean())
        return sum(row.error for row in rows), after

    (plain, plain_after), (sorted_, sorted_after) = errors(), errors(reorder_channels=True)
    assert sorted_ < 0.8 * plain
    assert sorted_after < plain_after


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama_bias", {"block_epochs": 1}),
        ("opt", {"bits": "auto", "average_bits": 3.5}),
        ("gemma3", {"order": "dense", "learning": "feedback"}),
    ],
)
def test_every_recipe_goes_with_it(family: str, fields: dict[str, Any]) -> None:
    dense = logits(make_model(family))
    fields = {"bits": 4, **fields}
    plain, in_order = (
        float((logits(reordered(family, reorder_channels=flag, **fields)) - dense).square().mean())
        for flag in (False, True)
    )
    # A channel in the wrong place costs far more than luck with codes.
    assert in_order < 2 * plain
    assert in_order < 0.2 * float(dense.square().mean())


def test_smaller_matrices_are_sorted_too(tmp_path: Path) -> None:
    model = make_model("llama")
    hf_compress.compress(model, ModularDecompositionConfig(reduction=0.2, calibration=calibration()))
    before = logits(model)
    hf_compress.compress(model, CodebookConfig(bits=3, calibration=calibration(), reorder_channels=True))
    assert float((logits(model) - before).square().mean()) < 0.1 * float(before.square().mean())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_excluded_matrices_keep_their_channels() -> None:
    model = reordered(modules_to_not_convert=["layers.0.mlp.gate_proj"])
    packed = {name: module for name, module in model.named_modules() if isinstance(module, CodebookLinear)}
    assert not packed["model.layers.0.mlp.up_proj"].format.in_turn
    assert packed["model.layers.0.self_attn.v_proj"].format.in_turn
    assert packed["model.layers.1.mlp.up_proj"].format.in_turn


def test_tables_are_trained_through_codebooks_in_turn() -> None:
    model = reordered(trainable_codebooks=True).train()
    layer = model.model.layers[0].mlp.up_proj
    model(IDS, labels=IDS).loss.backward()
    assert layer.format.in_turn and layer.codebooks.grad.abs().amax(dim=1).min() > 0


def test_shared_layers_are_refused() -> None:
    model = hf_compress.compress(make_model("llama"), LayerSharingConfig(unique_layers=2, lora_rank=2))
    with pytest.raises(hf_compress.ConfigurationError, match="reorder_channels=True"):
        hf_compress.compress(model, CodebookConfig(bits=3, learning="none", reorder_channels=True))


def test_what_cannot_be_sorted_is_refused() -> None:
    with pytest.raises(hf_compress.ConfigurationError, match="no channels of T5Model"):
        hf_compress.compress(make("t5"), CodebookConfig(bits=3, learning="none", reorder_channels=True))
    recipe = CodebookConfig(bits={"query_key": 3}, learning="none", reorder_channels=True)
    with pytest.raises(hf_compress.ConfigurationError, match="no channels of LlamaForCausalLM"):
        hf_compress.compress(make_model("llama"), recipe)


def test_a_table_with_codebooks_in_turn_looks_its_rows_up() -> None:
    spec = {"bits": 3, "books": 4, "column_group": 32, "integer_scales": True, "in_turn": True}
    table: Any = CodebookEmbedding.from_spec(torch.nn.Embedding(40, 64), spec)
    torch.manual_seed(0)
    table.weight.random_(-(2**31), 2**31)
    for tensor in (table.codebooks, table.row_scales):
        tensor.normal_()
    table.scales.random_(1, 255)
    ids = torch.tensor([[39, 0], [10, 9]])
    assert torch.equal(table(ids), table.matrix()[ids]) and torch.equal(table(ids.int()), table(ids))
