# %% [markdown]
"""The methods side by side on one model: a table, and an HTML page with figures.

    python examples/compare_methods.py --calibration calibration.txt --evaluation held_out.txt --out comparison

Run it as a script, or cell by cell (`# %%`) in an editor or, through jupytext, as a notebook; there the defaults hold.
It writes a checkpoint for each method, `table.json` and `report.html` into `--out`. Expect modular decomposition to be
the fastest model, codes the smallest, and shared layers to need healing; codes take the most time to make.
"""

# %% What to compress, and on which texts. They should be two texts: calibrated on one, measured on the other.
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import rich
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_compress import (
    CalibrationConfig,
    CodebookConfig,
    CompressionConfig,
    LayerSharingConfig,
    ModularDecompositionConfig,
    PruningConfig,
)
from hf_compress.evaluation import compare, write_report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--calibration", default="calibration.txt", help="text file, or a dataset of the Hub")
parser.add_argument("--evaluation", type=Path, default=Path("held_out.txt"), help="text file")
parser.add_argument("--out", type=Path, default=Path("comparison"))
parser.add_argument("--num-samples", type=int, default=32)
parser.add_argument("--sequence-length", type=int, default=512)
parser.add_argument("--max-tokens", type=int, default=8192, help="tokens to measure on")
parser.add_argument("--methods", nargs="+", help="some of the methods below; all if not given")
parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True, help="also measure the speed")
arguments = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% The recipes: a list of stages each, carried out in order.
depth = AutoConfig.from_pretrained(arguments.model).num_hidden_layers
calibration = CalibrationConfig(
    arguments.calibration, num_samples=arguments.num_samples, sequence_length=arguments.sequence_length
)
recipes = {
    "modular 20 %": [ModularDecompositionConfig(reduction=0.2)],
    "codebooks 4 bits": [CodebookConfig(bits=4)],
    "codebooks 3 bits": [CodebookConfig(bits=3)],
    "Wanda 50 %": [PruningConfig(sparsity=0.5, criterion="wanda")],
    # A converted model has to be healed (recover, DistillationTrainer): this row shows where that starts.
    "shared, rank 64": [LayerSharingConfig(unique_layers=depth // 2, initialization="average", lora_rank=64)],
    "modular 10 % and 3 bits": [ModularDecompositionConfig(reduction=0.1), CodebookConfig(bits=3)],
}
if arguments.methods:
    unknown = set(arguments.methods) - set(recipes)
    if unknown:
        parser.error(f"unknown methods {sorted(unknown)}; there are {list(recipes)}")
    recipes = {name: recipes[name] for name in arguments.methods}

# %% Compress with each, and save.
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
folders = {}
for name, stages in recipes.items():
    config = CompressionConfig(stages=stages, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, compression_config=config)
    folders[name] = arguments.out / "".join(letter if letter.isalnum() else "-" for letter in name)
    model.save_pretrained(folders[name])
    tokenizer.save_pretrained(folders[name])
    print(f"{name}: {model.compression_report.bytes_after:,} bytes in memory")

# %% Measure all of them as others will load them, beside the original.
models = {"original": AutoModelForCausalLM.from_pretrained(arguments.model)}
models |= {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()}
paths = dict(folders)
if Path(arguments.model).is_dir():
    paths["original"] = Path(arguments.model)
token_ids = tokenizer(arguments.evaluation.read_text(), verbose=False)["input_ids"][: arguments.max_tokens]
comparison = compare(
    models,
    token_ids,
    context=arguments.sequence_length,
    paths=paths,
    agreement=True,
    speed=arguments.speed,
    prompt_length=256,
    new_tokens=32,
    repeats=3,
)
rich.print(comparison.table())

# %% The same as data, and as a page: size against quality with the Pareto front, and every block of every model.
(arguments.out / "table.json").write_text(json.dumps(comparison.to_dict(), indent=2) + "\n")
write_report(comparison, arguments.out / "report.html", title=f"{Path(arguments.model).name}, side by side")
print(f"The page is {arguments.out / 'report.html'}")
