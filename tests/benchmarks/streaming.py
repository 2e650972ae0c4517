"""Time and peak memory of compressing a checkpoint block by block, by the number of blocks.

    python tests/benchmarks/streaming.py --folder FOLDER --blocks 8 32 --method modular

Writes Llama-2-7B's shapes with random bfloat16 weights (13.5 GB with 32 blocks), compresses them in a process of its
own on random tokens, and prints one JSON line each with the highest resident memory of that process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

RECIPES = {
    "modular": {"method": "modular_decomposition", "reduction": 0.25, "kinds": ["mlp"], "allocation": "uniform"},
    "modular, all kinds": {
        "method": "modular_decomposition",
        "reduction": 0.25,
        "kinds": ["mlp", "query_key", "value_output"],
        "allocation": "uniform",
    },
    "wanda": {"method": "pruning", "sparsity": 0.5, "criterion": "wanda"},
    "codebook": {"method": "codebook", "bits": 3, "learning": "none"},
}

RUN = r"""
import json, re, sys, time
import torch, hf_compress
from hf_compress import CalibrationConfig, compress_checkpoint
from hf_compress.engine.freed import keep_heap_small
source, out, stage, samples, length, memory = sys.argv[1:]
keep_heap_small()  # as the command does with --max-memory
def highest():  # getrusage's survives exec: it would be that of the process that wrote the checkpoint
    return int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1]) * 1024 / 1e9
before = highest()
ids = torch.randint(3, 32000, (int(samples), int(length)), generator=torch.Generator().manual_seed(0))
start = time.perf_counter()
report = compress_checkpoint(source, out, {"stages": [json.loads(stage)]}, max_memory=memory or None,
    calibration=CalibrationConfig(ids, num_samples=int(samples), num_held_out=0, batch_size=1), device="cpu")
print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "program_gb": round(before, 2),
    "peak_gb": round(highest(), 2),
    "bytes_before": report.bytes_before, "bytes_after": report.bytes_after}))
"""


def write_checkpoint(folder: Path, blocks: int, width: int, inner: int) -> None:
    """A checkpoint of random weights, one file a block, without ever holding the model."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else "outside", []).append(name)
    generator, places, total = torch.Generator().manual_seed(0), {}, 0
    for group, names in groups.items():
        tensors = {}
        for name in names:
            ones = len(shapes[name]) == 1
            values = torch.ones(shapes[name]) if ones else torch.randn(shapes[name], generator=generator) * 0.02
            tensors[name] = values.bfloat16()
            total += tensors[name].numel() * 2
        file = f"model-{group}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoints, which are removed again")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--method", nargs="+", choices=list(RECIPES), default=["modular"])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--max-memory", default="")
    arguments = parser.parse_args()
    for blocks in arguments.blocks:
        source, out = arguments.folder / f"dense-{blocks}", arguments.folder / "out"
        write_checkpoint(source, blocks, arguments.width, arguments.inner)
        for method in arguments.method:
            data = [str(arguments.num_samples), str(arguments.sequence_length), arguments.max_memory]
            command = [sys.executable, "-c", RUN, str(source), str(out), json.dumps(RECIPES[method]), *data]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(json.dumps({"blocks": blocks, "method": method, **json.loads(found.splitlines()[-1])}), flush=True)
            shutil.rmtree(out)
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
