"""Perplexity of modular decomposition beside the dense model: reductions × variants of the recipe.

    python tests/benchmarks/modular_perplexity.py --model MODEL --calibration valid.txt --evaluation test.txt \
        --reduction 0.1 0.2 0.3 0.4 --variant default search

Prints one JSON line a run: perplexity on every evaluation text (first 6×2048 tokens), wall seconds of the compression,
and the same in units of a plain forward pass over the calibration tokens.
"""

from __future__ import annotations

import json
import time
from typing import Any

from setting import Setting, parser_for

import hf_compress
from hf_compress import ModularDecompositionConfig

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
    parser = parser_for(__doc__)
    parser.add_argument("--reduction", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--variant", nargs="+", default=["default"], choices=list(VARIANTS))
    parser.add_argument("--search-minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    setting = Setting(arguments)
    dense = setting.load()
    forward = setting.forward_seconds(dense)
    print(
        json.dumps({"variant": "dense", **setting.evaluate(dense), "forward_seconds": round(forward, 1)}), flush=True
    )
    for variant in arguments.variant:
        for reduction in arguments.reduction:
            model = setting.load()
            began = time.perf_counter()
            config = ModularDecompositionConfig(
                reduction=reduction,
                calibration=setting.source,
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
                        **setting.evaluate(model),
                        "removed": round(report.block_linear_reduction, 4),
                        "seconds": round(seconds, 1),
                        "forward_passes": round(seconds / forward, 2),
                        "notes": notes,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
