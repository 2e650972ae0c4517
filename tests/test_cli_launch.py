"""`accelerate launch -m hf_compress run`, and `run` on what is no language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration_helpers import make_tokenizer
from support.processes import accelerate_launch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from typer.testing import CliRunner

from hf_compress.cli import app

STORIES = Path(__file__).parent / "data" / "stories260k"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize("more", [[], ["--max-memory", "16GB"]])
@torch.no_grad()  # type: ignore[untyped-decorator]
def test_two_processes_write_one_result(more: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a little dog. It liked to play in the park. " * 200)
    options = ["--reduction", "0.2", "--kinds", "mlp", "--dtype", "float32", "--dataset", str(tmp_path / "text.txt")]
    options += ["--num-samples", "8", "--sequence-length", "64"]
    alone = CliRunner().invoke(app, ["run", str(STORIES), str(tmp_path / "alone"), *options])
    assert alone.exit_code == 0, alone.output
    done = accelerate_launch("-m", "hf_compress", "run", str(STORIES), str(tmp_path / "together"), *options, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("Saved to") == 1
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("alone", "together")]
    assert models[0].config.quantization_config.layout == models[1].config.quantization_config.layout
    ids = torch.arange(5, 37)[None]
    # Channels of almost equal scores may change places.
    torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, rtol=1e-2, atol=1e-2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["alone", "text.txt", "together"]


def test_a_mistake_ends_all_processes(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = accelerate_launch(
        "-m",
        "hf_compress",
        "run",
        str(STORIES),
        str(tmp_path / "out"),
        "--reduction",
        "0.2",
        "--dataset",
        f"{tmp_path}/empty.txt",
    )
    assert done.returncode != 0 and "error:" in done.stderr and "empty.txt" in done.stderr
    assert not (tmp_path / "out").exists()


def test_run_of_an_encoder(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("Once upon a time there was a little dog. " * 200)
    options = ["--method", "codebook", "--bits", "3", "--dataset", str(tmp_path / "text.txt"), "--num-samples", "8"]
    result = CliRunner().invoke(
        app, ["run", str(tmp_path / "dense"), str(tmp_path / "out"), *options, "--sequence-length", "32"]
    )
    assert result.exit_code == 0, result.output
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is BertModel
    assert (tmp_path / "out/tokenizer.json").exists()


def test_run_of_an_image_classifier(tmp_path: Path) -> None:
    vit = ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=2)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "dense")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "dense")
    options = ["--method", "codebook", "--bits", "3", "--learning", "none"]
    result = CliRunner().invoke(app, ["run", str(tmp_path / "dense"), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    model = ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.compression_report.bits_per_weight < 8
    assert (tmp_path / "out/preprocessor_config.json").exists()
