"""What a resume point costs, with and without hidden states in it, and what it saves after a power cut half way.

    python tests/benchmarks/resume.py --model MODEL --calibration valid.txt --evaluation valid.txt --num-samples 8 \\
        --held-out 0 --sequence-length 512 --dtype float32

Decomposes the MLPs of a model in dense and in sequential order. Prints seconds of an undisturbed run, and of the
second run after one that ended before the block in the middle was kept; bytes of the working directory beside them.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from setting import Setting, parser_for

import hf_compress
from hf_compress import ModularDecompositionConfig
from hf_compress.engine.resume import ResumePoint


class PowerCut(Exception):
    pass


def timed(setting: Setting, order: str, directory: str, **options: Any) -> float:
    model = setting.load()
    config = ModularDecompositionConfig(reduction=0.2, kinds=["mlp"], allocation="uniform", order=order)
    start = time.perf_counter()
    hf_compress.compress(model, config, calibration=setting.source, working_directory=directory, **options)
    return time.perf_counter() - start


def cut(setting: Setting, order: str, directory: str, block: int, **options: Any) -> None:
    """A run that ends before a block is kept."""
    keep = ResumePoint.keep

    def failing(self: ResumePoint, at: int, *arguments: Any) -> None:
        if at == block:
            raise PowerCut
        keep(self, at, *arguments)

    ResumePoint.keep = failing  # type: ignore[method-assign]
    try:
        timed(setting, order, directory, **options)
    except PowerCut:
        return
    finally:
        ResumePoint.keep = keep  # type: ignore[method-assign]
    raise AssertionError("the run was not cut")


def main() -> None:
    arguments = parser_for(__doc__).parse_args()
    setting = Setting(arguments)
    middle = setting.load().config.num_hidden_layers // 2
    for order in ("dense", "sequential"):
        for keeps in (False, True):
            options = {"keep_activations": keeps}
            with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
                whole = timed(setting, order, first, **options)
                size = sum(file.stat().st_size for file in Path(first).rglob("*") if file.is_file())
                cut(setting, order, second, middle, **options)
                rest = timed(setting, order, second, **options)
            found = {"whole_seconds": round(whole, 1), "second_half_seconds": round(rest, 1), "bytes": size}
            print(json.dumps({"order": order, "keep_activations": keeps, **found}), flush=True)


if __name__ == "__main__":
    main()
