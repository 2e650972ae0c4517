"""A recipe in a checkpoint makes the same checkpoint again; recipes in files are carried out; a second one is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_KINDS, calibration, make_model, token_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_compress
from hf_compress import (
    CodebookConfig,
    CompressionConfig,
    ConfigurationError,
    LayerSharingConfig,
    ModularDecompositionConfig,
    PruningConfig,
)
from hf_compress.cli.recipe_file import load_recipe
from hf_compress.layout import layout_of

RECIPE_FILES = sorted((Path(__file__).parent.parent / "examples" / "recipes").glob("*.yaml"))


def modular(**fields: Any) -> ModularDecompositionConfig:
    return ModularDecompositionConfig(**{"reduction": 0.25, "kinds": ALL_KINDS, **fields})


def codebook(**fields: Any) -> CodebookConfig:
    return CodebookConfig(**{"bits": 3, "rows_per_codebook": 8, **fields})


STAGES: dict[str, Callable[[], list[Any]]] = {
    "modular": lambda: [modular()],
    "modular, a temperature from data": lambda: [modular(kinds="auto", temperature="auto")],
    "codebook": lambda: [codebook()],
    "codebook, tuned and mixed": lambda: [codebook(bits="auto", average_bits=2.5, block_epochs=1)],
    "pruning": lambda: [PruningConfig(sparsity=0.8, scope="layer")],
    "wanda, int8": lambda: [PruningConfig(sparsity=0.5, criterion="wanda", values="int8")],
    "sharing": lambda: [LayerSharingConfig(unique_layers=2, lora_rank=2, inference_iterations=2)],
    "modular and codebook": lambda: [modular(), codebook()],
    "modular and bitsandbytes": lambda: [modular(), BitsAndBytesConfig(load_in_4bit=True)],
    "sharing and codebook": lambda: [LayerSharingConfig(unique_layers=1), codebook()],
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def recipe_of(folder: Path) -> dict[str, Any]:
    recipe: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]["recipe"]
    return recipe


@pytest.mark.parametrize("stages", sorted(STAGES))
def test_the_recipe_of_a_checkpoint_reproduces_it_byte_for_byte(stages: str, dense: Path, tmp_path: Path) -> None:
    config = CompressionConfig(stages=STAGES[stages](), calibration=calibration())
    AutoModelForCausalLM.from_pretrained(dense, compression_config=config).save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(dense)
    hf_compress.compress(again, recipe_of(tmp_path / "first"), calibration=calibration())
    again.save_pretrained(tmp_path / "second")
    first, second = files_of(tmp_path / "first"), files_of(tmp_path / "second")
    assert {"config.json", "model.safetensors"} <= first.keys()
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    # What was asked for is all in the recipe, and other data would have given another checkpoint.
    assert CompressionConfig.wrap(recipe_of(tmp_path / "first")).to_dict() == config.to_dict()


@pytest.mark.parametrize("stages", ["modular and codebook", "sharing and codebook"])
def test_another_process_makes_the_same_bytes(stages: str, dense: Path, tmp_path: Path) -> None:
    config = CompressionConfig(stages=STAGES[stages](), calibration=calibration())
    AutoModelForCausalLM.from_pretrained(dense, compression_config=config).save_pretrained(tmp_path / "first")
    torch.save(token_ids(), tmp_path / "ids.pt")
    code = (
        "import json, torch, hf_compress\n"
        "from transformers import AutoModelForCausalLM\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"recipe = json.load(open({str(tmp_path / 'first' / 'config.json')!r}))['quantization_config']['recipe']\n"
        f"data = hf_compress.CalibrationConfig(torch.load({str(tmp_path / 'ids.pt')!r}), num_samples=20, "
        "num_held_out=4, batch_size=8)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(dense)!r})\n"
        f"hf_compress.compress(model, recipe, calibration=data).save_pretrained({str(tmp_path / 'second')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = files_of(tmp_path / "first"), files_of(tmp_path / "second")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_other_data_make_other_bytes(dense: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 1), ("second", 2)):
        model = AutoModelForCausalLM.from_pretrained(dense)
        data = hf_compress.CalibrationConfig(token_ids(seed=seed), num_samples=20, num_held_out=4, batch_size=8)
        hf_compress.compress(model, codebook(), calibration=data).save_pretrained(tmp_path / name)
    first, second = files_of(tmp_path / "first"), files_of(tmp_path / "second")
    assert first["model.safetensors"] != second["model.safetensors"]
    assert first["config.json"] != second["config.json"]
    assert recipe_of(tmp_path / "first") == recipe_of(tmp_path / "second")


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_recipes_of_the_examples(path: Path, dense: Path) -> None:
    recipe, data = load_recipe(path)
    assert data is not None and data.num_samples > 0
    assert CompressionConfig.wrap(json.loads(json.dumps(recipe.to_dict()))).to_dict() == recipe.to_dict()
    expected = hf_compress.plan(dense, recipe, calibration=data, measure_time=False)
    assert expected.bytes_on_disk < expected.bytes_before
    model = hf_compress.compress(make_model("llama"), recipe, calibration=calibration())
    assert layout_of(model)
    assert model.compression_report.bytes_after <= expected.bytes_at_most


def test_there_are_recipes_in_the_examples() -> None:
    assert len(RECIPE_FILES) >= 5


@pytest.fixture
def compressed_folders(tmp_path: Path) -> dict[str, Path]:
    """Checkpoints: one that a second method goes on with, and one that none does."""
    stages = {"open": modular(calibration=calibration()), "closed": codebook(learning="none")}
    for name, config in stages.items():
        hf_compress.compress(make_model("llama"), config).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in stages}


@pytest.mark.parametrize(
    "second",
    [
        BitsAndBytesConfig(load_in_4bit=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
    ids=["config", "dictionary"],
)
def test_another_librarys_quantization_of_a_compressed_checkpoint(
    second: Any, compressed_folders: dict[str, Path]
) -> None:
    for folder in compressed_folders.values():
        with pytest.raises(ConfigurationError, match=r"compressed already.*pass compression_config="):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=second)


def test_bitsandbytes_as_compression_config(compressed_folders: dict[str, Path], dense: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(compressed_folders["open"], compression_config=config)
    assert {entry["type"] for entry in layout_of(model)} == {"attention", "bnb_linear4bit"}
    stages = model.config.quantization_config.recipe["stages"]
    assert [stage["method"] for stage in stages] == ["modular_decomposition", "bitsandbytes"]
    plain = AutoModelForCausalLM.from_pretrained(dense, compression_config=config)
    assert {entry["type"] for entry in layout_of(plain)} == {"bnb_linear4bit"}


@pytest.mark.parametrize("keyword", ["quantization_config", "compression_config"])
def test_a_second_recipe_of_ours(keyword: str, compressed_folders: dict[str, Path]) -> None:
    second = codebook(bits=2, learning="none")
    with pytest.raises(ConfigurationError, match=r"compressed already.*compression_config=CompressionConfig\(stages"):
        AutoModelForCausalLM.from_pretrained(compressed_folders["closed"], **{keyword: second})
    model = AutoModelForCausalLM.from_pretrained(compressed_folders["open"], **{keyword: second})
    assert "codebook_linear" in {entry["type"] for entry in layout_of(model)}


def test_the_description_of_a_checkpoint_is_no_recipe(compressed_folders: dict[str, Path], dense: Path) -> None:
    stored = AutoModelForCausalLM.from_pretrained(compressed_folders["open"]).config.quantization_config
    for folder in (compressed_folders["open"], compressed_folders["closed"], dense):
        with pytest.raises(ConfigurationError, match="finished checkpoint.*compression_config="):
            AutoModelForCausalLM.from_pretrained(folder, quantization_config=stored)


def test_errors_of_transformers_stay_what_they_are(dense: Path) -> None:
    with pytest.raises(ValueError, match="Unknown quantization type") as caught:
        AutoModelForCausalLM.from_pretrained(dense, quantization_config={"quant_method": "unheard of"})
    assert not isinstance(caught.value, ConfigurationError)
