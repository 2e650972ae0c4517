"""What is saved loads again: shards, devices, dtypes, names, portable models, interrupted saves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compressed, interrupt, make_model, recipe, token_ids
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

import hf_compress
from hf_compress.layout import layout_of

IDS = token_ids(2, 16, seed=7)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_reload_with_a_device_map_and_shards(tmp_path: Path, device_map: Any) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(again), logits(model))


def test_reload_offloaded_to_disk(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path / "out")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_reload(tmp_path: Path, dtype: torch.dtype) -> None:
    compressed("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(logits(model)).all()


def test_half_float_and_to_work() -> None:
    model = compressed("llama")
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    pairs = [b for name, b in model.named_buffers() if name.endswith("rotary_pairs")]
    assert pairs and all(b.dtype == torch.int32 for b in pairs)


def test_an_overwritten_save_leaves_no_old_shards(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compressed("llama", reduction=0.4).save_pretrained(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_portable_loads_without_the_package(tmp_path: Path) -> None:
    model = hf_compress.compress(make_model("llama"), recipe(portable=True, reduction=0.3))
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["intermediate_size"] == model.model.layers[0].mlp.up_proj.out_features < 64
    expected = tmp_path / "expected.npy"
    np.save(expected, logits(model).numpy())
    code = (
        "import sys; sys.modules['hf_compress'] = None\n"
        "import numpy as np, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"with torch.no_grad(): found = model(torch.tensor({IDS.tolist()})).logits.numpy()\n"
        f"assert np.array_equal(found, np.load({str(expected)!r}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("family", ["opt", "gemma3", "qwen3", "mistral"])
def test_portable_on_other_families(family: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model(family), recipe(portable=True, reduction=0.15))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_base_model_and_the_model_with_a_head_load_each_other(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert layout_of(again) == layout_of(model)


def test_dequantize_after_saving(tmp_path: Path) -> None:
    model = compressed("llama", torch.float64)
    before = logits(model)
    model.save_pretrained(tmp_path)
    model.dequantize()
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)


def test_a_variant_leaves_the_default_weights(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"model.safetensors", "model.fp16.safetensors"}


def test_saving_through_a_link_stays_on_its_file_system(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    compressed("llama").save_pretrained(tmp_path / "link")
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors"]
    )


def test_names_after_saving(tmp_path: Path, dense: Path) -> None:
    portable = AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe(portable=True))
    portable.save_pretrained(tmp_path / "portable")
    assert portable.name_or_path == str(tmp_path / "portable")
    same = AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe(reduction=0.0))
    assert same.name_or_path == str(dense)


def test_a_fresh_model_from_a_compressed_config_is_dense(tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_config(compressed("llama").config)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student.eval()))


def test_indices_outside_the_head_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    compressed("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("rotary_pairs"))
    tensors[name][0, 0] = 10**6
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(hf_compress.CheckpointError, match="rotary_pairs"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
