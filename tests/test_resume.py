"""An interrupted run goes on where it stopped; another run's working directory is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_KINDS, calibration, interrupt, make_model, recipe, token_ids

import hf_compress
from hf_compress import ResumeError
from hf_compress.engine import resume
from hf_compress.methods.modular import method as modular_method


@pytest.mark.parametrize("order", ["dense", "sequential"])
@pytest.mark.parametrize("stop_at", [0, 2, 3])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, stop_at: int
) -> None:
    config = recipe(kinds=ALL_KINDS, order=order)
    whole = hf_compress.compress(make_model("llama"), config).state_dict()
    real, seen = modular_method.compress_block, list[int]()

    def interrupted(anatomy: Any, config: Any, block: int, sizes: Any, statistics: Any) -> Any:
        if block == stop_at and stop_at not in seen:
            seen.append(block)
            raise KeyboardInterrupt
        seen.append(block)
        return real(anatomy, config, block, sizes, statistics)

    monkeypatch.setattr(modular_method, "compress_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    seen.clear()
    seen.append(stop_at)
    resumed = hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    assert seen[1:] == list(range(stop_at, 4)), "only unfinished blocks are computed again"
    assert len(resumed.compression_report.modules) > 0
    state = resumed.state_dict()
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in whole)


def test_a_finished_run_is_taken_up_whole(tmp_path: Path) -> None:
    first = hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    second = hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    assert str(first.compression_report) == str(second.compression_report)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("model_seed", "fields", "named"),
    [
        (1, {}, "model"),
        (0, {"reduction": 0.2}, "recipe"),
        (0, {"calibration": hf_compress.CalibrationConfig(token_ids(seed=9), num_samples=20)}, "calibration data"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, model_seed: int, fields: dict[str, Any], named: str) -> None:
    hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    with pytest.raises(ResumeError, match=named):
        hf_compress.compress(make_model("llama", seed=model_seed), recipe(**fields), working_directory=tmp_path)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    state = tmp_path / "stage-0" / "state.json"
    json.loads(state.read_text())
    state.write_text("{")
    with pytest.raises(ResumeError, match="damaged"):
        hf_compress.compress(make_model("llama"), recipe(calibration=calibration()), working_directory=tmp_path)


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    block = next((tmp_path / "stage-0").glob("block-*1.safetensors"))
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(ResumeError, match=r"block-00001\.safetensors is damaged"):
        hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    block.unlink()
    again = hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path).state_dict()
    whole = hf_compress.compress(make_model("llama"), recipe()).state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves no time to clean up: here the last step of every write, the move into place, never happens."""
    stage = tmp_path / "stage-0"
    with monkeypatch.context() as killed:
        killed.setattr(resume, "_replace", lambda temporary, path: interrupt())
        with pytest.raises(KeyboardInterrupt):
            hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    assert [file.name for file in stage.iterdir()] == [f".state.json.{os.getpid()}"]
    with monkeypatch.context() as killed:
        killed.setattr(resume, "save_file", lambda tensors, path, metadata: interrupt(path.write_bytes(b"half")))
        with pytest.raises(KeyboardInterrupt):
            hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    left = stage / f".block-00000.safetensors.{os.getpid()}"
    assert left.exists()
    left.rename(stage / ".block-00000.safetensors.1")
    (stage / ".notes.1").write_text("of the user")
    with pytest.raises(ResumeError):
        hf_compress.compress(make_model("llama"), recipe(reduction=0.2), working_directory=tmp_path)
    assert (stage / ".block-00000.safetensors.1").exists(), "another run's folder is left as it is"
    hf_compress.compress(make_model("llama"), recipe(), working_directory=tmp_path)
    assert sorted(file.name for file in stage.iterdir()) == sorted(
        [".notes.1", "state.json", *(f"block-{block:05d}.safetensors" for block in range(4))]
    )
