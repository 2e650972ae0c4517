"""SmolLM2-135M-Instruct, fetched as the demo fetches it: quality and speed within loose bounds.

The exact figures are benchmarks (tests/benchmarks); these gates are quick and leave room for noise.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress
from hf_compress import CalibrationConfig, CodebookConfig, ModularDecompositionConfig
from hf_compress.cli.demo_assets import demo_model_directory, stdlib_texts
from hf_compress.evaluation import measure_speed, perplexity, size_on_disk

CONTEXT = 512


@pytest.fixture(scope="module")
def directory() -> Path:
    return demo_model_directory(progress=False)


@pytest.fixture(scope="module")
def texts(directory: Path) -> tuple[CalibrationConfig, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    calibration, evaluation = stdlib_texts()
    source = CalibrationConfig(
        [tokenizer.decode(tokenizer("\n\n".join(calibration))["input_ids"][: 60 * CONTEXT])],
        num_samples=12,
        sequence_length=CONTEXT,
        num_held_out=4,
    )
    ids = torch.tensor(tokenizer("\n\n".join(evaluation), verbose=False)["input_ids"][: 8 * CONTEXT])
    return source, ids


def load(directory: Path, **options: Any) -> Any:
    """In float32: few CPUs compute in bfloat16, and the others take several times as long."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


SPEED = """
import sys, torch, hf_compress
from transformers import AutoModelForCausalLM
from hf_compress.evaluation import measure_speed
models = {path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in sys.argv[1:]}
speed = measure_speed(models, prompt_length=64, new_tokens=8, repeats=5)
print("generated ratio:", speed[sys.argv[2]].generated_ratio)
"""


def generated_ratio(dense: Path, compressed: Path) -> float:
    """In a process of its own: here the hook of conftest.py checks every annotation at every call of a layer, which
    takes as long as the layer."""
    command = [sys.executable, "-c", SPEED, str(dense), str(compressed)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.rpartition("generated ratio:")[2])


@pytest.fixture(scope="module")
def dense_perplexity(directory: Path, texts: Any) -> float:
    return perplexity(load(directory), texts[1], context=CONTEXT).perplexity


def test_a_fifth_less_costs_a_bounded_perplexity(
    directory: Path, texts: Any, dense_perplexity: float, tmp_path: Path
) -> None:
    config = ModularDecompositionConfig(reduction=0.2, calibration=texts[0])
    model = load(directory, compression_config=config)
    assert model.compression_report.block_linear_reduction == pytest.approx(0.2, abs=0.005)
    found = perplexity(model, texts[1], context=CONTEXT).perplexity
    assert found < 1.75 * dense_perplexity

    model.to(torch.bfloat16).save_pretrained(tmp_path)
    saved, before = size_on_disk(tmp_path).weights, size_on_disk(directory).weights
    expected = sum(p.numel() * p.element_size() for p in model.parameters())
    assert expected <= saved < expected + 200_000
    assert saved < 0.86 * before
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    # The logits would differ: a cast of the whole model also rounds its rotary frequencies.
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_channel_score_beats_the_papers(directory: Path, texts: Any, dense_perplexity: float) -> None:
    """On text that was not calibrated on; measured 33.4 against 37.0, dense 22.2."""
    source = texts[0].model_copy(update={"num_samples": 24})

    def run(**fields: Any) -> float:
        config = ModularDecompositionConfig(reduction=0.3, kinds=["mlp"], calibration=source, **fields)
        return perplexity(load(directory, compression_config=config), texts[1], context=CONTEXT).perplexity

    assert dense_perplexity < run() < 0.97 * run(channel_score="ridge_leverage")


def test_three_bits_cost_a_bounded_perplexity(
    directory: Path, texts: Any, dense_perplexity: float, tmp_path: Path
) -> None:
    """The whole model with 48×1024 tokens is in the README; here for the time it takes a third of it with 8×512."""
    source = texts[0].model_copy(update={"num_samples": 8, "num_held_out": 0})
    dense = [f"layers.{layer}" for layer in range(10, 30)]
    config = CodebookConfig(bits=3, calibration=source, modules_to_not_convert=dense)
    model = load(directory, compression_config=config)
    assert model.compression_report.bits_per_weight < 3.35
    found = perplexity(model, texts[1], context=CONTEXT).perplexity
    assert found < 1.25 * dense_perplexity
    model.save_pretrained(tmp_path)
    layers = [row for row in model.compression_report.modules if row.bytes_after]
    dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size_on_disk(tmp_path).weights < dense_bytes + sum(row.bytes_after for row in layers) + 200_000
    del model
    assert generated_ratio(directory, tmp_path) > 0.9  # 1.2 where nothing else runs


def test_a_start_without_data_is_quick(directory: Path, dense_perplexity: float, texts: Any) -> None:
    began = time.monotonic()
    model = load(directory, compression_config=CodebookConfig(bits=4, learning="none"))
    assert time.monotonic() - began < 180  # 45 where nothing else runs
    assert perplexity(model, texts[1], context=CONTEXT).perplexity < 1.5 * dense_perplexity


def test_compressed_attention_is_not_slower(directory: Path) -> None:
    """Unaligned or unequal head sizes once ran the prompt at a fifth of the dense speed."""
    tokens = torch.randint(100, 40_000, (8, 256), generator=torch.Generator().manual_seed(0))
    config = ModularDecompositionConfig(
        reduction=0.3,
        kinds=["mlp", "query_key", "value_output"],
        calibration=CalibrationConfig(tokens, num_samples=8, num_held_out=0),
    )
    model = hf_compress.compress(load(directory), config)
    models = {"dense": load(directory), "compressed": model}
    prompt, generated = 0.0, 0.0
    for _ in range(3):  # a shared machine is noisy: the best of three, and a bound that only a real fault misses
        speed = measure_speed(models, prompt_length=512, new_tokens=8, repeats=3, warmup=1)["compressed"]
        prompt, generated = max(prompt, speed.prompt_ratio), max(generated, speed.generated_ratio)
        if prompt > 0.8 and generated > 0.8:
            break
    assert prompt > 0.6
    assert generated > 0.6
