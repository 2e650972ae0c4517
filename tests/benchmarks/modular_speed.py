"""Speed and peak memory of modular decomposition beside the dense model, paired in one process.

    python tests/benchmarks/modular_speed.py --model MODEL --calibration valid.txt --reduction 0.1 0.3

For every reduction, dtype and length of the prompt: prompt tokens/s (logits of the last position) and tokens/s of 64
generated after it, as medians of paired runs, their ratio to dense, and what the compression added to the peak of
resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress
from hf_compress import CalibrationConfig, ModularDecompositionConfig
from hf_compress.evaluation import measure_speed


class PeakMemory:
    """The highest resident size of this process within the context, in bytes above that at its start."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def added(self) -> int:
        return self.peak - self.start


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="text file; its first tokens are used")
    parser.add_argument("--reduction", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--kinds", nargs="+", default=["auto"])
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--prompt-length", type=int, nargs="+", default=[512])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(arguments.calibration.read_text(), verbose=False, return_tensors="pt")["input_ids"][0]
    rows = ids[: (arguments.num_samples + 8) * 1024].view(-1, 1024)
    source = CalibrationConfig(rows, num_samples=arguments.num_samples, num_held_out=8)
    kinds: Any = "auto" if arguments.kinds == ["auto"] else arguments.kinds

    def load(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)

    for reduction in arguments.reduction:
        model = load(torch.bfloat16)
        with torch.no_grad():
            model(rows[:1])  # weights are mapped from the file and count as resident once they were read
        config = ModularDecompositionConfig(reduction=reduction, kinds=kinds, calibration=source)
        began = time.perf_counter()
        with PeakMemory() as memory:
            hf_compress.compress(model, config)
        seconds = time.perf_counter() - began
        for dtype, length in itertools.product((torch.bfloat16, torch.float32), arguments.prompt_length):
            models = {"dense": load(dtype), "compressed": model.to(dtype)}
            speed = measure_speed(models, prompt_length=length, repeats=arguments.repeats, new_tokens=64)
            print(
                json.dumps(
                    {
                        "reduction": reduction,
                        "dtype": str(dtype).removeprefix("torch."),
                        "prompt_length": length,
                        "prompt_ratio": round(speed["compressed"].prompt_ratio, 3),
                        "generated_ratio": round(speed["compressed"].generated_ratio, 3),
                        "prompt_tokens_per_second": round(speed["compressed"].prompt_tokens_per_second, 1),
                        "generated_tokens_per_second": round(speed["compressed"].generated_tokens_per_second, 1),
                        "peak_memory_added_gb": round(memory.added / 1e9, 3),
                        "compression_seconds": round(seconds, 1),
                        "kind_reductions": model.compression_report.notes["kind_reductions"],
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
