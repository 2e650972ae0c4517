"""Memory and time of compressing a model whose weights are experts, from files to files.

    python tests/benchmarks/experts.py --folder FOLDER --blocks 2 --method modular codebook

Makes a checkpoint of random weights in Qwen3-30B-A3B's shapes (128 experts of width 768, hidden size 2048) with so
many blocks, and compresses it with one block in memory, each method in a process of its own. Prints a JSON line each:
sizes, seconds, and the peak of the process's own memory: pages of the files that it reads are the system's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SHAPES = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
}

METHODS = ("modular", "codebook", "codebook, feedback", "codebook, no data")
RUN = r"""
import json, re, sys, threading, time
import torch, hf_compress
from hf_compress import CalibrationConfig, CodebookConfig, ModularDecompositionConfig
source, target, method, tokens, bits = sys.argv[1:]
ids = torch.randint(3, 32000, (int(tokens) // 512, 512), generator=torch.Generator().manual_seed(0))
data = CalibrationConfig(ids, num_samples=len(ids), num_held_out=0, batch_size=1)
config = {
    "modular": lambda: ModularDecompositionConfig(reduction=0.25, kinds=["mlp"],
        allocation="uniform", calibration=data),
    "codebook": lambda: CodebookConfig(bits=int(bits), calibration=data),
    "codebook, feedback": lambda: CodebookConfig(bits=int(bits), learning="feedback", calibration=data),
    "codebook, no data": lambda: CodebookConfig(bits=int(bits), learning="none"),
}[method]()
highest = [0]
def watch():
    while True:
        status = open("/proc/self/status").read()
        highest[0] = max(highest[0], int(re.search(r"RssAnon:\s*(\d+) kB", status)[1]) * 1024)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
planned = hf_compress.plan(source, config, measure_time=False)
began = time.perf_counter()
report = hf_compress.compress_checkpoint(source, target, config)
seconds = time.perf_counter() - began
print(json.dumps({
    "method": method, "seconds": round(seconds), "peak_gb": round(highest[0] / 1e9, 2),
    "planned_peak_gb": round(planned.streamed_memory / 1e9, 2), "bits_per_weight": report.bits_per_weight,
    "bytes_before": report.bytes_before, "bytes_after": report.bytes_after, "planned_bytes": planned.bytes_on_disk,
    "mean_error": round(sum(row.error for row in report.modules) / len(report.modules), 4),
}))
"""


def make(folder: Path, blocks: int, experts: int) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = Qwen3MoeConfig(**{**SHAPES, "num_experts": experts}, num_hidden_layers=blocks, dtype="bfloat16")
    Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="2GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch: about 2.5 GB for two blocks")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--experts", type=int, default=SHAPES["num_experts"])
    parser.add_argument("--method", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bits", type=int, default=3)
    arguments = parser.parse_args()
    source = arguments.folder / f"dense-{arguments.blocks}-{arguments.experts}"
    if not (source / "config.json").is_file():
        make(source, arguments.blocks, arguments.experts)
    size = sum(file.stat().st_size for file in source.iterdir())
    print(json.dumps({"blocks": arguments.blocks, "on_disk_gb": round(size / 1e9, 2)}), flush=True)
    for method in arguments.method:
        target = arguments.folder / re.sub(r"\W+", "-", method)
        shutil.rmtree(target, ignore_errors=True)
        values = [str(source), str(target), method, str(arguments.tokens), str(arguments.bits)]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *values], check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
