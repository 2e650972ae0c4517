"""Two gloo processes: one compresses, both end with the same model; an error is raised on both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from conftest import ALL_KINDS, calibration, make_model, recipe, token_ids
import hf_compress
from hf_compress.engine import compress as engine

state = PartialState(cpu=True)
calls = []
walk = engine.walk
def counted(*arguments):
    calls.append(1)
    return walk(*arguments)
engine.walk = counted

mode = sys.argv[1]
model = make_model("llama")
if mode == "nan" and state.is_main_process:
    # A failure that only the main process meets, in the middle of its work.
    engine.walk = lambda *arguments: (_ for _ in ()).throw(hf_compress.NumericalError("model.layers.2: broken"))
try:
    if mode == "codebook":  # with norms that are tuned, indices in 16 bits, and three codes with a copy of their own
        bits = {{"mlp": 1.58, "query_key": 2, "embedding": 4}}
        options = hf_compress.CodebookConfig(
            bits=bits, rows_per_codebook=8, block_epochs=1, trainable_codebooks=True, calibration=calibration()
        )
        hf_compress.compress(model, options)
    else:
        fields = {{"portable": True}} if mode == "portable" else {{"kinds": ALL_KINDS}}
        hf_compress.compress(model, recipe(**fields))
except hf_compress.CompressionError as error:
    print(f"RANK {{state.process_index}} ERROR {{error}}", flush=True)
    sys.exit(3)
with torch.no_grad():
    total = model(token_ids(2, 16)).logits.double().sum().item()
width = model.config.intermediate_size
print(f"RANK {{state.process_index}} CALLS {{len(calls)}} WIDTH {{width}} SUM {{total!r}}", flush=True)
torch.distributed.destroy_process_group()
"""


def launch(tmp_path: Path, mode: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    port = 20000 + os.getpid() % 20000
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*command, str(script), mode], capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.parametrize("mode", ["all kinds", "portable", "codebook"])
def test_one_process_compresses_for_all(tmp_path: Path, mode: str) -> None:
    result = launch(tmp_path, mode)
    assert result.returncode == 0, result.stderr[-3000:]
    # Wherever they stand: the processes share a stream.
    lines = sorted(line.split() for line in re.findall(r"RANK \d CALLS \d+ WIDTH \d+ SUM [-.e\d]+", result.stdout))
    assert [line[1] for line in lines] == ["0", "1"]
    assert [line[3] for line in lines] == ["1", "0"], "only the main process walks over the blocks"
    assert lines[0][4:] == lines[1][4:], "both processes hold the same model"


def test_an_error_reaches_every_process(tmp_path: Path) -> None:
    result = launch(tmp_path, "nan")
    assert result.returncode != 0
    for rank in (0, 1):
        assert f"RANK {rank} ERROR" in result.stdout, result.stdout + result.stderr[-2000:]
    assert result.stdout.count("model.layers.2") == 2
