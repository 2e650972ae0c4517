"""The card: what it says, what it does not say, and what it leaves alone."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import compress_with, compressed, make_model, recipe, token_ids
from huggingface_hub import ModelCard, constants
from transformers import BitsAndBytesConfig, PreTrainedModel
from typer.main import get_command
from typer.testing import CliRunner

import hf_compress
from hf_compress import CompressionConfig, ConfigurationError
from hf_compress.cli import app
from hf_compress.cli.recipe_file import load_recipe
from hf_compress.evaluation import compare
from hf_compress.hub import Options, folder_card, prepare_folder
from hf_compress.hub.card import card_data, check_metadata, render_card, render_section
from hf_compress.hub.facts import Facts, facts_of_folder, facts_of_model
from hf_compress.hub.figure import layer_figure
from hf_compress.hub.measured import Evaluation
from hf_compress.hub.merge import choose, inherited_from, is_generic, merge
from hf_compress.hub.publish import keep_report

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_DATA = {
    "dataset": "Salesforce/wikitext",
    "name": "wikitext-2-raw-v1",
    "split": "train",
    "num_samples": 64,
    "num_held_out": 8,
    "seed": 0,
    "sequence_length": 1024,
    "fingerprint": "f" * 64,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test here asks a Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def facts() -> Facts:
    """Of a base on the Hub, calibrated on a dataset of the Hub."""
    found = facts_of_model(compressed("llama"))
    assert found is not None
    provenance = {**found.provenance, "base_model": "org/base", "base_commit": COMMIT, "calibration": [HUB_DATA]}
    return replace(found, provenance=provenance, base_card={"license": "mit", "pipeline_tag": "text-generation"})


def metadata(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


def evaluated(model: PreTrainedModel) -> dict[str, Any]:
    models = {"/home/somebody/dense": make_model("llama"), "OUT": model}
    return compare(models, token_ids(4, 32).flatten(), context=32, speed=False).to_dict()


@pytest.mark.parametrize("method", ["modular", "codebook", "sharing", "pruning"])
def test_every_method_has_a_card(method: str, tmp_path: Path) -> None:
    model = compress_with(method, "llama")
    found = facts_of_model(model)
    assert found is not None
    model.save_pretrained(tmp_path)
    card = render_card(found)
    assert render_card(facts_of_folder(tmp_path)) == card, "the folder says what the live model says"
    assert metadata(card)["tags"] == ["hf_compress", found.stages[0]["method"]]
    assert re.search(r"^1\. \*\*[A-Z]\w+ ?\w*\*\*: \S", card, re.MULTILINE)
    assert "registered from outside" not in card
    assert "Its quality was not measured." in card and "Not measured: bytes on disk (weights), perplexity" in card
    assert "model-index" not in metadata(card)
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", card.split("<details>")[0])
    assert "{{" not in card and "{%" not in card
    assert not re.search(r"\n\n\n", card), "no holes where a part was left out"


def test_stacks_name_every_stage(facts: Facts) -> None:
    config = CompressionConfig(
        stages=[recipe(), BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")],
    )
    card = render_card(replace(facts, recipe=config.to_dict()))
    assert (
        "1. **Modular decomposition**: 25 %" in card
        and "2. **bitsandbytes**: matrices are kept in 4 bits (`nf4`)" in card
    )
    assert "lin2025modegpt" in card and "dettmers2023qlora" in card
    assert metadata(card)["tags"] == ["hf_compress", "modular_decomposition", "bitsandbytes"]


@pytest.mark.parametrize("stage", [{"method": "mine", "size": 3}, {"method": "pruning", "no_such_field": 1}, {}])
def test_a_stage_that_is_not_known_here(stage: dict[str, Any], facts: Facts) -> None:
    card = render_card(replace(facts, recipe={"stages": [stage]}))
    assert "a method that was registered from outside; the recipe below says all that is known" in card


def test_what_was_not_recorded_says_so(facts: Facts) -> None:
    card = render_card(Facts(None, {}, None, False, ""))
    for sentence in (
        "the name of whose base was not recorded",
        "The recipe was not recorded.",
        "The report of the compression was not recorded.",
        "The versions were not recorded.",
        "What it was calibrated on was not recorded.",
        "The license of the base is not known here",
    ):
        assert sentence in card
    assert set(metadata(card)) == {"library_name", "tags"}
    assert "hf-compress run" not in card and "![" not in card
    known = render_card(facts)
    assert not re.search("not recorded|license of the base is not known", known)


def test_measured_figures(facts: Facts) -> None:
    model = compressed("llama")
    content = evaluated(model)
    evaluation = Evaluation.load(content, "Salesforce/wikitext wikitext-2-raw-v1 test")
    card = render_card(replace(facts, evaluation=evaluation), repo_id="me/x")
    dense, small = (content[name]["perplexity"]["perplexity"] for name in content)
    assert f"| perplexity | {dense:.2f} | {small:.2f} | {small / dense - 1:+.1%} |" in card
    index = metadata(card)["model-index"]
    assert index[0]["name"] == "x"
    result = index[0]["results"][0]
    assert result["dataset"] == {"type": "Salesforce/wikitext", "name": "Salesforce/wikitext wikitext-2-raw-v1 test"}
    assert result["metrics"] == [{"type": "perplexity", "value": small, "name": "perplexity"}]
    assert "Not measured: bytes on disk" in card and "Its quality was not measured" not in card
    assert "somebody" not in card
    # A line right behind a table would be one of its rows.
    assert not re.search(r"^\|.*\|\n[^|\n]", card, re.MULTILINE)
    unnamed = render_card(replace(facts, evaluation=Evaluation.load(content)))
    assert "on a text whose name was not recorded" in unnamed


def test_evaluations_that_cannot_be_used(tmp_path: Path) -> None:
    one = {"parameters": 1}
    for content in ({}, {"a": one, "b": one, "c": one}, {"a": 3}, [1]):
        (tmp_path / "e.json").write_text(json.dumps(content))
        with pytest.raises(ConfigurationError, match="evaluation"):
            Evaluation.load(tmp_path / "e.json")
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Evaluation.load(tmp_path / "e.json")
    alone = Evaluation.load({"small": {"parameters": 1, "perplexity": {"perplexity": None}}})
    assert alone.base is None and alone.rows() == []


def test_the_recipe_and_the_command_can_be_used(facts: Facts, tmp_path: Path) -> None:
    compressed("llama").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["quantization_config"]["provenance"] |= {
        "base_model": "org/base",
        "base_commit": COMMIT,
        "calibration": [HUB_DATA],
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    prepare_folder(tmp_path)
    read, data = load_recipe(tmp_path / "recipe.yaml")
    assert read.to_dict() == facts.recipe
    assert (data.dataset, data.name, data.num_samples) == ("Salesforce/wikitext", "wikitext-2-raw-v1", 64)
    line = next(line for line in folder_card(tmp_path).splitlines() if line.startswith("hf-compress run"))
    assert line == f"hf-compress run org/base OUT --revision {COMMIT} --recipe recipe.yaml"
    known = {
        option
        for parameter in get_command(app).commands["run"].params  # type: ignore[attr-defined]
        for option in parameter.opts
    }
    for words in (line, render_section(replace(facts, provenance={**facts.provenance, "calibration": [{}]}))):
        found = [word for row in words.splitlines() if row.startswith("hf-compress run") for word in shlex.split(row)]
        assert {word for word in found if word.startswith("--")} <= known


def test_data_that_nobody_else_has(facts: Facts) -> None:
    local = {**HUB_DATA, "dataset": "mine.txt"}
    local.pop("split")
    mixture = {"dataset": "a mixture", "parts": [HUB_DATA, local], "num_samples": 128, "num_held_out": 8, "seed": 0}
    card = render_card(replace(facts, provenance={**facts.provenance, "calibration": [mixture]}))
    assert "--recipe recipe.yaml --dataset DATA" in card and "calibration data that are not on the Hub" in card
    assert metadata(card)["datasets"] == ["Salesforce/wikitext"]
    assert "a mixture: Salesforce/wikitext (name wikitext-2-raw-v1, split train): 64 samples" in card


def test_a_training_is_no_command(facts: Facts) -> None:
    pruned = hf_compress.PruningConfig(sparsity=0.5, criterion="movement", schedule="cubic", end_step=10)
    card = render_card(replace(facts, recipe=CompressionConfig.wrap(pruned).to_dict()))
    assert "made in a training with the recipe" in card and "hf-compress run" not in card


def test_names_are_text(facts: Facts) -> None:
    name = "<img src=x onerror=y>|`<!-- hf_compress: end -->"
    provenance = {**facts.provenance, "base_model": name, "base_commit": None}
    card = render_card(replace(facts, provenance=provenance))
    assert "<img" not in card and card.count("<!-- hf_compress: end -->") == 1
    assert render_card(replace(facts, provenance=provenance), existing=card) == card
    with pytest.raises(ConfigurationError, match="no id of the Hub"):
        render_card(replace(facts, provenance={**provenance, "base_commit": COMMIT}))


def test_metadata_are_checked(facts: Facts) -> None:
    data = card_data(facts)
    check_metadata(data)
    for name, value, message in (
        ("datasets", ["a b/c"], "datasets"),
        ("license", ["mit", 3], "license"),
        ("tags", ["a", 3], "tags"),
    ):
        broken = card_data(facts)
        setattr(broken, name, value)
        with pytest.raises(ConfigurationError, match=message):
            check_metadata(broken)


def test_our_section_alone_is_updated(facts: Facts) -> None:
    card = render_card(facts, repo_id="me/x")
    assert render_card(facts, repo_id="me/x", existing=card) == card, "nothing to update"
    edited = card.replace("license: mit\n", "license: openrail\nwidget: [text: hello]\n").replace(
        "# x", "# Mine\n\nHello."
    )
    edited = edited.replace("- hf_compress\n", "- hf_compress\n- cute\n") + "\n## Thanks\n"
    other = replace(
        facts,
        recipe={"stages": [recipe(reduction=0.5).to_dict()]},
        base_card={"license": "apache-2.0", "pipeline_tag": "fill-mask"},
    )
    again = render_card(other, repo_id="me/x", existing=edited)
    data = metadata(again)
    assert (data["license"], data["pipeline_tag"]) == ("openrail", "fill-mask"), "an edit stays, what was ours follows"
    assert data["widget"] == [{"text": "hello"}]
    assert data["tags"] == ["hf_compress", "cute", "modular_decomposition"]
    assert again.split("<!-- hf_compress: begin")[0].endswith("# Mine\n\nHello.\n\n")
    assert again.endswith("<!-- hf_compress: end -->\n\n## Thanks\n")
    assert "50 % of the weights" in again and "25 % of the weights" not in again


def test_results_of_others_stay(facts: Facts) -> None:
    evaluation = Evaluation.load({"small": {"parameters": 1, "scores": {"LAMBADA accuracy": {"value": 0.5}}}})
    other = {"task": {"type": "t"}, "dataset": {"type": "d", "name": "d"}, "metrics": [{"type": "wer", "value": 1}]}
    old = {"task": {"type": "t"}, "dataset": {"type": "LAMBADA", "name": "LAMBADA"}}
    old["metrics"] = [{"type": "accuracy", "name": "LAMBADA accuracy", "value": 0.1}]  # type: ignore[assignment]
    theirs = yaml.safe_dump({"model-index": [{"name": "n", "results": [other, old]}]})
    card = render_card(replace(facts, evaluation=evaluation), existing=f"---\n{theirs}---\n\nMine.\n")
    results = metadata(card)["model-index"][0]["results"]
    assert [metric["value"] for result in results for metric in result["metrics"]] == [1, 0.5]


@pytest.mark.parametrize(
    "damage",
    [
        lambda card: card.replace("<!-- hf_compress: end -->", ""),
        lambda card: card + card[card.index("<!-- hf_compress: begin") :],
        lambda card: card.replace("begin {", "begin {{"),
        lambda card: card.replace("library_name: transformers", "library_name: [transformers"),
    ],
)
def test_a_damaged_card_is_left_alone(damage: Any, facts: Facts) -> None:
    damaged = damage(render_card(facts))
    with pytest.warns(UserWarning, match=r"README\.md stays as it is"):
        assert render_card(facts, existing=damaged) == damaged


def test_a_card_of_windows(facts: Facts) -> None:
    edited = (render_card(facts) + "\nMine.\n").replace("\n", "\r\n")
    assert render_card(facts, existing=edited) == render_card(facts, existing=edited.replace("\r\n", "\n"))


def test_generic_cards_are_nobody_s(facts: Facts) -> None:
    from huggingface_hub import ModelCardData

    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    generic = str(ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=description))
    assert is_generic(generic)
    assert render_card(facts, existing=generic) == render_card(facts)
    filled = generic.replace("[More Information Needed]", "It is mine.")
    assert not is_generic(filled) and "It is mine." in render_card(facts, existing=filled)
    assert choose(generic, None) == generic and choose(generic, filled) == filled and choose(filled, generic) == filled


def test_a_new_title_is_no_edit(facts: Facts) -> None:
    local, remote = render_card(facts), render_card(facts, repo_id="me/x", pushed=True)
    assert choose(local, remote) == remote
    edited = local + "\nMine.\n"
    chosen = choose(edited, remote)
    assert chosen is not None and chosen.endswith("\nMine.\n")
    assert merge(chosen, "s", card_data(facts), title="t").count("hf_compress: begin") == 1


@pytest.mark.parametrize("method", ["modular", "codebook"])
def test_the_figure(method: str) -> None:
    report = compress_with(method, "llama").compression_report
    tree = ElementTree.fromstring(layer_figure(report))
    words = ["".join(element.itertext()) for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    kinds = list(dict.fromkeys(row.kind for row in report.modules))
    assert words[:2] == ["kept", "error"] and words[2 : 2 + 2 * len(kinds) : 2] == kinds
    assert f"{max(row.error for row in report.modules):.4f}" in words
    _, _, width, height = (float(number) for number in tree.attrib["viewBox"].split())
    for cell in tree.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(cell.get("x", 0)) + float(cell.attrib["width"]) <= width
        assert float(cell.get("y", 0)) + float(cell.attrib["height"]) <= height


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    model = compressed("llama")
    model.save_pretrained(tmp_path / "x")
    before = sorted((tmp_path / "x").iterdir())
    printed = CliRunner().invoke(app, ["card", str(tmp_path / "x"), "--repo", "me/x"])
    assert printed.exit_code == 0 and "# x\n" in printed.output
    assert sorted((tmp_path / "x").iterdir()) == before, "printing writes nothing"
    (tmp_path / "e.json").write_text(json.dumps(evaluated(model)))
    options = ["--write", "--evaluation", str(tmp_path / "e.json"), "--evaluation-data", "a text"]
    assert CliRunner().invoke(app, ["card", str(tmp_path / "x"), *options]).exit_code == 0
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| perplexity |" in card and "on a text," in card
    for file in (tmp_path / "x").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes() and b"somebody" not in file.read_bytes(), file.name
    # What was measured is found again.
    assert "| perplexity |" in CliRunner().invoke(app, ["card", str(tmp_path / "x")]).output
    assert facts_of_folder(tmp_path / "x").evaluation is not None
    refused = CliRunner().invoke(app, ["card", str(tmp_path)])
    assert refused.exit_code == 2 and "no config.json" in refused.output


def test_a_portable_model_keeps_its_report(tmp_path: Path) -> None:
    model = hf_compress.compress(make_model("llama"), recipe(portable=True, reduction=0.3))
    found = facts_of_model(model)
    assert found is not None and not found.needs_package
    model.save_pretrained(tmp_path)
    (tmp_path / "compression_report.json").unlink(missing_ok=True)
    with pytest.raises(ConfigurationError, match="holds no model that hf_compress has compressed"):
        folder_card(tmp_path)
    # As an earlier version wrote it, without the recipe.
    (tmp_path / "compression_report.json").write_text(json.dumps(replace(found, recipe=None).to_dict()))
    names = prepare_folder(tmp_path, options=Options(figures=False))
    assert names == ["README.md", "compression_report.json"]
    assert "needs no other package" in (tmp_path / "README.md").read_text()


def test_a_portable_model_has_its_recipe(tmp_path: Path) -> None:
    """Its config has no place for one: it rides on the model, and lies beside the weights."""
    stages = recipe(portable=True, reduction=0.3)
    model = hf_compress.compress(make_model("llama"), stages)
    # The engine leaves it there.
    kept = {"recipe": CompressionConfig.wrap(stages).to_dict(), "provenance": {"calibration": [HUB_DATA]}}
    model.compression_record = kept
    model.save_pretrained(tmp_path)
    assert keep_report(model, tmp_path)
    card = folder_card(tmp_path)
    assert (
        "30 % of the weights" in card and "--recipe recipe.yaml" in card and "not recorded." not in card.split("##")[2]
    )
    assert "recipe.yaml" in prepare_folder(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml")[0].to_dict() == kept["recipe"]
    assert not keep_report(compressed("llama"), tmp_path), "others have it in their config"
    assert not keep_report(make_model("llama"), tmp_path)


def test_a_model_that_was_made_dense_again_has_no_card() -> None:
    assert facts_of_model(compressed("llama").dequantize()) is None


def test_the_license_of_a_local_base(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nlanguage: [de, en]\n---\n\n# The base\n")
    folder = tmp_path / "small"
    compressed("llama").save_pretrained(folder)
    runner = CliRunner()
    unknown = "license of the base is not known"
    assert unknown in runner.invoke(app, ["card", str(folder)]).output
    refused = runner.invoke(app, ["card", str(folder), "--base", str(folder)])
    assert refused.exit_code == 2 and "holds no README.md" in refused.output
    named = runner.invoke(app, ["card", str(folder), "--license", "openrail"]).output
    assert metadata(named)["license"] == "openrail" and unknown not in named
    assert runner.invoke(app, ["card", str(folder), "--write", "--base", str(tmp_path / "base")]).exit_code == 0
    card = (folder / "README.md").read_text()
    assert (metadata(card)["license"], metadata(card)["language"]) == ("mit", ["de", "en"]) and unknown not in card
    assert "The base" not in card
    # Later nobody has to say it again, and what somebody writes by hand is known as well.
    assert folder_card(folder) == card
    (folder / "README.md").write_text(card.replace("license: mit", "license: gemma"))
    again = folder_card(folder)
    assert metadata(again)["license"] == "gemma" and unknown not in again


def test_a_license_is_not_taken_over_from_another_base(facts: Facts) -> None:
    first = replace(facts, provenance={**facts.provenance, "base_commit": None})
    card = render_card(first)
    assert inherited_from(card, "org/base") == {"license": "mit"}
    assert inherited_from(card, "org/other") == {}
    assert inherited_from(card.replace("license: mit", "license: openrail"), "org/other") == {"license": "openrail"}
    assert inherited_from("---\nlicense: [mit, openrail]\n---\n", "x") == {}
    assert inherited_from(None, "x") == {}


def test_a_trained_model_is_what_its_class_is(tmp_path: Path) -> None:
    """An encoder for sentences that was tuned to classify them is no encoder for sentences any more."""
    stage = hf_compress.PruningConfig(sparsity=0.5, criterion="sensitivity", schedule="cubic", end_step=10)
    tuned = Facts(
        CompressionConfig.wrap(stage).to_dict(), {}, None, True, "BertForSequenceClassification", trained=True
    )
    tuned = replace(tuned, base_card={"pipeline_tag": "sentence-similarity"})
    card = render_card(tuned)
    assert metadata(card)["pipeline_tag"] == "text-classification"
    assert "Not measured: bytes on disk (weights), peak memory (bytes).\n" in card, "a classifier has no perplexity"
    score = {"value": 0.8, "count": 872, "standard_error": 0.0135, "note": "one seed"}
    content = {"small": {"parameters": 1, "scores": {"SST-2 accuracy": score}}}
    card = render_card(replace(tuned, evaluation=Evaluation.load(content)))
    assert "SST-2 accuracy: 872 examples, standard error about 0.0135, one seed." in card
    # A Trainer leaves its arguments beside the weights, and the folder's card says that it was trained.
    compressed("llama").save_pretrained(tmp_path)
    assert "It was trained with" not in folder_card(tmp_path)
    (tmp_path / "training_args.bin").touch()
    assert "It was trained with" in folder_card(tmp_path)
    assert "A training was part of it" in folder_card(tmp_path)


CARDS = Path(__file__).parent.parent / "model_cards"


def test_the_finished_cards() -> None:
    """Each was measured, stands in the list, shows its figure, and is made by one command."""
    made = {card.name for card in runpy.run_path(str(CARDS / "make.py"))["CARDS"].values()}
    finished = {path.stem: path.read_text() for path in CARDS.glob("*.md") if path.name != "README.md"}
    listed = re.findall(r"^\| \[([^]]+)\]\(([^)]+)\) \|", (CARDS / "README.md").read_text(), re.MULTILINE)
    assert finished and {name for name, _ in listed} == finished.keys() <= made
    assert all(link == f"{name}.md" for name, link in listed)
    for name, card in finished.items():
        check_metadata(ModelCard(card).data)
        data = metadata(card)
        assert data["license"] and data["model-index"][0]["results"], name
        assert "## Before and after" in card and "| bytes on disk (weights) |" in card, name
        figures = re.findall(r"^!\[.*\]\((.*\.svg)\)$", card, re.MULTILINE)
        assert figures == [f"{name}.svg"]
        ElementTree.parse(CARDS / figures[0])
        assert not re.search(r"/(?:tmp|home|root|work)\b", card), name
