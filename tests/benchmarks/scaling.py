"""How time and peak memory of a compression grow, and what its statistics cost beside a forward pass.

    python tests/benchmarks/scaling.py --figure scaling.png
    python tests/benchmarks/scaling.py --cost MODEL --num-samples 8 --dtype bfloat16 float32
    python tests/benchmarks/scaling.py --paper

The first goes through the number of blocks, the width, the tokens and the processes of a Llama of random weights, one
after the other, and prints a JSON line a measurement, then a line a series with the exponent that fits. Every
measurement has a process of its own with one thread (`--threads`), and several where processes are counted, joined by
gloo; peaks are of resident memory less that before the model is made. Wall time is what a user waits; CPU time is what
tells on a machine that is shared.

The second measures a model in a folder: a plain forward pass over random calibration tokens, and the walk over its
blocks that gathers all statistics, in turn, and prints what the second takes of the first. The third prints the plans
of Llama 3.1 with 8, 70 and 405 billion parameters on 1 to 64 accelerators, from their shapes alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASE = {"blocks": 4, "width": 256, "tokens": 4096, "processes": 1}
SERIES = {
    "blocks": (2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "tokens": (2048, 4096, 8192, 16384),
    "processes": (1, 2, 4),
}
# Growth that the work has by itself: that of the blocks' matrices for the width, until factorisations outgrow them.
LINEAR = ("blocks", "tokens")
LENGTH = 256
WORK = ("forward", "forward without head", "walk without statistics", "walk with all statistics")
LLAMA = {"8B": (4096, 14336, 32), "70B": (8192, 28672, 80), "405B": (16384, 53248, 126)}

RUN = r"""
import json, os, re, sys, time
import torch, hf_compress
from hf_compress import CalibrationConfig, ModularDecompositionConfig
from hf_compress.engine.freed import keep_heap_small
from transformers import LlamaConfig, LlamaForCausalLM
blocks, width, tokens, length, processes, threads, order = sys.argv[1:]
blocks, width, tokens, length = int(blocks), int(width), int(tokens), int(length)
torch.set_num_threads(int(threads))
keep_heap_small()  # as the command does with --max-memory
rank = int(os.environ.get("RANK", 0))
if int(processes) > 1:
    torch.distributed.init_process_group("gloo")
def highest():  # getrusage's survives exec: it would be that of the process that started this one
    return int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1]) * 1024
torch.ones(64, 64) @ torch.ones(64, 64)
before = highest()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
    num_attention_heads=width // 32, num_key_value_heads=max(width // 64, 1), head_dim=32, vocab_size=512)).eval()
ids = torch.randint(3, 512, (tokens // length, length), generator=torch.Generator().manual_seed(0))
config = ModularDecompositionConfig(reduction=0.25, kinds=["mlp", "query_key", "value_output"], allocation="uniform",
    order=order, calibration=CalibrationConfig(ids, num_samples=len(ids), num_held_out=0, batch_size=4))
wall, cpu = time.perf_counter(), time.process_time()
hf_compress.compress(model, config)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
found = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "peak_mb": round((highest() - before) / 1e6, 1)}
if int(processes) > 1:
    everyone = [None] * int(processes)
    torch.distributed.all_gather_object(everyone, found)
    found = {name: max(one[name] for one in everyone) for name in found}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
if rank == 0:
    print(json.dumps(found))
"""

COST = r"""
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from hf_compress.anatomy import resolve_anatomy, text_config
from hf_compress.engine.blocks import BlockStream, require_finite
from hf_compress.engine.freed import keep_heap_small
from hf_compress.methods.modular.statistics import collect_statistics
path, dtype, samples, length, size, threads, repeats, *chosen = sys.argv[1:]
samples, length, size = int(samples), int(length), int(size)
torch.set_num_threads(int(threads))
keep_heap_small()
model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
anatomy = resolve_anatomy(model)
ids = torch.randint(3, text_config(model).vocab_size, (samples, length), generator=torch.Generator().manual_seed(0))
batches = [{"input_ids": part} for part in ids.split(size)]
ALL = {"mlp", "query_key", "value_output"}
def forward(net):
    for batch in batches:
        net(**batch, use_cache=False)
def walk(kinds):
    stream = BlockStream(anatomy, batches)
    for block in range(len(anatomy)):
        with collect_statistics(anatomy, block, kinds):
            for batch in range(len(stream)):
                stream.hidden[batch] = require_finite(stream.run(block, batch), "output")
def timed(work):
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        work()
    return time.perf_counter() - wall, time.process_time() - cpu
work = {"forward": lambda: forward(model), "forward without head": lambda: forward(model.base_model),
    "walk without statistics": lambda: walk(set()), "walk with all statistics": lambda: walk(ALL)}
work = {name: run for name, run in work.items() if name in chosen}
with torch.no_grad():
    model(ids[:1, :256])
rounds = [{name: timed(run) for name, run in work.items()} for _ in range(int(repeats))]
print(json.dumps({name: [one[name] for one in rounds] for name in work}))
"""


def run(blocks: int, width: int, tokens: int, processes: int, threads: int, order: str) -> dict[str, float]:
    """One compression, in processes of its own; time and peak of the slowest and the largest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(value) for value in (blocks, width, tokens, LENGTH, processes, threads, order)]
    started = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "0"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", RUN, *arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a compression with {arguments} failed")
    found: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms: 1 is linear growth."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle = statistics.fmean(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All series; prints as it goes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.series:
        found[name] = []
        for size in SERIES[name]:
            setting = {**BASE, name: size}
            tries = [
                run(**setting, threads=arguments.threads, order=arguments.order) for _ in range(arguments.repeats)
            ]
            best = {key: min(one[key] for one in tries) for key in tries[0]}
            found[name].append({"series": name, **setting, "order": arguments.order, **best})
            print(json.dumps(found[name][-1]), flush=True)
        rows = found[name]
        sizes = [row[name] for row in rows]
        line: dict[str, Any] = {"series": name}
        for key in ("seconds", "cpu_seconds", "peak_mb"):
            line[f"exponent of {key}"] = round(exponent(sizes, [row[key] for row in rows]), 2)
        if name in LINEAR:
            # What starts once drops out of differences: twice as much on top takes twice as long.
            steps = [(b["cpu_seconds"] - a["cpu_seconds"]) / (b[name] - a[name]) for a, b in itertools.pairwise(rows)]
            line["last step / first step, a unit"] = round(steps[-1] / steps[0], 2)
        print(json.dumps(line), flush=True)
    return found


def draw(found: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """A panel a series: time on the left scale, peak memory on the right one, both from zero."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.4), squeeze=False)
    for panel, (name, rows) in zip(panels[0], found.items(), strict=True):
        sizes = [row[name] for row in rows]
        other = panel.twinx()
        panel.plot(sizes, [row["seconds"] for row in rows], "o-", color="black", label="time")
        panel.plot(sizes, [row["cpu_seconds"] for row in rows], "^:", color="black", label="CPU time")
        other.plot(sizes, [row["peak_mb"] for row in rows], "s--", color="tab:blue", label="peak memory")
        panel.set_ylim(bottom=0)
        other.set_ylim(bottom=0)
        panel.set_xlabel(name)
        panel.set_ylabel("seconds")
        other.set_ylabel("MB beyond the program", color="tab:blue")
        panel.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        lines = [*panel.get_lines(), *other.get_lines()]
    figure.legend(lines, [line.get_label() for line in lines], loc="upper center", ncol=len(lines), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(target, dpi=150)


def cost(arguments: argparse.Namespace) -> None:
    """Prints the medians and the ratios, of wall and of CPU time."""
    for dtype in arguments.dtype:
        numbers = (arguments.num_samples, arguments.sequence_length, arguments.batch_size, arguments.threads)
        values = [str(arguments.cost), dtype, *(str(number) for number in numbers), str(arguments.repeats)]
        values += arguments.work
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "GOMP_SPINCOUNT": "0"}
        command = [sys.executable, "-c", COST, *values]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        tries: dict[str, list[tuple[float, float]]] = json.loads(done.stdout.splitlines()[-1])
        line: dict[str, Any] = {"dtype": dtype, "tokens": arguments.num_samples * arguments.sequence_length}
        for position, clock in enumerate(("wall", "cpu")):
            seconds = {name: statistics.median(one[position] for one in runs) for name, runs in tries.items()}
            line[f"{clock} seconds"] = {name: round(value, 2) for name, value in seconds.items()}
            walk = seconds["walk with all statistics"]
            for name in WORK[:2]:
                if name in seconds:
                    line[f"{clock} ratio to {name}"] = round(walk / seconds[name], 3)
        print(json.dumps(line), flush=True)


def paper(arguments: argparse.Namespace) -> None:
    """Prints a table a model, with what it assumes."""
    from transformers import LlamaConfig

    import hf_compress
    from hf_compress import CalibrationConfig, ModularDecompositionConfig

    kinds: Any = arguments.kinds.split(",") if arguments.kinds != "auto" else "auto"
    for name, (width, inner, blocks) in LLAMA.items():
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            num_attention_heads=width // 128,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=131072,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )
        recipe = ModularDecompositionConfig(reduction=0.3, kinds=kinds, order=arguments.order)
        data = CalibrationConfig("not read", batch_size=arguments.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            began = time.perf_counter()
            planned = hf_compress.plan(folder, recipe, calibration=data, measure_time=False)
            text = str(planned.on_paper(arguments.devices, arguments.hardware))
            print(f"Llama 3.1 {name}, planned in {time.perf_counter() - began:.1f} s\n{text}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--order", choices=["dense", "sequential"], default="dense")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many; with --cost, the median")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cost", type=Path, metavar="MODEL", help="measure what statistics cost on this model")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="with --cost: the last and others")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--kinds", default="auto", help="with --paper: auto (probes), or some of mlp,query_key,…")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--hardware", default="h100")
    arguments = parser.parse_args()
    if arguments.cost is not None:
        cost(arguments)
    elif arguments.paper:
        paper(arguments)
    else:
        found = measure(arguments)
        if arguments.figure is not None:
            draw(found, arguments.figure)


if __name__ == "__main__":
    main()
