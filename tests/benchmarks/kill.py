"""Runs that are killed with SIGKILL at random moments and started again: does every result equal the undisturbed one?

    python tests/benchmarks/kill.py --model MODEL --calibration valid.tokens.txt --kills 50

Any checkpoint will do; the smaller, the more often it is killed while files are written. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.killing import Killer, Task


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--keep-activations", action="store_true")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(arguments.calibration.read_text()[:60_000])["input_ids"]
    rows = [ids[start : start + 64] for start in range(0, 24 * 64, 64)]
    stages = [
        {"method": "modular_decomposition", "reduction": 0.2, "order": "sequential"},
        {"method": "codebook", "bits": 3},
    ]
    task: Task = (stages, rows, arguments.keep_activations)
    killer, kills, runs = Killer(seed=0), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        killer.whole(arguments.model, str(base / "warm-up"), str(base / "warm-up-work"), task)
        seconds = killer.whole(arguments.model, str(base / "whole"), str(base / "work"), task)
        expected = tensors_of(base / "whole")
        while kills < arguments.kills:
            out, work = base / f"out-{runs}", base / f"work-{runs}"
            allowed = min(arguments.kills_per_run, arguments.kills - kills)
            kills += killer.killed(seconds, allowed, arguments.model, str(out), str(work), task)
            found = tensors_of(out)
            same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
            if not same:
                raise SystemExit(f"run {runs} ends with other tensors than the undisturbed one")
            runs += 1
    print(json.dumps({"kills": kills, "runs": runs, "seconds_of_a_run": round(seconds, 1), "all_bit_equal": True}))


if __name__ == "__main__":
    main()
