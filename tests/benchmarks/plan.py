"""What a plan says beside what the run takes: bytes, peak memory and time.

    python tests/benchmarks/plan.py --model MODEL --calibration valid.txt --num-samples 16

Prints one JSON line a recipe. Every run has a process of its own; its peak of resident memory before the model is
loaded is subtracted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = {
    "modular 15 %": "ModularDecompositionConfig(reduction=0.15)",
    "modular 20 %": "ModularDecompositionConfig(reduction=0.2)",
    "modular, sequential": "ModularDecompositionConfig(reduction=0.2, order='sequential')",
    "codebook 4 bits, k-means": "CodebookConfig(bits=4, learning='none')",
    "codebook 3 bits": "CodebookConfig(bits=3)",
    "codebook, embedding": "CodebookConfig(bits={'mlp': 3, 'query_key': 3, 'value_output': 3, 'embedding': 4})",
    "codebook 3 bits, feedback": "CodebookConfig(bits=3, learning='feedback')",
    "wanda 50 %": "PruningConfig(sparsity=0.5, criterion='wanda')",
    "magnitude 90 %": "PruningConfig(sparsity=0.9, criterion='magnitude')",
    "sharing 15": "LayerSharingConfig(unique_layers=15, lora_rank=32)",
    "modular 15 %, codebook 3 bits": "[ModularDecompositionConfig(reduction=0.15), CodebookConfig(bits=3)]",
    "modular 15 %, codebook 3 bits, feedback": (
        "[ModularDecompositionConfig(reduction=0.15), CodebookConfig(bits=3, learning='feedback')]"
    ),
}

RUN = """
import json, resource, sys, time
import torch, hf_compress
from hf_compress import *
from transformers import AutoModelForCausalLM, AutoTokenizer
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model_path, text, samples, length, dtype, recipe, folder = sys.argv[1:]
stages = eval(recipe)
source = CalibrationConfig(text, num_samples=int(samples), sequence_length=int(length))
config = CompressionConfig(stages=stages if isinstance(stages, list) else [stages], calibration=source)
tokenizer = AutoTokenizer.from_pretrained(model_path)
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
start = time.perf_counter()
hf_compress.compress(model, config, processing_class=tokenizer)
seconds, high = time.perf_counter() - start, peak()
model.save_pretrained(folder)
print(json.dumps({"seconds": seconds, "peak_memory": high - before, "bytes": model.compression_report.bytes_after}))
"""

PLAN = """
import json, sys, time
import hf_compress
from hf_compress import *
from transformers import AutoConfig, AutoModelForCausalLM
model_path, text, samples, length, dtype, recipe, _ = sys.argv[1:]
stages = eval(recipe)
source = CalibrationConfig(text, num_samples=int(samples), sequence_length=int(length))
config = CompressionConfig(stages=stages if isinstance(stages, list) else [stages], calibration=source)
start = time.perf_counter()
plan = hf_compress.plan(model_path, config, measure_time=True)
print(json.dumps({"bytes": plan.bytes_on_disk, "at_most": plan.bytes_at_most, "peak_memory": plan.peak_memory,
                  "seconds": plan.seconds, "took": time.perf_counter() - start}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="text file")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    arguments = parser.parse_args()
    for name in arguments.recipe:
        lines = {}
        with tempfile.TemporaryDirectory() as folder:
            for what, code in (("planned", PLAN), ("run", RUN)):
                values = [arguments.num_samples, arguments.sequence_length, arguments.dtype, RECIPES[name], folder]
                command = [sys.executable, "-c", code, arguments.model, arguments.calibration, *map(str, values)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                lines[what] = json.loads(done.stdout.splitlines()[-1])
            tensors = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        ratios = {key: round(lines["planned"][key] / lines["run"][key], 3) for key in ("peak_memory", "seconds")}
        print(json.dumps({"recipe": name, **lines, "file": tensors, "planned / run": ratios}), flush=True)


if __name__ == "__main__":
    main()
