"""Decomposition and codebooks together beside codebooks alone: bytes of the files and perplexity.

    python tests/benchmarks/stacks.py --model MODEL --calibration valid.txt --evaluation test.txt --num-samples 16 \\
        --held-out 4 --dtype bfloat16

Whether a stack is worth it shows where both take as many bytes: fewer weights at more bits against all at fewer.
"""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

from setting import Setting, parser_for

import hf_compress
from hf_compress import CodebookConfig, CompressionConfig, ModularDecompositionConfig
from hf_compress.evaluation import size_on_disk

RECIPES: dict[str, list[Any]] = {
    "codebook 4 bits, tables 4 bits": [CodebookConfig(bits=4, table_bits=4)],
    "codebook 3.25 bits": [CodebookConfig(bits="auto", average_bits=3.25)],
    "codebook 3 bits": [CodebookConfig(bits=3)],
    "codebook 2.75 bits": [CodebookConfig(bits="auto", average_bits=2.75)],
    "codebook 2.5 bits": [CodebookConfig(bits="auto", average_bits=2.5)],
    "modular 8 %, codebook 3 bits": [ModularDecompositionConfig(reduction=0.08), CodebookConfig(bits=3)],
    "modular 15 %, codebook 3 bits": [ModularDecompositionConfig(reduction=0.15), CodebookConfig(bits=3)],
}


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--learning", choices=["joint", "feedback"], default="joint", help="feedback is quicker")
    arguments = parser.parse_args()
    setting = Setting(arguments)
    for name in arguments.recipe:
        model = setting.load()
        stages = [
            stage.model_copy(update={"learning": arguments.learning}) if isinstance(stage, CodebookConfig) else stage
            for stage in RECIPES[name]
        ]
        start = time.perf_counter()
        hf_compress.compress(model, CompressionConfig(stages=stages), calibration=setting.source)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = size_on_disk(folder).weights
        found = setting.evaluate(model.eval())
        print(json.dumps({"recipe": name, "bytes": size, **found, "seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
