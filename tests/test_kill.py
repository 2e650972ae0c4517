"""kill -9 at random moments: the same call goes on, and its result is that of an undisturbed run, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, token_ids
from safetensors.torch import load_file
from support.killing import Killer

import hf_compress
from hf_compress import ResumeError
from hf_compress.engine import resume

MODULAR: dict[str, Any] = {"method": "modular_decomposition", "reduction": 0.25, "order": "sequential"}
CODEBOOK: dict[str, Any] = {"method": "codebook", "bits": 3}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("keep_activations", [False, True])
def test_a_killed_run_goes_on(keep_activations: bool, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    make_model("llama").save_pretrained(dense)
    task = ([MODULAR, CODEBOOK], token_ids().tolist(), keep_activations)
    killer = Killer(seed=int(keep_activations))
    killer.whole(str(dense), str(tmp_path / "warm-up"), str(tmp_path / "warm-up-work"), task)
    seconds = killer.whole(str(dense), str(tmp_path / "whole"), str(tmp_path / "work"), task)
    expected, kills, runs = tensors_of(tmp_path / "whole"), 0, 0
    while kills < 5:
        out, work = tmp_path / f"out-{runs}", tmp_path / f"work-{runs}"
        kills += killer.killed(seconds, 5 - kills, str(dense), str(out), str(work), task)
        found = tensors_of(out)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        runs += 1
        assert runs < 20, "the runs end before they can be killed"


@pytest.mark.parametrize("order", ["dense", "sequential"])
def test_kept_activations_spare_the_finished_blocks(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_compress.engine.blocks import BlockStream

    config = hf_compress.ModularDecompositionConfig(
        reduction=0.25,
        kinds=["mlp"],
        allocation="uniform",
        order=order,
        calibration=hf_compress.CalibrationConfig(token_ids(), num_samples=20, batch_size=8),
    )
    whole = hf_compress.compress(make_model("llama"), config)
    options: dict[str, Any] = {"working_directory": tmp_path, "keep_activations": True}
    hf_compress.compress(make_model("llama"), config, **options)
    (tmp_path / "stage-0" / "block-00003.safetensors").unlink()
    ran: list[int] = []
    run = BlockStream.run
    monkeypatch.setattr(BlockStream, "run", lambda self, index, batch: ran.append(index) or run(self, index, batch))
    resumed = hf_compress.compress(make_model("llama"), config, **options)
    assert set(ran) == {3}, "only the unfinished block runs"
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    # An earlier block that is gone: what was kept is behind it, and everything before is run again.
    (tmp_path / "stage-0" / "block-00001.safetensors").unlink()
    again = hf_compress.compress(make_model("llama"), config, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_full_disk_leaves_the_resume_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf_compress.ModularDecompositionConfig(
        reduction=0.25, calibration=hf_compress.CalibrationConfig(token_ids(), num_samples=20, num_held_out=4)
    )
    save, written = resume.save_file, []

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if len(written) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        save(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", full)
        with pytest.raises(ResumeError, match=r"No space left.*make room"):
            hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    names = sorted(file.name for file in (tmp_path / "stage-0").iterdir())
    assert names == ["block-00000.safetensors", "block-00001.safetensors", "state.json"]
    resumed = hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    whole = hf_compress.compress(make_model("llama"), config)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_keeping_needs_a_place() -> None:
    with pytest.raises(hf_compress.ConfigurationError, match="working_directory"):
        hf_compress.compress(
            make_model("llama"), {"method": "codebook", "bits": 3, "learning": "none"}, keep_activations=True
        )
