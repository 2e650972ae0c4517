"""Automatic compression under a budget, on a tiny model that was trained a little."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_helpers import TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_compress
from hf_compress import Budget, CalibrationConfig
from hf_compress.automatic import laboratory as laboratory_module
from hf_compress.automatic.additive import AdditiveModel
from hf_compress.automatic.laboratory import overlap
from hf_compress.automatic.result import pareto_front
from hf_compress.automatic.space import Candidate, describe
from hf_compress.evaluation import perplexity


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after a few steps on text: rounding costs it something."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = windows[torch.arange(8) + step % (len(windows) - 8)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data() -> CalibrationConfig:
    return CalibrationConfig([TEXTS[1]], num_samples=4, sequence_length=64, num_held_out=4, batch_size=4)


def search(dense: Path, budget: Any, **options: Any) -> hf_compress.AutoResult:
    settings: dict[str, Any] = {"max_trials": 12, "quick_samples": 2, "evaluation_tokens": 512, "context": 64}
    return hf_compress.auto(dense, budget, calibration=data(), evaluation=TEXTS[2], **{**settings, **options})


def folder_bytes(folder: Path) -> int:
    names = ("model.safetensors", "config.json", "generation_config.json")
    return sum((folder / name).stat().st_size for name in names)


def test_the_winner_keeps_the_budget_and_loads(dense: Path, tmp_path: Path) -> None:
    budget = int(folder_bytes(dense) * 0.75)
    result = search(dense, Budget(bytes=budget), output=tmp_path / "out", working_directory=tmp_path / "work")
    assert result.best.feasible and result.best.path == str(tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == result.best.bytes <= budget
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(TEXTS[2], return_tensors="pt").input_ids[0][:512]
    assert perplexity(model, ids, context=64).perplexity == pytest.approx(result.best.perplexity, rel=1e-3)
    # No single method that keeps the budget is better, run as quickly.
    alone = [trial for trial in result.trials if trial.feasible and not trial.candidate["dense"]]
    assert min(t.perplexity for t in result.trials if t.feasible) <= min(t.perplexity for t in alone)
    assert len(list((tmp_path).glob("out*"))) == 1
    again = hf_compress.compress(
        AutoModelForCausalLM.from_pretrained(dense), result.best.config, processing_class=tokenizer, calibration=data()
    )
    assert perplexity(again.eval(), ids, context=64).perplexity == pytest.approx(result.best.perplexity, rel=1e-3)
    stored = json.loads((tmp_path / "work" / "result.json").read_text())
    assert stored["best"]["recipe"] == result.best.recipe
    text = "\n".join(row for row in result.refused)
    assert "over the budget" in text
    front = pareto_front(result.trials)
    for trial in result.trials:
        beaten = any(o.bytes <= trial.bytes and o.perplexity < trial.perplexity for o in result.trials)
        assert beaten or trial in front
    result.figure(tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_a_killed_search_goes_on(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(bytes=int(folder_bytes(dense) * 0.75))
    compress, runs = laboratory_module.compress, []

    def counted(*arguments: Any, **options: Any) -> Any:
        runs.append(arguments[1])
        if len(runs) == 3:
            raise KeyboardInterrupt
        return compress(*arguments, **options)

    monkeypatch.setattr(laboratory_module, "compress", counted)
    with pytest.raises(KeyboardInterrupt):
        search(dense, budget, working_directory=tmp_path, max_trials=5)
    kept = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert len(kept) == 1 + 2
    # The line that was being written is lost, and nothing else.
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    finished = search(dense, budget, working_directory=tmp_path, max_trials=5)
    assert finished.best.feasible
    before = len(runs)
    repeated = search(dense, budget, working_directory=tmp_path, max_trials=5)
    assert len(runs) == before
    assert repeated.best.recipe == finished.best.recipe
    # What was measured needs no second run, but for the winner that is to be written.
    written = search(dense, budget, working_directory=tmp_path, max_trials=5, output=tmp_path / "out")
    assert len(runs) == before + 1
    assert written.best.recipe == finished.best.recipe
    assert folder_bytes(tmp_path / "out") == written.best.bytes == finished.best.bytes
    with pytest.raises(hf_compress.ResumeError, match="another budget"):
        search(dense, Budget(bytes=10**6), working_directory=tmp_path, max_trials=5)


def test_a_limit_on_quality_finds_the_smallest(dense: Path) -> None:
    result = search(dense, {"max_perplexity_increase": 0.3}, max_trials=6)
    assert result.best.perplexity <= 1.3 * result.dense.perplexity
    quick = [trial for trial in result.trials if trial.feasible and trial.learning == "feedback"]
    assert result.best.bytes <= min(trial.bytes for trial in quick) * 1.05


def test_a_budget_that_nothing_keeps(dense: Path) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=r"no recipe .* The nearest is"):
        search(dense, Budget(bytes="1KB"), max_trials=3)
    with pytest.raises(hf_compress.ConfigurationError, match="no recipe"):
        search(dense, Budget(min_tokens_per_second=1e9), max_trials=2)


def test_recipes_are_not_judged_on_what_they_were_fitted_to(dense: Path) -> None:
    with pytest.raises(hf_compress.CalibrationError, match="evaluation text"):
        hf_compress.auto(dense, Budget(bytes=10**6), calibration=data(), evaluation=TEXTS[1])
    with pytest.raises(hf_compress.CalibrationError, match="needs 256"):
        hf_compress.auto(dense, Budget(bytes=10**6), calibration=data(), evaluation="short")
    ids = torch.arange(300)
    assert overlap(ids, torch.arange(100, 200)) and not overlap(ids, torch.arange(1000, 1300))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "at least one of"),
        ({"bytes": "many"}, "no size such as"),
        ({"bytes": 0}, "greater than 0"),
        ({"size": 3}, "unknown field"),
    ],
)
def test_budgets_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        Budget(**fields)


def test_sizes_with_units() -> None:
    assert Budget(bytes="300MB").bytes == 300_000_000
    assert Budget(memory="1.5 GiB").memory == 1.5 * 2**30
    assert Budget(bytes="7").bytes == 7


def test_losses_add_up() -> None:
    measured = [
        (Candidate(bits=2.0), math.exp(0.8)),
        (Candidate(bits=3.0), math.exp(0.2)),
        (Candidate(bits=4.0), math.exp(0.05)),
        (Candidate(bits=4.0, table_bits=4), math.exp(0.06)),
        (Candidate(reduction=0.1, coder="none"), math.exp(0.1)),
    ]
    model = AdditiveModel.of(measured, 1.0)
    stack = Candidate(reduction=0.1, bits=3.0, table_bits=4)
    assert model.loss(stack) == pytest.approx(0.1 + 0.2 + 0.01)
    assert model.loss(Candidate(bits=2.5)) == pytest.approx(math.sqrt(0.8 * 0.2))
    assert model.loss(Candidate(bits=3.0, table_bits=2)) is None
    assert model.loss(Candidate(reduction=0.2, bits=4.0)) == pytest.approx(0.1 * 2**1.6 + 0.05)
    assert describe(stack) == "modular 10%, codebook 3 bits, tables 4 bits"


def test_nothing_of_the_user_is_removed(dense: Path, tmp_path: Path) -> None:
    for name in ("best-1", "best-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("x")
    search(dense, Budget(bytes="1GB"), output=tmp_path / "best", max_trials=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "best-1", "best-2"]
    assert (tmp_path / "best-2" / "thesis.txt").read_text() == "x"
    with pytest.raises(hf_compress.ConfigurationError, match="not empty"):
        search(dense, Budget(bytes="1GB"), output=tmp_path / "best")
    with pytest.raises(hf_compress.ConfigurationError, match="is a file"):
        search(dense, Budget(bytes="1GB"), output=tmp_path / "best-1" / "thesis.txt" / "out")


def test_a_working_directory_belongs_to_its_inputs(dense: Path, tmp_path: Path) -> None:
    budget = Budget(bytes="1GB")
    search(dense, budget, working_directory=tmp_path, max_trials=2)
    other = CalibrationConfig([TEXTS[0]], num_samples=4, sequence_length=64, num_held_out=4, batch_size=4)
    with pytest.raises(hf_compress.ResumeError, match="another calibration"):
        hf_compress.auto(
            dense,
            budget,
            calibration=other,
            evaluation=TEXTS[2],
            working_directory=tmp_path,
            max_trials=2,
            quick_samples=2,
            evaluation_tokens=512,
            context=64,
        )
    with pytest.raises(hf_compress.ResumeError, match="another loading"):
        search(dense, budget, working_directory=tmp_path, dtype=torch.float32)
    (tmp_path / "trials.jsonl").write_text('{"key": 3}\n')
    with pytest.raises(hf_compress.ResumeError, match="line 1"):
        search(dense, budget, working_directory=tmp_path)
    (tmp_path / "search.json").write_text('{"mod')
    with pytest.raises(hf_compress.ResumeError, match="damaged"):
        search(dense, budget, working_directory=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(hf_compress.ResumeError, match="there is a file"):
        search(dense, budget, working_directory=tmp_path / "file")


def test_sizes_are_planned_in_the_dtype_of_the_run(dense: Path) -> None:
    half = folder_bytes(dense)
    wide = search(dense, Budget(bytes=int(1.6 * half)), dtype="float32", max_trials=4)
    assert wide.best.bytes <= 1.6 * half < wide.dense.bytes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"evaluation": "missing.txt"}, hf_compress.CalibrationError, "is no file"),
        ({"evaluation": Path("missing")}, hf_compress.CalibrationError, "is no file"),
        ({"evaluation": None}, hf_compress.CalibrationError, "NoneType"),
        ({"evaluation": CalibrationConfig(torch.zeros(2, 9).long())}, hf_compress.CalibrationError, "token ids"),
        ({"max_trials": 0}, hf_compress.ConfigurationError, "max_trials"),
        ({"evaluation_tokens": 9}, hf_compress.ConfigurationError, "evaluation_tokens"),
        ({"budget": "many"}, hf_compress.ConfigurationError, "no size such as"),
        ({"model": "/missing/folder"}, hf_compress.ConfigurationError, "cannot be loaded"),
        ({"model": torch.nn.Linear(2, 2)}, hf_compress.ConfigurationError, "id or path"),
    ],
)
def test_wrong_arguments(dense: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": dense, "budget": 10**6, "calibration": data(), "evaluation": TEXTS[2], **options}
    with pytest.raises(error, match=message):
        hf_compress.auto(given.pop("model"), given.pop("budget"), **given)


def test_a_real_text_may_be_given_as_it_is(dense: Path) -> None:
    text = TEXTS[2][:3000].replace("\n", " ")
    with pytest.raises(hf_compress.CalibrationError, match="evaluation text"):
        hf_compress.auto(dense, 10**6, calibration=CalibrationConfig([text * 4], sequence_length=48), evaluation=text)
