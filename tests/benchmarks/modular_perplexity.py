"""Perplexity of modular decomposition beside the dense model: reductions × variants of the recipe.

    python tests/benchmarks/modular_perplexity.py --model MODEL --calibration valid.txt --evaluation test.txt \
        --reduction 0.1 0.2 0.3 0.4 --variant default search

Prints one JSON line a run: perplexity on every evaluation text (first 6×2048 tokens), wall seconds of the compression,
and the same in units of a plain forward pass over the calibration tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress
from hf_compress import CalibrationConfig, ModularDecompositionConfig
from hf_compress.evaluation import perplexity

ALL_KINDS = ["mlp", "query_key", "value_output"]
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "search": {"allocation": "search"},
    "sequential": {"order": "sequential"},
    "search in dense order": {"order": "dense", "allocation": "search"},
    "temperature auto": {"temperature": "auto"},
    "MLP only": {"kinds": ["mlp"]},
    "MLP only, paper's score": {"kinds": ["mlp"], "channel_score": "ridge_leverage"},
    "MLP only, uniform": {"kinds": ["mlp"], "allocation": "uniform"},
    "MLP only, portable": {"portable": True},
    "MLP only, widths of any size": {"kinds": ["mlp"], "rank_multiple": 1},
    "all kinds at one share": {"kinds": ALL_KINDS},
    "all kinds at one share, uniform": {"kinds": ALL_KINDS, "allocation": "uniform"},
    "the paper": {"kinds": ALL_KINDS, "channel_score": "ridge_leverage", "value_output": "per_head"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="text file; its first tokens are used")
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True, help="text files, never calibrated on")
    parser.add_argument("--reduction", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--variant", nargs="+", default=["default"], choices=list(VARIANTS))
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--search-minutes", type=float, default=10.0)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    length, samples, held_out = arguments.sequence_length, arguments.num_samples, arguments.held_out
    ids = tokenizer(arguments.calibration.read_text(), verbose=False, return_tensors="pt")["input_ids"][0]
    rows = ids[: (samples + held_out) * length].view(-1, length)
    source = CalibrationConfig(rows, num_samples=samples, num_held_out=held_out)
    texts = {
        path.name: tokenizer(path.read_text(), verbose=False, return_tensors="pt")["input_ids"][0][: 6 * 2048]
        for path in arguments.evaluation
    }

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))

    def evaluate(model: Any) -> dict[str, float]:
        return {name: round(perplexity(model, text, context=2048).perplexity, 3) for name, text in texts.items()}

    dense = load()
    forward = forward_seconds(dense, rows[:samples])
    print(json.dumps({"variant": "dense", **evaluate(dense), "forward_seconds": round(forward, 1)}), flush=True)
    for variant in arguments.variant:
        for reduction in arguments.reduction:
            model = load()
            began = time.perf_counter()
            config = ModularDecompositionConfig(
                reduction=reduction,
                calibration=source,
                search_minutes=arguments.search_minutes,
                **VARIANTS[variant],
            )
            hf_compress.compress(model, config)
            seconds = time.perf_counter() - began
            report = model.compression_report
            notes = {name: value for name, value in report.notes.items() if name != "block_influence"}
            print(
                json.dumps(
                    {
                        "variant": variant,
                        "reduction": reduction,
                        **evaluate(model),
                        "removed": round(report.block_linear_reduction, 4),
                        "seconds": round(seconds, 1),
                        "forward_passes": round(seconds / forward, 2),
                        "notes": notes,
                    }
                ),
                flush=True,
            )


@torch.no_grad()
def forward_seconds(model: Any, rows: torch.Tensor) -> float:
    """Wall time of a plain forward pass over the calibration tokens, measured on an eighth of them."""
    part = rows[: max(len(rows) // 8, 1)]
    model(part[:1])
    began = time.perf_counter()
    for row in part:
        model(row[None])
    return (time.perf_counter() - began) * len(rows) / len(part)


if __name__ == "__main__":
    main()
