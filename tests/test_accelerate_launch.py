"""`accelerate launch` with two CPU processes and from_pretrained(compression_config=...): they compress together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_helpers import TEXTS, make_tokenizer
from safetensors.torch import load_file
from support.processes import accelerate_launch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SCRIPT = """
import json
import pathlib
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import hf_compress
from hf_compress import CalibrationConfig, ModularDecompositionConfig
from hf_compress.engine import compress as engine

walks = []
walk = engine.walk
engine.walk = lambda *arguments: walks.append(1) or walk(*arguments)

if sys.argv[1] == "accelerator first":
    accelerator = Accelerator()
texts = CalibrationConfig("texts.txt", num_samples=16, num_held_out=0, sequence_length=64)
recipes = {
    "portable": ModularDecompositionConfig(reduction=0.25, portable=True, calibration=texts),
    "attention": ModularDecompositionConfig(
        reduction=0.25, kinds=["mlp", "query_key", "value_output"], calibration=texts
    ),
}
models = {
    name: AutoModelForCausalLM.from_pretrained("dense", compression_config=recipe)
    for name, recipe in recipes.items()
}
if sys.argv[1] == "model first":
    accelerator = Accelerator()
rank = accelerator.process_index
for name, model in models.items():
    save_file(model.state_dict(), f"{name}-{rank}.safetensors")
    pathlib.Path(f"{name}-{rank}.json").write_text(model.config.to_json_string())
    # Every process calls it, as in most scripts; Transformers lets the first alone write. The second comes last here.
    for turn in range(2):
        if rank == turn:
            model.save_pretrained(name)
        accelerator.wait_for_everyone()

# What was received is trained like any other: one step of data parallel training.
model = accelerator.prepare(models["attention"].train())
ids = torch.arange(3, 35).reshape(2, 16) + rank
accelerator.backward(model(input_ids=ids, labels=ids).loss)
gradients = [parameter.grad for parameter in model.parameters()]
assert all(gradient is not None for gradient in gradients)
total = repr(sum(map(torch.sum, gradients)))
result = {"processes": accelerator.num_processes, "walks": len(walks), "gradient": total}
pathlib.Path(f"{sys.argv[1]}-{rank}.json").write_text(json.dumps(result))
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    (folder / "texts.txt").write_text("\n\n".join(TEXTS) * 40)
    (folder / "script.py").write_text(SCRIPT)
    return folder


def launch(folder: Path, order: str) -> list[dict[str, Any]]:
    """What both processes found."""
    done = accelerate_launch("script.py", order, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{order}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def results(workplace: Path) -> list[dict[str, Any]]:
    return launch(workplace, "accelerator first")


def test_both_processes_compress(results: list[dict[str, Any]]) -> None:
    assert [result["processes"] for result in results] == [2, 2]
    assert [result["walks"] for result in results] == [2, 2]


def test_both_processes_train_what_they_hold(results: list[dict[str, Any]]) -> None:
    first, second = (result["gradient"] for result in results)
    assert first == second != "tensor(0.)"


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("name", ["portable", "attention"])
def test_both_processes_hold_the_same_model(name: str, workplace: Path) -> None:
    for suffix in ("safetensors", "json"):
        first, second = ((workplace / f"{name}-{rank}.{suffix}").read_bytes() for rank in (0, 1))
        assert first == second
    config = json.loads((workplace / f"{name}-1.json").read_text())
    assert ("quantization_config" in config) == (name == "attention")
    assert (config["intermediate_size"] < 96) == (name == "portable")


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("name", ["portable", "attention"])
def test_the_save_of_one_process_survives_that_of_the_other(name: str, workplace: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(workplace / name)
    state = load_file(workplace / f"{name}-0.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_the_accelerator_may_come_after_the_model(workplace: Path) -> None:
    results = launch(workplace, "model first")
    assert [result["processes"] for result in results] == [2, 2]
    assert [result["walks"] for result in results] == [2, 2]
