"""Experts in parameters of three dimensions, in files and out of them: as plain Transformers keeps the dense ones."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IDS, calibration, logits, make_model, recipe
from moe import MLPS, RECIPES, every_family, every_recipe
from safetensors.torch import load_file, save_file
from test_streaming import assert_same, in_memory
from torch import nn
from transformers import AutoModelForCausalLM

import hf_compress
from hf_compress import (
    CheckpointError,
    CodebookConfig,
    ConfigurationError,
    NumericalError,
    UnsupportedModelError,
)
from hf_compress.engine.resume import ResumePoint
from hf_compress.layout import layout_of


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_pickles(kind: str) -> None:
    model = hf_compress.compress(make_model("mixtral"), RECIPES[kind]())
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@every_recipe
@every_family
def test_save_and_reload(name: str, kind: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model(name, torch.bfloat16), RECIPES[kind]())
    model.save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / "model.safetensors"))
    assert any(".experts.3." in key and key.endswith((".w2.weight", ".down_proj.weight")) for key in keys)
    assert not any(key.endswith("experts.down_proj") for key in keys), "files have one tensor an expert, as before"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert str(again.compression_report) == str(model.compression_report)
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(logits(again.to(dtype)), logits(model.to(dtype)))


@every_recipe
def test_plans_are_exact(kind: str) -> None:
    planned = hf_compress.plan(make_model("qwen3_moe"), RECIPES[kind](), measure_time=False)
    model = hf_compress.compress(make_model("qwen3_moe"), RECIPES[kind]())
    assert planned.bytes_on_disk == model.compression_report.bytes_after
    assert any(row.path.endswith("mlp.experts") for row in planned.rows)


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_transformers_without_the_package_stops(kind: str, tmp_path: Path) -> None:
    hf_compress.compress(make_model("mixtral"), RECIPES[kind]()).save_pretrained(tmp_path)
    script = """
import sys
sys.modules["hf_compress"] = None
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=None)
except Exception as error:
    print("stopped:", type(error).__name__, str(error)[:200])
import json
from pathlib import Path
config = Path(sys.argv[1], "config.json")
fields = json.loads(config.read_text())
del fields["quantization_config"]  # as if it were a dense model
config.write_text(json.dumps(fields))
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("mismatch:", "size" in str(error) or "mismatch" in str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    assert "stopped:" in done.stdout and "mismatch: True" in done.stdout, done.stdout + done.stderr


@every_family
def test_portable_experts_are_a_plain_model(name: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model(name), recipe(portable=True))
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch; sys.modules['hf_compress'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.load(sys.argv[2])\n"
        "torch.save(model(ids).logits.detach(), sys.argv[3])\n"
        "print(type(model.model.layers[0].mlp.experts).__name__)"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, tmp_path / "ids.pt", tmp_path / "logits.pt"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == {"mixtral": "MixtralExperts", "qwen3_moe": "Qwen3MoeExperts"}[name]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_of_transformers_runs(implementation: str, dtype: torch.dtype) -> None:
    model = hf_compress.compress(make_model("qwen3_moe", dtype), recipe(**MLPS))
    reference = logits(model.float()).clone()
    model.to(dtype).set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model).float(), reference, rtol=0.1, atol=0.1 * float(reference.abs().max()))


@pytest.mark.parametrize("kind", ["modular", "codebook", "stack"])
@every_family
def test_from_files_to_files(name: str, kind: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    hf_compress.compress_checkpoint(tmp_path / "dense", tmp_path / "streamed", RECIPES[kind](), device="cpu")
    assert_same(in_memory(tmp_path / "dense", RECIPES[kind](), tmp_path / "whole"), tmp_path / "streamed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")


@pytest.mark.parametrize("kind", ["modular", "codebook", "stack"])
def test_offloaded_to_disk_after_loading(kind: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model("mixtral"), RECIPES[kind]())
    model.save_pretrained(tmp_path / "out")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map={**places, "model.layers": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_an_interrupted_run_goes_on(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    whole = hf_compress.compress(make_model("mixtral"), RECIPES[kind]()).state_dict()
    keep = ResumePoint.keep

    def stop(self: Any, place: int, *arguments: Any) -> None:
        keep(self, place, *arguments)
        if place == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResumePoint, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_compress.compress(make_model("mixtral"), RECIPES[kind](), working_directory=tmp_path)
    again = hf_compress.compress(make_model("mixtral"), RECIPES[kind](), working_directory=tmp_path).state_dict()
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


class TestBadInput:
    def test_experts_of_another_form(self) -> None:
        model = make_model("mixtral")
        model.model.layers[2].mlp.experts.is_transposed = True
        with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.experts.*|is_transposed.*False"):
            hf_compress.compress(model, RECIPES["modular"]())
        model = make_model("mixtral")
        model.model.layers[0].mlp.experts = nn.Linear(3, 3)
        with pytest.raises(UnsupportedModelError, match="three dimensions"):
            hf_compress.compress(model, RECIPES["modular"]())

    def test_three_codes(self) -> None:
        with pytest.raises(ConfigurationError, match=r"experts.*2, 3 or 4 bits, not 1\.58"):
            hf_compress.compress(make_model("mixtral"), CodebookConfig(bits={"mlp": 1.58}, learning="none"))

    def test_average_bits(self) -> None:
        config = CodebookConfig(bits="auto", average_bits=3, calibration=calibration())
        with pytest.raises(ConfigurationError, match=r"experts.*average_bits"):
            hf_compress.compress(make_model("mixtral"), config)

    def test_weights_that_are_not_finite(self) -> None:
        model = make_model("mixtral")
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
        with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.experts"):
            hf_compress.compress(model, RECIPES["codebook, no data"]())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 0}, "width"),
            ({"width": 10**9}, "width"),
            ({"width": 16, "other": 1}, "width"),
            ({}, "width"),
        ],
    )
    def test_a_damaged_width(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        self.damage(tmp_path, "modular", change)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"up": 3}, "up"),
            ({"up": {}}, "bits"),
            ({"width": 10**9}, "width"),
            ({"extra": 3}, "extra"),
        ],
    )
    def test_damaged_codes(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        self.damage(tmp_path, "codebook", change, keep=True)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @staticmethod
    def damage(folder: Path, kind: str, change: dict[str, Any], keep: bool = False) -> None:
        model = hf_compress.compress(make_model("mixtral"), RECIPES[kind]())
        model.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        entry = next(e for e in fields["quantization_config"]["layout"] if e["path"].endswith("experts"))
        entry["spec"] = {**entry["spec"], **change} if keep else change
        (folder / "config.json").write_text(json.dumps(fields))

    def test_a_book_that_is_not_there(self, tmp_path: Path) -> None:
        hf_compress.compress(make_model("mixtral"), RECIPES["codebook"]()).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        key = next(key for key in tensors if key.endswith("down_proj_row_codebook"))
        tensors[key][1, 0] = 99
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="row_codebook"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layouts_have_one_line_for_all_experts_of_a_block() -> None:
    model = hf_compress.compress(make_model("mixtral"), RECIPES["stack"]())
    lines = [entry for entry in layout_of(model) if "experts" in entry["path"]]
    assert [entry["path"] for entry in lines] == [f"model.layers.{block}.mlp.experts" for block in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.compression_report.bits_per_weight is not None
