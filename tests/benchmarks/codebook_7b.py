"""A 7B model for a 2 GB device: the bytes that `plan` promises for LLaMA-2-7B's config, and those of a checkpoint of
random codes in that shape, written to disk, loaded and run.

    python tests/benchmarks/codebook_7b.py --folder FOLDER [--keep]

Prints one JSON line: bytes promised and written, the limit of 2 GiB, bits a weight, seconds to load, resident memory
with the loaded model, and generated tokens/s. The codes are random: it says nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_compress
from hf_compress import CodebookConfig, CompressionPlan, CompressionReport
from hf_compress.anatomy import resolve_anatomy
from hf_compress.engine.registry import create_method
from hf_compress.evaluation import size_on_disk
from hf_compress.layout import connect, layout_of
from hf_compress.methods.codebook.modules import coded_layer
from hf_compress.methods.codebook.parts import format_of
from hf_compress.quantizer import CompressedModelConfig, CompressionQuantizer

LIMIT = 2 * 1024**3
# LLaMA-2-7B.
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
RECIPE = CodebookConfig(bits={"mlp": 2, "query_key": 2, "value_output": 2, "embedding": 4, "head": 4}, learning="none")


def write_random(folder: Path, plan: CompressionPlan) -> None:
    """A checkpoint with every tensor that the recipe leads to, at random; one layer at a time."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    method: Any = create_method(RECIPE, resolve_anatomy(model))
    for part in [*method.outside, *(part for parts in method.parts for part in parts)]:
        dense = model.get_submodule(part.path)
        layer = coded_layer(dense, None, format_of(RECIPE, dense, part), device="cpu")
        layer.get_buffer("weight").random_(-(2**31), 2**31)
        layer.codebooks.copy_(torch.randn(layer.codebooks.shape).sort(dim=1).values)
        layer.scales.random_(64, 256)
        layer.row_scales.fill_(1e-4)
        layer.row_codebook.random_(0, layer.format.books)
        model.set_submodule(part.path, layer)
    connect(model)
    for name, parameter in list(model.named_parameters()):
        assert parameter.is_meta, name
        owner, _, own = name.rpartition(".")
        value = torch.nn.Parameter(torch.ones(parameter.shape, dtype=parameter.dtype))
        setattr(model.get_submodule(owner), own, value)
    sizes = (plan.block_linear_before, plan.block_linear_after, plan.parameters_before, plan.parameters_after)
    report = CompressionReport([], *sizes, plan.bytes_before, plan.bytes_on_disk).to_dict()
    stored = CompressedModelConfig(recipe=RECIPE.to_dict(), layout=layout_of(model), provenance={"report": report})
    model.hf_quantizer = CompressionQuantizer(stored, pre_quantized=True)
    model.config.quantization_config = stored
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint (2 GB) in the folder")
    arguments = parser.parse_args()
    CONFIG.save_pretrained(arguments.folder / "dense")
    plan = hf_compress.plan(arguments.folder / "dense", RECIPE)
    checkpoint = arguments.folder / "coded"
    write_random(checkpoint, plan)
    tensors = size_on_disk(checkpoint).weights
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    loaded = time.perf_counter() - began
    ids = torch.randint(CONFIG.vocab_size, (1, 4))
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None)
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
        seconds = (time.perf_counter() - began) / 9
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    line = {
        "bytes_planned": plan.bytes_on_disk,
        "bytes_on_disk": tensors,
        "limit": LIMIT,
        "within": tensors <= LIMIT,
        "bits_per_weight": round(8 * tensors / plan.parameters_before, 3),
        "load_seconds": round(loaded, 1),
        "resident_gb": round(resident / 1e9, 2),
        "generated_tokens_per_second": round(1 / seconds, 2),
    }
    print(json.dumps(line))
    if not arguments.keep:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
