"""What was pushed loads again: by revision, subfolder, shards, offline, through pipelines; and never wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IDS, compress_with, compressed, logits, make_model
from huggingface_hub import constants, snapshot_download
from support.hub import elsewhere
from support.hub_server import HubServer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import hf_compress
from hf_compress.hub.shim import SHIM_FILE
from hf_compress.layout import layout_of

pytest_plugins = ["support.hub"]

LOAD = """
import numpy as np, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({name!r}{options})
with torch.no_grad():
    found = model(torch.tensor({ids})).logits.numpy()
np.save({out!r}, found)
"""


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A compressed model in `me/x` with a tokenizer, and sharded in its branch `shards`."""
    compressed("llama").save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model.push_to_hub("me/x")
    model.push_to_hub("me/x", revision="shards", max_shard_size="20KB")
    return model


@pytest.mark.parametrize("options", [{}, {"revision": "shards"}, {"device_map": "auto"}, {"trust_remote_code": True}])
def test_by_revision(options: dict[str, Any], pushed: PreTrainedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained("me/x", **options)
    assert type(model) is LlamaForCausalLM
    assert torch.equal(logits(model), logits(pushed))


def test_by_commit(hub: HubServer, pushed: PreTrainedModel) -> None:
    first = hub.repositories["me/x"].refs["main"]
    compressed("llama", reduction=0.4).push_to_hub("me/x")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x", revision=first)), logits(pushed))
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x")), logits(pushed))


def test_from_a_subfolder(hub: HubServer, pushed: PreTrainedModel) -> None:
    files = hub.files("me/x", "shards")
    moved: dict[str, str | bytes] = {f"small/{name}": hub.blobs[entry.sha256] for name, entry in files.items()}
    hub.edit("me/many", moved)
    model = AutoModelForCausalLM.from_pretrained("me/many", subfolder="small")
    assert torch.equal(logits(model), logits(pushed))


def test_from_the_cache_alone(hub: HubServer, pushed: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        AutoModelForCausalLM.from_pretrained("me/x", local_files_only=True)
    AutoModelForCausalLM.from_pretrained("me/x")
    asked = len(hub.log)
    model = AutoModelForCausalLM.from_pretrained("me/x", local_files_only=True)
    assert torch.equal(logits(model), logits(pushed))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x")), logits(pushed))
    assert len(hub.log) == asked


def test_a_snapshot(pushed: PreTrainedModel, tmp_path: Path) -> None:
    folder = snapshot_download("me/x", local_dir=tmp_path / "here")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(pushed))
    cached = snapshot_download("me/x", revision="shards")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(cached)), logits(pushed))


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}, {"revision": "shards"}])
def test_pipelines_and_classes(options: dict[str, Any], pushed: PreTrainedModel) -> None:
    generate = pipeline("text-generation", "me/x", **options)
    assert layout_of(generate.model)
    text = generate("a", max_new_tokens=2, do_sample=False)[0]["generated_text"]
    assert isinstance(text, str)
    for load in (AutoModel, LlamaForCausalLM):
        assert layout_of(load.from_pretrained("me/x", **options))
    assert len(AutoTokenizer.from_pretrained("me/x", **options)) == 400


def test_private_and_missing_repositories(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("llama")
    model.push_to_hub("me/hidden", private=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/hidden")), logits(model))
    for name, options in (
        ("me/hidden", {"token": "hf_guest", "force_download": True}),
        ("me/nowhere", {}),
        ("me/hidden", {"revision": "nowhere"}),
    ):
        with pytest.raises(OSError, match=r"me/|nowhere"):
            AutoModelForCausalLM.from_pretrained(name, **options)


def test_an_own_copy_has_no_shim_that_it_does_not_hold(pushed: PreTrainedModel, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained("me/x")
    assert model.config.auto_map
    model.save_pretrained(tmp_path / "copy")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "copy"), "auto_map")
    assert not (tmp_path / "copy" / SHIM_FILE).exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    assert torch.equal(logits(again), logits(pushed))
    model = AutoModelForCausalLM.from_pretrained("me/x")
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "dense"), "auto_map")


def test_a_second_push_takes_the_tokenizer_along(hub: HubServer, pushed: PreTrainedModel) -> None:
    AutoModelForCausalLM.from_pretrained("me/x").push_to_hub("me/second")
    assert "tokenizer.json" in hub.files("me/second")


def test_without_the_import_the_shim_imports_it(hub: HubServer, pushed: PreTrainedModel, tmp_path: Path) -> None:
    code = LOAD.format(name="me/x", options=", trust_remote_code=True", ids=IDS.tolist(), out=str(tmp_path / "found"))
    done = elsewhere(hub, tmp_path / "stranger", code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array_equal(np.load(tmp_path / "found.npy"), logits(pushed).numpy())


def test_without_the_package_the_shim_says_how_to_get_it(
    hub: HubServer, pushed: PreTrainedModel, tmp_path: Path
) -> None:
    code = LOAD.format(name="me/x", options=", trust_remote_code=True", ids=IDS.tolist(), out=str(tmp_path / "found"))
    done = elsewhere(hub, tmp_path / "stranger", code, package=False)
    assert done.returncode != 0
    assert "pip install hf_compress" in done.stderr.splitlines()[-1], done.stderr[-3000:]
    assert not (tmp_path / "found.npy").exists()


def test_without_import_and_shim_the_load_stops(hub: HubServer, tmp_path: Path) -> None:
    """For every method, also where another folder's shim is asked for and not there."""
    names = []
    for method in ("modular", "codebook", "sharing", "pruning"):
        names.append(f"me/{method}")
        compress_with(method, "llama").push_to_hub(names[-1])
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"for name in {names}:\n"
        "    try:\n"
        "        AutoModelForCausalLM.from_pretrained(name)\n"
        "    except RuntimeError as error:\n"
        "        assert 'size mismatch' in str(error) or 'mismatch' in str(error), error\n"
        "        print('STOPPED', name)\n"
    )
    done = elsewhere(hub, tmp_path / "stranger", code, package=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("STOPPED")] == names


def test_compressing_what_is_on_the_hub_again_is_refused(pushed: PreTrainedModel) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match="compressed already"):
        AutoModelForCausalLM.from_pretrained(
            "me/x", compression_config=hf_compress.LayerSharingConfig(unique_layers=2)
        )
    assert not layout_of(make_model("llama"))
