"""Learned codebooks beside the quantizers that a user could install instead, on the same matrices, in one run.

    python tests/benchmarks/codebook_peers.py --task smollm minilm vit speed \
        --method dense ours rtn bnb hqq quanto torchao gptq --bits 4 3 2 \
        --model SMOLLM2 --calibration valid.txt --evaluation test.txt \
        --minilm-model MINILM --stsb STSB --vit-model DINOV2 --cifar10 CIFAR10

The peers come from PyPI (`pip install bitsandbytes hqq optimum-quanto torchao gptqmodel pillow`); one that is not
installed or fails is skipped with a line that says why. Only the linears of the blocks are quantized; embedding and
head stay as they are. Prints one JSON line a run and tables in Markdown at the end: the scores of the task, bits a
quantized weight with everything counted, wall seconds of the quantization.

- smollm: perplexity of a causal language model on the first 6×2048 tokens of the texts, context 2048.
- minilm: Spearman's correlation on the test pairs of STS-B (`stsb-en-{train,test}.csv` in the folder).
- vit: last hidden states beside the dense model's (relative error, mean cosine) and the accuracy of a ridge probe on
  CIFAR-10 (`{train,test}.parquet` in the folder).
- speed: prompt and decoding rates of the language model, dense, with our codes at 3 bits and with NF4, in float32 and
  in bfloat16, paired in one process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers_methods import METHODS, Inputs, Method, block_matrices, nf4, ours, weight_count
from peers_tasks import TASKS, Task
from transformers import AutoModelForCausalLM

from hf_compress.evaluation import measure_speed

Row = dict[str, Any]


def main() -> None:
    arguments = parse()
    tables: dict[str, list[Row]] = {}
    for name in arguments.task:
        rows = speed(arguments) if name == "speed" else compare(TASKS[name](arguments), arguments)
        tables[name] = []
        for row in rows:
            print(json.dumps({"task": name, **row}), flush=True)
            tables[name].append(row)
    for name, table in tables.items():
        print(f"\n{name}\n\n{markdown(table)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = [*TASKS, "speed"]
    parser.add_argument("--task", nargs="+", default=tasks, choices=tasks)
    methods = ["dense", *METHODS]
    parser.add_argument("--method", nargs="+", default=methods, choices=methods)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    language = parser.add_argument_group("smollm, speed")
    language.add_argument("--model", help="folder or name of a causal language model")
    language.add_argument("--calibration", type=Path, help="text file; its first tokens are used")
    language.add_argument("--evaluation", type=Path, nargs="+", help="text files, never calibrated on")
    language.add_argument("--num-samples", type=int, default=48)
    language.add_argument("--sequence-length", type=int, default=1024)
    language.add_argument("--dtype", default="float32")
    language.add_argument("--prompt-length", type=int, default=512)
    language.add_argument("--new-tokens", type=int, default=64)
    language.add_argument("--repeats", type=int, default=5)
    sentences = parser.add_argument_group("minilm")
    sentences.add_argument("--minilm-model", help="folder or name of a sentence encoder")
    sentences.add_argument("--stsb", type=Path, help="folder")
    sentences.add_argument("--num-sentences", type=int, default=4096, help="to calibrate on")
    images = parser.add_argument_group("vit")
    images.add_argument("--vit-model", help="folder or name of a vision transformer")
    images.add_argument("--cifar10", type=Path, help="folder")
    images.add_argument("--num-images", type=int, default=256, help="to calibrate on")
    images.add_argument("--train-images", type=int, default=600, help="of the probe")
    images.add_argument("--test-images", type=int, default=2000)
    images.add_argument("--image-size", type=int, default=112)
    images.add_argument("--probe-layer", type=int, default=10)
    arguments = parser.parse_args()
    arguments.held_out = 0
    for task in arguments.task:
        for required in ("model",) if task == "speed" else TASKS[task].requires:
            if getattr(arguments, required) is None:
                parser.error(f"the task {task} needs --{required.replace('_', '-')}")
    return arguments


def compare(task: Task, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every method with every number of bits that it knows."""
    for word in arguments.method:
        if word == "dense":
            yield {"method": "dense", **task.evaluate(task.load())}
        for method in METHODS.get(word, ()):
            for bits in (bits for bits in arguments.bits if bits in method.bits):
                yield {"method": method.name, "bits": bits, **attempt(task, method, bits)}


def attempt(task: Task, method: Method, bits: int) -> Row:
    """Scores, bits and seconds; a method of somebody else's that does not run must not end the comparison."""
    model = task.load()
    paths = block_matrices(model)
    weights = weight_count(model, paths)
    try:
        began = time.perf_counter()
        stored = method.quantize(model, paths, bits, task.inputs)
        seconds = time.perf_counter() - began
        scores = task.evaluate(model)
    except Exception as error:
        if method.quantize is ours:
            raise
        return {"skipped": f"{type(error).__name__}: {error}"}
    return {**scores, "bits_per_weight": round(stored / weights, 3), "seconds": round(seconds, 1)}


def speed(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rates beside the dense model in float32. The codes need no calibration: their values do not change the work."""
    models = {}
    for dtype in ("float32", "bfloat16"):
        for name, quantize, bits in (("dense", None, 0), ("hf_compress, 3 bits", ours, 3), ("NF4", nf4, 4)):
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, dtype))
            try:
                if quantize is not None:
                    quantize(model, block_matrices(model), bits, Inputs(None))
            except Exception as error:
                if quantize is ours:
                    raise
                yield {"method": f"{name}, {dtype}", "skipped": f"{type(error).__name__}: {error}"}
                continue
            models[f"{name}, {dtype}"] = model
    results = measure_speed(
        models,
        prompt_length=arguments.prompt_length,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
    )
    for name, result in results.items():
        rates = {key: round(value, 2) for key, value in result.to_dict().items()}
        yield {"method": name, "threads": torch.get_num_threads(), **rates}


def markdown(rows: list[Row]) -> str:
    """A table of all keys that occur; what a row lacks is a dash."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(key, "–")) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
