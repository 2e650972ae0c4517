"""What the README shows is run as a user would run it; only a model and texts of this machine stand in for others."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_helpers import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.main import get_command

import hf_compress
from hf_compress.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Every Python block is run; one more has to be named here and run below.
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLE, SEARCH, MIXTURE, FAMILY, CODES, PRUNING, SHARING, DISTILLATION = BLOCKS
BASH = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = re.findall(r"^hf-compress .*", BASH, re.MULTILINE)
INLINE = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
# The calls in the table of what can be done: the first piece of code of the second column.
TABLE = re.findall(
    r"^\| [a-z][^|`]* \| `([^`]+)`", README.split("## What you can do")[1].split("\n## ")[0], re.MULTILINE
)

# Goes on after the first example in the same session, with what the names in the table stand for.
REST = """
import json, sys
from transformers import Pipeline, pipeline
from hf_compress import compress
from hf_compress.anatomy import find_record

def parameters(result):
    result = result.model if isinstance(result, Pipeline) else result
    return result.num_parameters() if hasattr(result, "num_parameters") else result.parameters_after

small = model.num_parameters()
from_pretrained = AutoModelForCausalLM.from_pretrained
tokenizer = AutoTokenizer.from_pretrained(name)
recipe = ModularDecompositionConfig(reduction=0.2)
found = {"dense": from_pretrained(name).num_parameters(), "example": small}
for code in json.loads(sys.argv[1]):
    model = from_pretrained(name)
    if code == "model.dequantize()":
        compress(model, recipe, calibration=config.calibration)
    found[code] = parameters(eval(code.replace("...", "model, config")))

MIXTURE
found["mixture"] = parameters(compress(from_pretrained(name), recipe, calibration=calibration))

FAMILY
found["family"] = find_record("my_llama").mlp.up
CODES
found["bits"] = model.compression_report.bits_per_weight
calibration = CalibrationConfig("texts.txt", num_samples=4, sequence_length=32, num_held_out=0)
SEARCH
found["best"] = result.best.bytes
print("FOUND", json.dumps(found))
"""

# What the examples of trainings take for granted.
BEFORE_TRAININGS = """
import torch, warnings
from transformers import (
    AlbertConfig, AlbertModel, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer,
    LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification,
)
from hf_compress import CalibrationConfig

sizes = dict(hidden_size=32, num_attention_heads=2, intermediate_size=48)
ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4, num_labels=10)
    ).save_pretrained("vit")
AlbertModel(AlbertConfig(**sizes, num_hidden_layers=12, embedding_size=16, vocab_size=96)).save_pretrained("albert")
deep = LlamaConfig.from_pretrained("tiny")
deep.num_hidden_layers = 30
LlamaForCausalLM(deep).save_pretrained("deep")
AutoTokenizer.from_pretrained("tiny").save_pretrained("deep")
images = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 10} for index in range(32)]

def collate(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}

labelled_batches = CalibrationConfig(images, data_collator=collate, num_samples=16)
quiet = dict(use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no")
tokenizer = AutoTokenizer.from_pretrained("tiny")
ids = tokenizer(open("texts.txt").read(), return_tensors="pt")["input_ids"][0]
tokens = [{"input_ids": row, "labels": row} for row in ids[: 16 * 32].view(16, 32)]
calibration = CalibrationConfig("texts.txt", num_samples=4, sequence_length=32, num_held_out=0)

def arguments(folder):
    return TrainingArguments(folder, max_steps=20, per_device_train_batch_size=4, **quiet)
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a tiny model, its tokenizer and texts: where the user sits."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    # Real text that every machine has: 12 sequences of 2048 tokens to calibrate on and 8 to hold out.
    text = Path(argparse.__file__).read_text()
    (tmp_path / "texts.txt").write_text(text)
    (tmp_path / "held_out.txt").write_text(Path(ast.__file__).read_text()[:12_000])
    rows = [json.dumps({"body": part}) for part in text.split("\n\n")]
    (tmp_path / "my_texts.jsonl").write_text("\n".join(rows))
    return tmp_path


def substituted(code: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert code.count(old) == 1, f"the README no longer shows {old!r}: say here what stands in for what it shows"
        code = code.replace(old, new)
    return code


def run(command: list[str], folder: Path) -> str:
    scripts = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": scripts, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_python_examples(workplace: Path) -> None:
    dataset = '"Salesforce/wikitext", name="wikitext-2-raw-v1"'
    example = substituted(
        EXAMPLE, ("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny"), (dataset + ', split="train"', '"texts.txt"')
    )
    mixture = substituted(MIXTURE, (dataset, '"texts.txt"'))
    rest = substituted(
        REST,
        ("\nMIXTURE\n", f"\n{mixture}\n"),
        ("\nFAMILY\n", f"\n{FAMILY}\n"),
        ("\nCODES\n", f"\n{CODES}\n"),
        ("\nSEARCH\n", "\n" + substituted(SEARCH, ("max_minutes=60", "max_trials=3"), ("=0.2", "=9.9"))),
    )
    (workplace / "example.py").write_text(example + rest)
    # A published GGUF file is in test_real_gguf.py.
    calls = [code for code in TABLE if "gguf_file" not in code]
    assert len(calls) == len(TABLE) - 1
    output = run([sys.executable, "example.py", json.dumps(calls)], workplace)
    assert "block matrices" in output, "the report was printed"
    found = json.loads(output.split("FOUND", 1)[1])

    plain = json.loads((workplace / "out" / "config.json").read_text())
    assert "quantization_config" not in plain
    assert plain["intermediate_size"] < 96
    assert AutoModelForCausalLM.from_pretrained(workplace / "out").num_parameters() == found["example"]
    assert (workplace / "out" / "tokenizer.json").is_file()

    assert (workplace / "work").is_dir(), "the working directory of the resumable run"
    assert found.pop("family") == "up"
    assert 3 < found.pop("bits") < 5
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    kept = [path for path in (workplace / "best").iterdir() if path.name not in tokenizer]
    assert found.pop("best") == sum(path.stat().st_size for path in kept)
    assert (workplace / "pareto.png").is_file()
    assert found.pop("model.dequantize()") == found["dense"]
    assert found.pop("mixture") < found.pop("dense")
    assert set(found) == {"example", *calls} - {"model.dequantize()"}
    assert set(found.values()) == {found["example"]}, "every way gives the same recipe's sizes"


def test_the_examples_of_trainings(workplace: Path) -> None:
    deep = ("from_pretrained(name,", 'from_pretrained("deep",')
    few = DISTILLATION.replace("max_steps=500", "max_steps=2, disable_tqdm=True, use_cpu=True, report_to=[]")
    parts = [
        BEFORE_TRAININGS,
        'name, train, args, model = "vit", images, arguments("p"), ViTForImageClassification.from_pretrained("vit")',
        PRUNING,
        "trainer.train()\nprint('SPARSE', type(model.vit.layers[0].mlp.fc1).__name__)",
        'albert, train, args = "albert", tokens, arguments("s")',
        substituted(SHARING, deep),
        "trainer.train()\nprint('SHARED', model.num_parameters())",
        'name, model = "tiny", AutoModelForCausalLM.from_pretrained("tiny")',
        few,
        "trainer.train()\nprint('DISTILLED', trainer.evaluate(train)['eval_divergence'])",
    ]
    (workplace / "trainings.py").write_text("\n".join(parts))
    output = run([sys.executable, "trainings.py"], workplace)
    assert "SPARSE SparseLinear" in output
    assert re.search(r"SHARED \d+", output)
    assert re.search(r"DISTILLED \d", output)
    stored = json.loads((workplace / "out" / "config.json").read_text())
    assert stored["quantization_config"]["recipe"]["stages"][0]["criterion"] == "sensitivity"


def test_the_commands(workplace: Path) -> None:
    assert [command.split()[1] for command in COMMANDS] == ["plan", "run", "eval", "auto"]
    script = "\n".join(re.sub(r"\bMODEL\b", "tiny", re.sub(r"\bOUT\b", "small", command)) for command in COMMANDS)
    script = substituted(script, ("--max-minutes 60", "--max-trials 3"))
    output = run(["bash", "-euo", "pipefail", "-c", script], workplace)
    assert output.count("block matrices") == 2, "the plan and the report"
    assert {"perplexity", "prompt tokens/s", "generated tokens/s"} <= set(re.findall(r"[a-z]+(?: tokens/s)?", output))
    stored = json.loads((workplace / "small" / "config.json").read_text())
    assert stored["quantization_config"]["quant_method"] == "hf_compress"
    assert (workplace / "work").is_dir()


def test_every_option_is_known() -> None:
    """Also those of the commands that are too long or too far to run: installation, demo and benchmarks."""
    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    benchmarks = 0
    for line in [*BASH.splitlines(), *INLINE]:
        words = shlex.split(line, comments=True) if line.startswith(("hf-compress", "python ", "--")) else []
        options = {word for word in words if word.startswith("--")}
        if words[:1] == ["hf-compress"]:
            assert options <= known[words[1]], line
        elif words[:1] == ["python"]:
            source = (ROOT / words[1]).read_text() + (ROOT / "tests/benchmarks/setting.py").read_text()
            assert all(f'"{option}"' in source for option in options), line
            benchmarks += 1
        else:
            sources = "".join(path.read_text() for path in (ROOT / "tests" / "benchmarks").glob("*.py"))
            assert all(option in set().union(*known.values()) or f'"{option}"' in sources for option in options), line
    assert benchmarks >= 2
    extras = set(re.findall(r"-e '\.\[(\w+)\]'", BASH))
    assert extras and all(
        re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M) for extra in extras
    )


CONFIGURATIONS = [value for value in vars(hf_compress).values() if hasattr(value, "model_fields")]
FOREIGN = (
    "quantization_config",
    "target_modules",
    "output_attentions",
    "trust_remote_code",
    "fsdp",
    "auto_wrap_policy",
    "cpu_ram_efficient_loading",
    "tp_plan",
    "decoder_input_ids",
    "text_config",
    "fullgraph",
)  # of torch, Transformers, PEFT and Accelerate
SETTINGS = [
    code for code in INLINE if re.fullmatch(r"\w+=.+", code) and not code.startswith(FOREIGN) and "..." not in code
]


@pytest.mark.parametrize("code", SETTINGS)
def test_settings_named_in_the_text(code: str) -> None:
    """`kinds="auto"` and the like: a field of a configuration of ours with a value that it takes."""
    keywords = ast.parse(f"f({code})").body[0].value.keywords  # type: ignore[attr-defined]
    given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
    required = {"reduction": 0.2, "dataset": ["text"], "bits": 2, "sparsity": 0.5, "unique_layers": 2}

    def takes(owner: Any) -> bool:
        fields = {field: value for field, value in required.items() if field in owner.model_fields}
        try:
            owner(**{**fields, **given})
        except hf_compress.ConfigurationError:
            return False
        return True

    assert any(takes(owner) for owner in CONFIGURATIONS if given.keys() <= owner.model_fields.keys())


def test_names_in_the_text() -> None:
    """`channel_score` and the like: fields and functions that there are."""
    named = {code for code in INLINE if re.fullmatch(r"[a-z]+(_[a-z]+)+", code)}
    fields = {field for owner in CONFIGURATIONS for field in owner.model_fields}
    fields |= set(hf_compress.CompressionPlan.__dataclass_fields__)
    fields |= set(inspect.signature(hf_compress.DistillationConfig).parameters)
    fields |= set(inspect.signature(hf_compress.DistillationTrainer).parameters)
    assert "channel_score" in named
    unknown = {
        name
        for name in named - fields - {*FOREIGN}
        if not any(hasattr(owner, name) for owner in (hf_compress, PreTrainedModel, AutoModelForCausalLM))
    }
    assert not unknown
