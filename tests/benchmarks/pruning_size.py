"""Size and speed of pruned models: a ViT-H/14 of random weights on disk, single layers, and a whole ViT.

    python tests/benchmarks/pruning_size.py --folder FOLDER           # 632 million parameters, minutes and 6 GB
    python tests/benchmarks/pruning_size.py --layers --threads 1      # one layer, sparsities and numbers of tokens
    python tests/benchmarks/pruning_size.py --vit MODEL --threads 1   # images a second of a ViT, dense beside pruned

Timings are paired with dense ones in the same run, medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, ViTConfig, ViTModel

import hf_compress
from hf_compress import PruningConfig
from hf_compress.methods.pruning.masks import sparse_layer
from hf_compress.methods.pruning.mathematics import keep_best, kept_count
from hf_compress.methods.pruning.modules import SparseLinear


def seconds(functions: dict[str, Callable[[], Any]], repeats: int = 9) -> dict[str, float]:
    """Median wall time of each, in turns."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            count, began = 0, time.perf_counter()
            while time.perf_counter() - began < 0.05:
                function()
                count += 1
            if repeat:
                found[name].append((time.perf_counter() - began) / count)
    return {name: median(times) for name, times in found.items()}


def huge(folder: Path, sparsity: float) -> None:
    """ViT-H/14: 32 blocks of width 1280."""
    config = ViTConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14
    )
    torch.manual_seed(0)
    model = ViTModel(config, add_pooling_layer=False).to(torch.float16)
    count = sum(parameter.numel() for parameter in model.parameters())
    began = time.perf_counter()
    hf_compress.compress(model, PruningConfig(sparsity=sparsity, criterion="magnitude"))
    pruned = time.perf_counter()
    model.save_pretrained(folder)
    saved = time.perf_counter()
    again = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    loaded = time.perf_counter()
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, SparseLinear)}
    equal = all(
        torch.equal(layer.values, again.get_submodule(path).values)
        and torch.equal(layer.column_indices, again.get_submodule(path).column_indices)
        and torch.equal(layer.row_starts, again.get_submodule(path).row_starts)
        for path, layer in layers.items()
    )
    report = model.compression_report
    print(
        json.dumps(
            {
                "parameters": count,
                "bytes_in_float32": 4 * count,
                "bytes_of_all_files": sum(file.stat().st_size for file in folder.iterdir()),
                "bits_per_pruned_weight": round(report.bits_per_weight, 4),
                "share_of_float32_bytes": round(report.bits_per_weight / 32, 5),
                "bit_equal_after_reload": equal,
                "seconds_to_prune_and_encode": round(pruned - began, 1),
                "seconds_to_save": round(saved - pruned, 1),
                "seconds_to_load": round(loaded - saved, 1),
            }
        )
    )


def layers(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(columns, rows)
    score = torch.rand(rows, columns, generator=generator)
    for sparsity in (0.5, 0.8, 0.9, 0.95, 0.98):
        mask = keep_best([score], kept_count(rows * columns, sparsity))[0]
        sparse = sparse_layer(dense, mask, "auto")
        for tokens in (1, 16, 65, 257):
            x = torch.randn(tokens, columns, generator=generator)
            with torch.inference_mode():
                found = seconds({"dense": lambda x=x: dense(x), "sparse": lambda x=x, sparse=sparse: sparse(x)})
            print(
                json.dumps(
                    {
                        "rows": rows,
                        "columns": columns,
                        "sparsity": sparsity,
                        "tokens": tokens,
                        "dense_ms": round(1000 * found["dense"], 3),
                        "speedup": round(found["dense"] / found["sparse"], 2),
                    }
                ),
                flush=True,
            )


def vit(name: str, size: int, sparsity: float) -> None:
    for batch in (1, 8):
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16):
            models = {}
            for kind in ("dense", "pruned"):
                model = AutoModel.from_pretrained(name, dtype=dtype).eval()
                if kind == "pruned":
                    hf_compress.compress(model, PruningConfig(sparsity=sparsity, criterion="magnitude", scope="layer"))
                models[kind] = model
            pixels = images.to(dtype)
            with torch.inference_mode():
                found = seconds({kind: lambda model=model, p=pixels: model(p) for kind, model in models.items()}, 7)
            print(
                json.dumps(
                    {
                        "model": Path(name).name,
                        "image_size": size,
                        "batch": batch,
                        "dtype": str(dtype).removeprefix("torch."),
                        "sparsity": sparsity,
                        "dense_images_per_second": round(batch / found["dense"], 2),
                        "pruned_images_per_second": round(batch / found["pruned"], 2),
                        "speedup": round(found["dense"] / found["pruned"], 2),
                    }
                ),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty folder for the ViT-H/14")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--rows", type=int, default=5120)
    parser.add_argument("--columns", type=int, default=1280)
    parser.add_argument("--vit", help="a vision model to time")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.folder:
        huge(arguments.folder, arguments.sparsity)
    if arguments.layers:
        layers(arguments.rows, arguments.columns)
    if arguments.vit:
        vit(arguments.vit, arguments.image_size, arguments.sparsity)


if __name__ == "__main__":
    main()
