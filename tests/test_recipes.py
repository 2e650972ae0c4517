"""What the fields of a recipe do, and which recipes cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL_KINDS, compressed, make_model, recipe

import hf_compress
from hf_compress import (
    CompressionConfig,
    ConfigurationError,
    ModularDecompositionConfig,
)
from hf_compress.layout import layout_of


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction": 1.0}, r"share in \[0, 1\)"),
        ({"reduction": -0.1}, r"share in \[0, 1\)"),
        ({"reduction": {}}, "at least one kind"),
        ({"reduction": {"mlp": 0.2}, "kinds": ["mlp"]}, "either one"),
        ({"reductoin": 0.2, "reduction": 0.2}, "Did you mean `reduction`"),
        ({"kinds": "mlp"}, "list of kinds"),
        ({"kinds": ["mlp", "heads"]}, "query_key"),
        ({"kinds": []}, "at least one kind"),
        ({"temperature": 0}, "above 0"),
        ({"ridge": 0}, "ridge"),
        ({"portable": True, "kinds": ["query_key"]}, "MLPs only"),
        ({"portable": True, "allocation": "search"}, "nothing to search"),
        ({}, "reduction"),
    ],
)
def test_recipes_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModularDecompositionConfig(**({"reduction": 0.2} | fields if fields else {}))


def test_recipes_are_immutable_and_serialise_without_inputs() -> None:
    config = recipe(reduction={"mlp": 0.25, "query_key": 0.1})
    with pytest.raises(Exception, match="frozen"):
        config.reduction = 0.5  # type: ignore[misc]
    stored = json.loads(json.dumps(CompressionConfig.wrap(config).to_dict()))
    assert "calibration" not in json.dumps(stored)
    assert CompressionConfig.wrap(stored).stages[0].to_dict() == config.to_dict()


def test_reduction_per_kind(dense: Path) -> None:
    model = hf_compress.compress(make_model("llama"), recipe(reduction={"mlp": 0.25, "query_key": 0.5}))
    shares = {"mlp": [0, 0], "query_key": [0, 0]}
    for row in model.compression_report.modules:
        shares[row.kind][0] += row.parameters_before
        shares[row.kind][1] += row.parameters_after
    blocks = 4
    full = {"mlp": blocks * 3 * 48 * 64, "query_key": blocks * 48 * (64 + 32)}
    for kind, (before, after) in shares.items():
        expected = {"mlp": 0.25, "query_key": 0.5}[kind]
        assert (before - after) / full[kind] == pytest.approx(expected, abs=0.04)


def test_modules_to_not_convert() -> None:
    skip = ["model.layers.0", "mlp.down_proj"]
    model = compressed("llama", kinds=["query_key", "value_output"], reduction=0.1, modules_to_not_convert=skip)
    changed = [entry["path"] for entry in layout_of(model)]
    assert changed and not any("layers.0." in path or "mlp" in path for path in changed)
    assert any("modules_to_not_convert" in reason for reason in model.compression_report.left_alone)
    assert model.compression_report.block_linear_reduction == pytest.approx(0.1, abs=0.02)


def test_plan_tells_what_the_run_then_does(dense: Path) -> None:
    for kinds in (["mlp"], list(ALL_KINDS), "auto"):
        expected = hf_compress.plan(dense, recipe(kinds=kinds))
        model = hf_compress.compress(make_model("llama"), recipe(kinds=kinds))
        # Within half a step of the sizes, which on this tiny model is half a percent.
        assert expected.parameters_after == pytest.approx(model.compression_report.parameters_after, rel=0.01)
    assert "bytes on disk" in str(expected)
    assert os.path.getsize(dense / "model.safetensors") == pytest.approx(expected.bytes_before, rel=0.05)


@pytest.mark.parametrize("options", [{"allocation": "search", "search_minutes": 0.02}, {"temperature": "auto"}])
def test_choices_on_held_out_data_are_reported(options: dict[str, Any]) -> None:
    notes = compressed("llama", **options).compression_report.notes
    if "temperature" in options:
        assert notes["temperature"] in (0.02, 0.035, 0.05, 0.08, 0.15, 1.0)
    else:
        assert notes["search"]["held_out_perplexity_after"] <= notes["search"]["held_out_perplexity_before"]


def test_search_with_nothing_to_give_says_so() -> None:
    notes = compressed("llama", allocation="search", reduction=0.001).compression_report.notes
    assert "nothing to search" in notes["search"]


def test_a_very_low_temperature_fills_up_to_the_cap() -> None:
    model = compressed("llama", temperature=0.0002, reduction=0.5)
    assert model.compression_report.block_linear_reduction == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kinds", [ALL_KINDS, "auto"])
def test_coarse_steps_still_meet_a_high_budget(kinds: Any) -> None:
    report = compressed("llama", reduction=0.7, rank_multiple=8, kinds=kinds).compression_report
    assert report.block_linear_reduction == pytest.approx(0.7, abs=0.025)
