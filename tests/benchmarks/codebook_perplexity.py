"""Perplexity of learned codebooks beside the dense model: bits × variants of the recipe.

    python tests/benchmarks/codebook_perplexity.py --model MODEL --calibration valid.txt --evaluation test.txt \
        --num-samples 48 --bits 4 3 2 --variant default

Prints one JSON line a run: perplexity on every evaluation text (first 6×2048 tokens), bits a coded weight with
everything counted, and wall seconds of the compression.
"""

from __future__ import annotations

import json
import time
from typing import Any

from setting import Setting, parser_for

import hf_compress
from hf_compress import CalibrationConfig, CodebookConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "k-means start alone": {"learning": "none"},
    "error feedback, no learning": {"learning": "feedback"},
    "dense order": {"order": "dense"},
    "fp16 scales, groups of 64": {"integer_scales": False, "column_group": 64},
    "one scale a row": {"column_group": None},
    "a codebook a row": {"rows_per_codebook": 1},
    "block tuning": {"block_epochs": 2},
    "no block tuning": {"block_epochs": 0},
    "proximal gradient": {"learning": "proximal", "block_epochs": 0},
    "distance-weighted gradient": {"learning": "distance", "block_epochs": 0},
    "latent weights": {"learning": "latent", "block_epochs": 0},
    "mixed bits": {"bits": "auto"},
    "channels in order": {"reorder_channels": True},
    "embedding and head at 4 bits": {"embedding": 4},
}


def number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


def recipe(variant: str, bits: float, source: CalibrationConfig) -> CodebookConfig:
    fields = dict(VARIANTS[variant])
    if fields.get("bits") == "auto":
        fields["average_bits"] = bits
    elif "embedding" in fields:
        fields["bits"] = {**dict.fromkeys(("mlp", "query_key", "value_output"), bits), **fields}
        del fields["embedding"]
    else:
        fields["bits"] = bits
    return CodebookConfig(calibration=source, **fields)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--bits", type=number, nargs="+", default=[4, 3, 2])
    parser.add_argument("--variant", nargs="+", default=["default"], choices=list(VARIANTS))
    arguments = parser.parse_args()
    setting = Setting(arguments)
    print(json.dumps({"variant": "dense", **setting.evaluate(setting.load())}), flush=True)
    for variant in arguments.variant:
        for bits in arguments.bits:
            model = setting.load()
            began = time.perf_counter()
            hf_compress.compress(model, recipe(variant, bits, setting.source))
            seconds = time.perf_counter() - began
            report = model.compression_report
            line = {
                "variant": variant,
                "bits": bits,
                **setting.evaluate(model),
                "bits_per_weight": round(report.bits_per_weight, 3),
                "model_bits_per_weight": round(report.model_bits_per_weight, 3),
                "seconds": round(seconds, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
