"""One, two and four gloo processes compress together: each runs a part of the data and solves a part of the modules,
and all end with the model that one process makes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from support.processes import (
    Processes,
    compress_broken,
    compress_differently,
    compress_encoder,
    compress_files,
    compress_model,
    compress_models,
    compress_on_little,
    compress_where_reading_fails,
    folder_names,
    stream_where_memory_differs,
)

from hf_compress.engine.blocks import every_nth

ALL_KINDS = ["mlp", "query_key", "value_output"]
MODULAR: dict[str, Any] = {"method": "modular_decomposition", "reduction": 0.25}
# Name: stages, options of the calibration data, and whether the processes share the work.
RECIPES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], bool]] = {
    "modular": ([{**MODULAR, "kinds": ALL_KINDS, "allocation": "uniform"}], {}, True),
    "modular, sequential": (
        [{**MODULAR, "kinds": ALL_KINDS, "allocation": "uniform", "order": "sequential"}],
        {},
        True,
    ),
    # What the survey probes on held-out text, the search included.
    "probes": ([{**MODULAR, "temperature": "auto"}], {}, True),
    "search": ([{**MODULAR, "kinds": ["mlp"], "allocation": "search", "search_minutes": 60}], {}, True),
    "portable": ([{**MODULAR, "portable": True}], {}, True),
    "codebook": (
        [{"method": "codebook", "bits": 3, "reorder_channels": True}],
        {"num_samples": 19, "batch_size": 5},
        True,
    ),
    "mixed bits": ([{"method": "codebook", "bits": "auto", "average_bits": 2.5, "order": "dense"}], {}, True),
    "Wanda": ([{"method": "pruning", "sparsity": 0.5, "criterion": "wanda"}], {}, True),
    "stacked": (
        [MODULAR, {"method": "codebook", "bits": 3, "order": "dense"}],
        {},
        True,
    ),
    "experts": (
        [
            {**MODULAR, "kinds": ["mlp"], "allocation": "uniform"},
            {"method": "codebook", "bits": 3, "order": "dense"},
        ],
        {},
        True,
    ),
    # Norms that are tuned, indices in 16 bits, and three codes with a copy of their own.
    "tuned blocks": (
        [
            {
                "method": "codebook",
                "bits": {"mlp": 1.58, "query_key": 2, "embedding": 4},
                "rows_per_codebook": 8,
                "block_epochs": 1,
                "trainable_codebooks": True,
            }
        ],
        {},
        False,
    ),
    "sharing": ([{"method": "sharing", "unique_layers": 2, "lora_rank": 2}], {}, False),
    "sharing by data": (
        [{"method": "sharing", "unique_layers": 2, "lora_rank": 2, "initialization": "activation_aware"}],
        {},
        False,
    ),
    "too few sequences": (
        [{**MODULAR, "kinds": ["mlp"]}],
        {"num_samples": 1, "num_held_out": 0},
        False,
    ),
}
PROCESSES = Processes()


@functools.cache
def all_compressed(size: int) -> list[Any]:
    tasks = {}
    for name, (stages, options, shared) in RECIPES.items():
        # In float64 rounding moves no weight from one code to the next.
        tasks[name] = (
            "mixtral" if name == "experts" else "llama",
            stages,
            "float64" if shared else "float32",
            options,
        )
    results = PROCESSES.run(size, compress_models, tasks)
    for result in results:
        assert isinstance(result, dict), result
    return results


def compressed(recipe: str, size: int) -> list[Any]:
    return [result[recipe] for result in all_compressed(size)]


def assert_alike(found: Any, expected: Any) -> None:
    """The same JSON but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert found == expected


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_result_is_that_of_one_process(recipe: str, size: int) -> None:
    alone = compressed(recipe, 1)[0]
    results = compressed(recipe, size)
    for result in results:
        assert result["state"] == results[0]["state"], "the processes hold different models"
        assert [path for path, _ in result["rows"]] == [path for path, _ in alone["rows"]]
        errors = [[error or 0.0 for _, error in rows] for rows in (result["rows"], alone["rows"])]
        np.testing.assert_allclose(errors[0], errors[1], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(result["logits"], alone["logits"], rtol=1e-6, atol=1e-6)
        assert result["left_alone"] == alone["left_alone"]
        assert_alike(result["notes"], alone["notes"])


@pytest.mark.parametrize("recipe", [name for name, (_, _, shared) in RECIPES.items() if shared])
def test_each_has_its_share_of_the_data(recipe: str) -> None:
    alone, results = compressed(recipe, 1)[0], compressed(recipe, 4)
    others = [result["sequences"] for result in results[1:]]
    # Where they do not survey together, the main process has more.
    assert max(others) <= alone["sequences"] / 3 and min(others) > 0
    assert results[0]["sequences"] < alone["sequences"]
    if recipe in ("probes", "search"):
        assert results[0]["sequences"] <= alone["sequences"] / 3


@pytest.mark.parametrize("recipe", ["modular", "modular, sequential", "codebook"])
def test_each_solves_its_share(recipe: str) -> None:
    solved = [result["solved"] for result in compressed(recipe, 2)]
    assert min(solved) >= 4, "of four blocks with two or more pieces each"


@pytest.mark.parametrize("recipe", [name for name, (_, _, shared) in RECIPES.items() if not shared])
def test_otherwise_one_works_for_all(recipe: str) -> None:
    results = compressed(recipe, 2)
    assert results[1]["sequences"] == results[1]["solved"] == 0


@pytest.mark.parametrize("recipe", ["modular", "codebook"])
def test_as_many_processes_make_the_same_bytes(recipe: str) -> None:
    stages, options, _ = RECIPES[recipe]
    again = PROCESSES.run(4, compress_model, "llama", stages, "float64", options)
    assert again[0]["state"] == compressed(recipe, 4)[0]["state"]


@pytest.mark.parametrize(
    ("work", "arguments"),
    [*((compress_on_little, (name, 20)) for name in ("helium", "bart", "clip", "t5")), (compress_encoder, ())],
)
def test_a_survey_finds_the_same_together(work: Any, arguments: tuple[Any, ...]) -> None:
    """Also where most have no sequence of their own, and where hidden states are what counts."""
    alone = PROCESSES.run(1, work, *arguments)[0]
    results = PROCESSES.run(3, work, *arguments)
    assert isinstance(alone, dict), alone
    assert "block_influence" in alone["notes"] and ("t5" in arguments or "division_trials" in alone["notes"])
    for result in results:
        assert isinstance(result, dict), result
        assert result["state"] == results[0]["state"]
        assert_alike(result["notes"], alone["notes"])
        for name, tensor in alone["state"].items():
            assert np.shape(tensor) == np.shape(result["state"][name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_raised_on_all(rank: int) -> None:
    for found in PROCESSES.run(2, compress_broken, rank):
        assert "NumericalError" in found and "model.layers.2" in found, found


@pytest.mark.parametrize("stage", [RECIPES[name][0][0] for name in ("modular", "probes", "codebook")])
def test_checkpoints_are_streamed_by_all_processes(stage: dict[str, Any], tmp_path: Path) -> None:
    make_model("llama", torch.float64).save_pretrained(tmp_path / "dense")
    out = [str(tmp_path / name) for name in ("alone", "together")]
    assert PROCESSES.run(1, compress_files, str(tmp_path / "dense"), out[0], None, [stage], -2) == ["done"]
    assert PROCESSES.run(2, compress_files, str(tmp_path / "dense"), out[1], None, [stage], -2) == ["done", "done"]
    alone, together = (load_file(f"{folder}/model.safetensors") for folder in out)
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-6, atol=1e-9)
    assert folder_names(str(tmp_path)) == sorted(
        [*("alone", "dense", "together")]
        + [f"{name}/{file}" for name in ("alone", "dense", "together") for file in folder_names(f"{tmp_path}/{name}")]
    ), "nothing is left beside the result"


@pytest.mark.parametrize("time_it_fails", [1, 2, 3, 4])
def test_what_one_cannot_read_is_an_error_of_all(time_it_fails: int, tmp_path: Path) -> None:
    """In the pass for the blocks' influence, in both probes, and in the walk."""
    make_model("llama").save_pretrained(tmp_path / "dense")
    out = str(tmp_path / "out")
    found = PROCESSES.run(2, compress_where_reading_fails, str(tmp_path / "dense"), out, 1, time_it_fails)
    assert all(text.startswith("CheckpointError: the weight cannot be read") for text in found), found
    assert not Path(out).exists()


def test_a_run_of_several_processes_goes_on(tmp_path: Path) -> None:
    make_model("llama", torch.float64).save_pretrained(tmp_path / "dense")
    stages = RECIPES["modular"][0]
    whole, cut, work = (str(tmp_path / name) for name in ("whole", "cut", "work"))
    assert PROCESSES.run(2, compress_files, str(tmp_path / "dense"), whole, None, stages, -2) == ["done", "done"]
    for found in PROCESSES.run(2, compress_files, str(tmp_path / "dense"), cut, work, stages, 2):
        assert "power cut" in found
    assert (tmp_path / "work/stage-0/block-00001.safetensors").exists() and not Path(cut).exists()
    assert PROCESSES.run(2, compress_files, str(tmp_path / "dense"), cut, work, stages, -2) == ["done", "done"]
    first, second = (load_file(f"{folder}/model.safetensors") for folder in (whole, cut))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("weights", ["ConfigurationError: the processes differ in the weights"] * 2),
        ("recipe", ["ConfigurationError: the processes differ in the recipe"] * 2),
        ("damaged", ["NumericalError: the weight 'model.layers.1.mlp.up_proj.weight'"] * 2),
        ("main alone", ["ConfigurationError: 2 processes were started, and not all", "not called"]),
    ],
)
def test_processes_that_do_not_go_together(what: str, found: list[str]) -> None:
    """An error on all of them, and none waits for ever."""
    for text, expected in zip(PROCESSES.run(2, compress_differently, what), found, strict=True):
        assert text.startswith(expected), text


def test_processes_with_unlike_memory_do_alike(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "dense")
    arguments = (str(tmp_path / "dense"), str(tmp_path / "out"))
    assert PROCESSES.run(2, stream_where_memory_differs, *arguments) == ["True 1", "True 1"]


def test_sequences_are_dealt_out_in_turn() -> None:
    ids = torch.arange(7 * 3).reshape(7, 3)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in (ids[:4], ids[4:6], ids[6:])]
    dealt = [torch.cat([batch["input_ids"] for batch in every_nth(batches, rank, 3)]) for rank in range(3)]
    assert [part[:, 0].tolist() for part in dealt] == [[0, 9, 18], [3, 12], [6, 15]]
    assert every_nth(batches, 0, 1)[0]["input_ids"].equal(ids[:4])
