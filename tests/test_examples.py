"""The example scripts run, and go on where they were interrupted."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_pre_training_of_shared_models(architecture: str, tmp_path: Path) -> None:
    text = Path(argparse.__file__)
    options = (
        "--width",
        "64",
        "--length",
        "32",
        "--batch-size",
        "4",
        "--architecture",
        architecture,
        "--random-steps",
    )
    common = [sys.executable, str(EXAMPLES / "pretrain_shared.py"), "--text", str(text), "--held-out", str(text)]

    def run(steps: int) -> list[dict[str, float]]:
        command = [*common, "--out", str(tmp_path / "run"), "--steps", str(steps), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"iterations"')]
        return [json.loads(line) for line in lines]

    first, second = run(3), run(6)
    assert [line["iterations"] for line in first] == [12, 9, 8, 6, 4, 3]
    assert second[0]["scaled"] < first[0]["scaled"]
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
