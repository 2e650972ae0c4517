"""Experts in parameters of three dimensions: every expert by its own tokens."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import IDS, calibration, logits, make_model, recipe, token_ids
from moe import MLPS, RECIPES, every_family, inputs_of, routed_rows
from transformers import BitsAndBytesConfig

import hf_compress
from hf_compress import (
    CodebookConfig,
    CompressionConfig,
    PruningConfig,
    UnsupportedModelError,
)
from hf_compress.anatomy import check_record, find_record, register_anatomy, resolve_anatomy
from hf_compress.engine.experts import ExpertStatistics, collect_experts


@every_family
def test_every_expert_is_the_optimum_for_its_own_tokens(name: str) -> None:
    """Given the channels that it keeps, an expert's down projection is the least-squares solution over the tokens
    that the router gave it, each weighted by the router, and over the floor for experts with few."""
    ids = token_ids(40, 32)
    data = calibration(num_samples=40, num_held_out=0).model_copy(update={"dataset": ids})
    dense = make_model(name, torch.float64)
    with inputs_of(dense, 0) as seen, torch.no_grad():
        dense(ids)
    model = hf_compress.compress(make_model(name, torch.float64), recipe(**MLPS, ridge=1e-9, calibration=data))
    old, new = (resolve_anatomy(each).experts(0) for each in (dense, model))
    assert old is not None and new is not None and new.width < old.width
    tokens = [routed_rows(seen, expert) for expert in range(old.count)]
    inner = [old.inner(rows, expert) * weights[:, None] for expert, (rows, weights) in enumerate(tokens)]
    floor = sum(float(each.square().sum()) for each in inner) / old.width / sum(len(each) for each in inner)
    for expert, seen_by_it in enumerate(inner):
        alike = new.up[expert, : new.width, None] == old.up[expert, None, : old.width]
        kept = alike.all(dim=-1).float().argmax(dim=1)
        assert len(set(kept.tolist())) == new.width
        lacking = old.width**2 / (old.width + len(seen_by_it)) * floor
        rows = torch.cat((seen_by_it, lacking**0.5 * torch.eye(old.width).double()))
        best = torch.linalg.lstsq(rows[:, kept], rows @ old.down[expert].T).solution
        torch.testing.assert_close(new.down[expert].T, best, rtol=1e-4, atol=1e-5)
    error = model.compression_report.modules[0].error
    assert 0 < error < 1


@every_family
def test_nothing_removed_is_the_dense_model(name: str) -> None:
    model = make_model(name, torch.float64)
    before = logits(model)
    hf_compress.compress(model, recipe(reduction=0.0))
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


@every_family
def test_statistics_are_those_of_a_loop_over_tokens(name: str) -> None:
    model = make_model(name, torch.float64)
    experts = resolve_anatomy(model).experts(1)
    assert experts is not None
    with inputs_of(model, 1) as seen, collect_experts(experts, ("input", "inner")) as found, torch.no_grad():
        model(IDS)
        model(IDS[:1, :7])
    for expert in range(experts.count):
        if not found.tokens[expert]:
            continue
        rows, weights = routed_rows(seen, expert)
        assert len(rows) == found.tokens[expert]
        for place, values in (("input", rows), ("inner", experts.inner(rows, expert))):
            scaled = values * weights[:, None]
            torch.testing.assert_close(found.grams[place][expert], scaled.T @ scaled)  # type: ignore[index]
    assert int(found.tokens.sum()) == (IDS.numel() + 7) * 2


def test_rare_experts_get_more_of_the_floor() -> None:
    grams = [torch.eye(4).double() * 8, torch.zeros(4, 4).double(), torch.diag(torch.tensor([1.0, 1, 1, 5])).double()]
    seen = ExpertStatistics({"inner": grams, "input": [g.clone() for g in grams]}, torch.tensor([8, 0, 2]))
    flat, full = seen.floors("inner"), seen.floors("input")
    torch.testing.assert_close(flat, torch.tensor((8 + 0 + 2) / 10).double())
    torch.testing.assert_close(full, sum(grams) / 10)
    torch.testing.assert_close(seen.gram("inner", 0, flat), grams[0] + 16 / 12 * torch.eye(4).double())
    torch.testing.assert_close(seen.gram("inner", 1, flat), 4 * torch.eye(4).double())
    torch.testing.assert_close(seen.gram("input", 2, full), grams[2] + 16 / 6 * full)
    assert torch.equal(grams[1], torch.zeros(4, 4).double()), "the sums themselves stay"


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_experts_that_saw_no_token_are_named_and_compressed(kind: str) -> None:
    model, ids = make_model("qwen3_moe"), token_ids(1, 4)
    with inputs_of(model, 1) as seen:
        logits(model, ids)
    unseen = sorted(set(range(6)) - set(seen[0][1].flatten().tolist()))
    assert unseen, "eight choices leave some of six experts out"
    data = calibration(num_samples=1, num_held_out=0).model_copy(update={"dataset": ids})
    numbers = ", ".join(map(str, unseen))
    message = rf"layers\.1\.mlp\.experts: no calibration token went to {len(unseen)} of 6 experts \({numbers}\)"
    config = recipe(**MLPS) if kind == "modular" else CodebookConfig(bits=3)
    with pytest.warns(UserWarning, match=message):
        hf_compress.compress(model, config, calibration=data)
    assert torch.isfinite(logits(model)).all()


def test_few_tokens_for_most_experts_are_named() -> None:
    data = calibration(num_samples=2, num_held_out=0).model_copy(update={"dataset": token_ids(2, 32)})
    with pytest.warns(UserWarning, match=r"half of the experts got no more than \d+ tokens, and have 64 channels"):
        hf_compress.compress(make_model("mixtral"), recipe(**MLPS), calibration=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_compress.compress(make_model("mixtral"), recipe(**MLPS))


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_more_data_do_not_hurt(kind: str) -> None:
    """As many tokens as channels, the worst number for a least-squares fit, are better than an eighth of them."""
    fresh, errors = token_ids(20, 32, seed=99), []
    for count, length in ((1, 8), (1, 32), (4, 32), (20, 32)):
        data = calibration(num_samples=count, num_held_out=0).model_copy(update={"dataset": token_ids(count, length)})
        config = recipe(**MLPS) if kind == "modular" else CodebookConfig(bits=3, rows_per_codebook=16)
        dense, found = make_model("mixtral"), 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = hf_compress.compress(make_model("mixtral"), config, calibration=data)
        for block in range(4):
            with inputs_of(dense, block) as seen:
                logits(dense, fresh)
            path = resolve_anatomy(dense).experts_path(block)
            assert path is not None
            with torch.no_grad():
                wanted, got = dense.get_submodule(path)(*seen[0]), model.get_submodule(path)(*seen[0])
            found += float((got - wanted).square().sum() / wanted.square().sum()) / 4
        errors.append(found)
    assert errors[0] > errors[2] > errors[3] and errors[1] < 1.1 * errors[0], errors


def test_an_expert_without_activations_stops_nothing() -> None:
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.gate_up_proj[1] = 0
    hf_compress.compress(model, RECIPES["modular"]())
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("second", [PruningConfig(sparsity=0.5), BitsAndBytesConfig(load_in_4bit=True)])
def test_a_stage_that_leaves_experts_alone_says_so(second: Any) -> None:
    stages = CompressionConfig(stages=[recipe(**MLPS, calibration=None), second], calibration=calibration())
    model = hf_compress.compress(make_model("mixtral"), stages)
    total = sum(parameter.numel() for parameter in make_model("mixtral").parameters())
    experts = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    line = f"mlp.experts (ResizedMixtralExperts) in 4 blocks: {experts / total:.1%} of the model's weights"
    assert any(found.startswith(line) for found in model.compression_report.left_alone)


def test_a_record_of_experts_alone() -> None:
    """Attention that no record describes leaves the experts to be decomposed."""
    record = find_record("mixtral")
    assert record is not None
    alone = replace(record, attention=None)
    register_anatomy(alone, replace=True)
    try:
        model = hf_compress.compress(make_model("mixtral"), RECIPES["modular"]())
    finally:
        register_anatomy(record, replace=True)
    assert len(model.compression_report.modules) == 4


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_padding_counts_for_nothing(kind: str) -> None:
    found = []
    for filler in (0, 50):
        ids, mask = token_ids(24), torch.ones(24, 32, dtype=torch.long)
        ids[::2, -9:], mask[::2, -9:] = filler, 0

        def collate(rows: list[int], ids: Any = ids, mask: Any = mask) -> dict[str, torch.Tensor]:
            return {"input_ids": ids[torch.tensor(rows)], "attention_mask": mask[torch.tensor(rows)]}

        data = hf_compress.CalibrationConfig(
            list(range(24)), data_collator=collate, num_samples=24, num_held_out=0, batch_size=8
        )
        config = recipe(**MLPS) if kind == "modular" else CodebookConfig(bits=3)
        found.append(hf_compress.compress(make_model("mixtral"), config, calibration=data).state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_data_help_every_expert() -> None:
    """Learned codes leave less of the outputs' error than nearest ones."""
    alone, learned = (
        hf_compress.compress(make_model("mixtral"), RECIPES[kind]()) for kind in ("codebook, no data", "codebook")
    )
    del alone
    nearest = hf_compress.compress(
        make_model("mixtral"), CodebookConfig(bits=3, rows_per_codebook=16, learning="none", calibration=calibration())
    )
    errors = [
        sum(row.error for row in model.compression_report.modules if ".experts." in row.path)
        for model in (nearest, learned)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_codes_train_with_their_tables() -> None:
    config = CodebookConfig(bits=3, rows_per_codebook=16, trainable_codebooks=True, learning="none")
    model = hf_compress.compress(make_model("mixtral"), config).train()
    ids = token_ids(8, 32)
    model(ids, labels=ids).loss.backward()
    tables = [(key, value) for key, value in model.named_parameters() if ".experts." in key]
    assert len(tables) == 4 * 2 * 2
    assert all(value.grad is not None and value.grad.abs().max() > 0 for _, value in tables)


@every_family
def test_the_record_describes_the_module(name: str) -> None:
    check_record(make_model(name))


def test_a_module_that_computes_something_else_is_found() -> None:
    model = make_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda hidden, index, weights: type(experts).forward(experts, hidden, index, weights.square())
    with pytest.raises(UnsupportedModelError, match="ExpertsAnatomy"):
        check_record(model)
