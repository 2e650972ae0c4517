"""Layouts that are missing, hostile or too new are refused before memory is taken."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compressed, make_model
from transformers import AutoModelForCausalLM

from hf_compress import CheckpointError
from hf_compress.layout import layout_of, replay
from hf_compress.quantizer import CompressedModelConfig


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    compressed("llama").save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, change: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def spec_of(stored: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(entry["spec"] for entry in stored["layout"] if entry["type"] == kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("layout"), "no `layout`"),
        (lambda q: q.update(layout=[]), "no `layout`"),
        (lambda q: q.update(layout=["mlp"]), "must have exactly"),
        (lambda q: q["layout"][0].update(type="os.system"), "module type 'os.system'"),
        (lambda q: q["layout"][0].update(path="model.layers.99.mlp"), "does not have"),
        (lambda q: q["layout"][0].update(path=""), "module path"),
        (lambda q: spec_of(q, "linear").update(out_features=10**12), "out_features"),
        (lambda q: spec_of(q, "linear").update(out_features=0), "out_features"),
        (lambda q: spec_of(q, "linear").update(in_features="7"), "in_features"),
        (lambda q: spec_of(q, "linear").pop("in_features"), "missing field"),
        (lambda q: spec_of(q, "attention").update(query_key_dim=10**9), "query_key_dim"),
        (lambda q: spec_of(q, "attention").update(query_key_dim=3), "even"),
        (lambda q: spec_of(q, "attention").update(output_bias="yes"), "output_bias"),
        (lambda q: q.update(format_version=99), "Update hf_compress"),
        (lambda q: q.update(format_version="1"), "format_version"),
        (lambda q: q.update(surprise=1), "surprise"),
    ],
)
def test_hostile_layouts_are_refused(saved: Path, change: Any, message: str) -> None:
    edit(saved, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_layout_on_the_wrong_module_is_refused(saved: Path) -> None:
    def swap(stored: dict[str, Any]) -> None:
        linear = next(entry for entry in stored["layout"] if entry["type"] == "linear")
        linear["path"] = "model.norm"

    edit(saved, swap)
    with pytest.raises(CheckpointError, match="LlamaRMSNorm"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_tensors_of_other_shapes_are_refused(saved: Path) -> None:
    edit(saved, lambda stored: spec_of(stored, "linear").update(out_features=8))
    with pytest.raises(Exception, match="(?i)size|mismatch"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_unknown_provenance_is_kept(saved: Path) -> None:
    edit(saved, lambda stored: stored["provenance"].update(new_measurement=3))
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.config.quantization_config.provenance["new_measurement"] == 3


def test_the_layout_comes_from_the_live_model(saved: Path, tmp_path: Path) -> None:
    """A change of the model after loading is in the next file, without anybody keeping a list."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    entry = next(entry for entry in layout_of(model) if entry["type"] == "linear" and "down" in entry["path"])
    narrow = model.get_submodule(entry["path"])
    block = entry["path"].rpartition(".")[0]
    for role in ("up_proj", "gate_proj"):
        child = model.get_submodule(f"{block}.{role}")
        model.set_submodule(f"{block}.{role}", type(narrow).from_tensors(child.weight.data[:-4], None))
    model.set_submodule(entry["path"], type(narrow).from_tensors(narrow.weight.data[:, :-4], None))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.get_submodule(entry["path"]).in_features == narrow.in_features - 4


def test_config_round_trip() -> None:
    stored = compressed("llama").config.quantization_config
    again = CompressedModelConfig.from_dict(json.loads(stored.to_json_string()))
    assert again.to_dict() == json.loads(json.dumps(stored.to_dict()))
    assert copy.deepcopy(stored).to_dict() == stored.to_dict()


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "dense")
    from conftest import recipe

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", compression_config=recipe())
    model.save_pretrained(tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_replay_refuses_what_is_no_list() -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(make_model("llama").config)
    with pytest.raises(CheckpointError, match="layout"):
        replay(skeleton, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("kinds", [("mlp",), ("query_key",), ("value_output",)])
def test_without_the_package_loading_stops(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """Plain Transformers must raise, never fill the model with random weights."""
    compressed("llama", kinds=kinds, reduction=0.1, allocation="uniform").save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['hf_compress'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "mismatch" in result.stderr
