"""Every way to the Hub, with the clients' own code against a Hub on loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_KINDS, calibration, compress_with, logits, make_model, recipe
from huggingface_hub import ModelCard
from support.hub_server import HubServer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from typer.testing import CliRunner

import hf_compress
from hf_compress.cli import app
from hf_compress.hub import UploadError, push_folder

pytest_plugins = ["support.hub"]

CONTENT = {
    ".gitattributes",
    "README.md",
    "compression.svg",
    "compression_report.json",
    "config.json",
    "generation_config.json",
    "hf_compress_shim.py",
    "model.safetensors",
    "recipe.yaml",
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
BASE_CARD = "---\nlicense: mit\npipeline_tag: text-generation\nlanguage: de\n---\n\n# The base\n"


@pytest.fixture
def base(hub: HubServer, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """A dense model in a repository, with card and tokenizer."""
    make_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    files: dict[str, str | bytes] = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.edit("org/base", {**files, "README.md": BASE_CARD})
    for path in (tmp_path / "base").iterdir():
        path.unlink()
    return "org/base"


def from_base(name: str, **fields: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, compression_config=recipe(kinds=ALL_KINDS, **fields))


def metadata(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


def test_push_to_hub(hub: HubServer, base: str) -> None:
    model = from_base(base)
    model.push_to_hub("me/small", commit_message="First")
    assert set(hub.files("me/small")) == CONTENT | TOKENIZER
    assert hub.repositories["me/small"].titles == ["initial", "First"], "one commit for all"
    card = hub.text("me/small", "README.md")
    commit = hub.repositories[base].refs["main"]
    assert f"`{base}`, at its commit `{commit}`" in card
    assert f"hf-compress run {base} OUT --revision {commit} --recipe recipe.yaml" in card
    assert 'AutoModelForCausalLM.from_pretrained("me/small")' in card
    assert metadata(card) == {
        "base_model": base,
        "base_model_relation": "quantized",
        "language": "de",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["hf_compress", "modular_decomposition"],
    }
    stored = json.loads(hub.text("me/small", "compression_report.json"))
    assert stored["provenance"]["base_commit"] == commit
    assert stored["report"] == model.compression_report.to_dict()
    assert model.name_or_path == "me/small"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/small")), logits(model))
    AutoTokenizer.from_pretrained("me/small")


def test_the_commit_of_a_base_that_is_compressed_later(hub: HubServer, base: str) -> None:
    first = hub.repositories[base].refs["main"]
    hub.edit(base, {"other.txt": "x"})
    model = AutoModelForCausalLM.from_pretrained(base, revision=first)
    hf_compress.compress(model, recipe())
    assert model.config.quantization_config.provenance["base_commit"] == first
    assert "_commit_hash" not in model.config.to_json_string()


def test_nothing_of_this_machine_is_sent(hub: HubServer, base: str, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "local")
    for name, source in (("me/a", base), ("me/b", str(tmp_path / "local"))):
        from_base(source).push_to_hub(name)
        for file, entry in hub.files(name).items():
            assert str(tmp_path).encode() not in hub.blobs[entry.sha256], (name, file)
            assert b"/tmp" not in hub.blobs[entry.sha256], (name, file)
    assert "A compressed local, a model that was not loaded from the Hub." in hub.text("me/b", "README.md")


def test_save_pretrained_pushes_a_whole_folder(hub: HubServer, base: str, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "secret.csv").write_text("my data")
    model = from_base(base)
    model.save_pretrained(folder, push_to_hub=True, repo_id="me/saved", private=True, max_shard_size="20KB")
    assert hub.repositories["me/saved"].private
    there = set(hub.files("me/saved"))
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert there == CONTENT - {"model.safetensors"} | TOKENIZER | shards | {"model.safetensors.index.json"}
    assert (folder / "README.md").read_text() == hub.text("me/saved", "README.md")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/saved")), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    # The name of the folder is the repository's where none is given.
    model.save_pretrained(folder, push_to_hub=True)
    assert "me/small" in hub.repositories


def test_shards_of_an_earlier_push_go(hub: HubServer, base: str) -> None:
    from_base(base).push_to_hub("me/x")
    other = from_base(base, reduction=0.4)
    other.push_to_hub("me/x", max_shard_size="20KB")
    assert "model.safetensors" not in hub.files("me/x")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x")), logits(other))
    other.push_to_hub("me/x")
    weights = [name for name in hub.files("me/x") if "safetensors" in name]
    assert weights == ["model.safetensors"]


@pytest.mark.parametrize("method", ["codebook", "sharing", "pruning"])
def test_other_methods(method: str, hub: HubServer) -> None:
    model = compress_with(method, "llama")
    model.push_to_hub("me/x", tags=["mine"])
    card = hub.text("me/x", "README.md")
    assert metadata(card)["tags"] == ["hf_compress", method, "mine"]
    assert "@" in card.split("## Citations")[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x")), logits(model))


def test_a_portable_model(hub: HubServer, base: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, compression_config=recipe(portable=True, reduction=0.3))
    model.push_to_hub("me/portable")
    there = set(hub.files("me/portable"))
    assert there == (CONTENT | TOKENIZER) - {"hf_compress_shim.py"}
    card = hub.text("me/portable", "README.md")
    assert "needs no other package" in card and "portable: true" in hub.text("me/portable", "recipe.yaml")
    assert "import hf_compress" not in card and "auto_map" not in hub.text("me/portable", "config.json")
    assert model.name_or_path == "me/portable"


def test_what_can_be_left_out(hub: HubServer, base: str) -> None:
    model = from_base(base)
    model.push_to_hub("me/x")
    model.push_to_hub("me/x", include_report=False, include_figures=False)
    assert set(hub.files("me/x")) == (CONTENT | TOKENIZER) - {"compression_report.json", "compression.svg"}
    assert "compression.svg" not in hub.text("me/x", "README.md")


def test_branches_and_pull_requests(hub: HubServer, base: str) -> None:
    model = from_base(base)
    model.push_to_hub("me/x", revision="small")
    assert set(hub.files("me/x")) == {".gitattributes"}
    assert set(hub.files("me/x", "small")) == CONTENT | TOKENIZER
    model.push_to_hub("me/x", create_pr=True, commit_description="please")
    assert set(hub.files("me/x", "refs/pr/1")) == CONTENT | TOKENIZER
    assert set(hub.files("me/x")) == {".gitattributes"}
    model.push_to_hub("me/x", revision="refs/pr/1", commit_message="Again", include_figures=False)
    assert set(hub.files("me/x", "refs/pr/1")) == (CONTENT | TOKENIZER) - {"compression.svg"}
    for revision in ("small", "refs/pr/1"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x", revision=revision)), logits(model))


def test_a_pull_request_to_somebody_else(hub: HubServer, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_base(base)
    model.push_to_hub("me/x")
    with pytest.raises(UploadError, match=r"org/base.*Forbidden.*the repository is as it was"):
        model.push_to_hub("org/base")
    commit = model.push_to_hub("me/x", create_pr=True, token="hf_guest", include_figures=False)
    assert commit.pr_url.endswith("/me/x/discussions/1")


def test_an_edited_card_keeps_its_text(hub: HubServer, base: str) -> None:
    model = from_base(base)
    model.push_to_hub("me/x")
    card = hub.text("me/x", "README.md")
    edited = (
        card.replace("license: mit", "license: apache-2.0").replace("# x\n", "# My model\n\nMine.\n") + "\nThanks.\n"
    )
    hub.edit("me/x", {"README.md": edited})
    from_base(base, reduction=0.4).push_to_hub("me/x")
    again = hub.text("me/x", "README.md")
    assert "# My model\n\nMine.\n" in again and again.endswith("\nThanks.\n")
    assert metadata(again)["license"] == "apache-2.0"
    assert "40 % of the weights" in again and "25 % of the weights" not in again
    assert again.count("hf_compress: begin") == 1
    # A card of somebody's own stays in front of our section.
    hub.edit("me/own", {"README.md": "---\nlicense: other\n---\n\nAll mine.\n"})
    model.push_to_hub("me/own")
    own = hub.text("me/own", "README.md")
    assert "\nAll mine.\n" in own and "40 %" not in own and metadata(own)["license"] == "other"
    assert own.index("All mine.") < own.index("hf_compress: begin")


def test_the_card_of_a_branch_is_that_branch_s(hub: HubServer, base: str) -> None:
    model = from_base(base)
    model.push_to_hub("me/x", revision="small")
    edited = hub.text("me/x", "README.md", "small") + "\nOnly here.\n"
    hub.edit("me/x", {"README.md": edited}, "small")
    model.push_to_hub("me/x", revision="small")
    assert hub.text("me/x", "README.md", "small").endswith("\nOnly here.\n")


def test_edits_in_folder_and_repository(hub: HubServer, base: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    from_base(base).save_pretrained(folder)
    push_folder(folder, "me/x")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nHere one.\n")
    push_folder(folder, "me/x")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nHere two.\n")
    push_folder(folder, "me/x")
    assert hub.text("me/x", "README.md").endswith("\nHere one.\n\nHere two.\n"), "the folder goes on"
    hub.edit("me/x", {"README.md": hub.text("me/x", "README.md") + "\nThere.\n"})
    push_folder(folder, "me/x")
    assert (folder / "README.md").read_text().endswith("\nThere.\n"), "the repository goes on"
    hub.edit("me/x", {"README.md": hub.text("me/x", "README.md") + "\nThere again.\n"})
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nHere again.\n")
    with pytest.warns(UserWarning, match="edited here and in the repository"):
        push_folder(folder, "me/x")
    assert hub.text("me/x", "README.md").endswith("\nThere again.\n")


def test_a_push_that_is_cut(hub: HubServer, base: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    model = from_base(base)
    hub.cuts = 100
    with pytest.raises(UploadError, match=r"folder 'x' is whole.*hf-compress push x me/x") as caught:
        model.save_pretrained(folder, push_to_hub=True, repo_id="me/x", max_shard_size="20KB")
    assert caught.value.__cause__ is not None
    assert set(hub.files("me/x")) == {".gitattributes"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    hub.cuts = 0
    arrived = set(hub.blobs)
    push_folder(folder, "me/x")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x")), logits(model))
    assert {path for method, path in hub.log if method == "PUT"}.isdisjoint(
        f"/__lfs/{name}" for name in arrived - {entry.sha256 for entry in hub.files("me/x").values()}
    )


def test_one_cut_is_repeated_by_the_client(hub: HubServer, base: str) -> None:
    hub.cuts = 1
    from_base(base).push_to_hub("me/x")
    assert "model.safetensors" in hub.files("me/x")
    assert sum(method == "PUT" for method, _ in hub.log) == 2


def test_a_failed_push_to_hub_leaves_the_model_as_it_was(hub: HubServer, base: str) -> None:
    model = from_base(base)
    before, name = logits(model), model.name_or_path
    hub.broken_commits = 100
    with pytest.raises(UploadError, match=r"model in memory is as it was.*the same call"):
        model.push_to_hub("me/x")
    assert model.name_or_path == model.config.name_or_path == name
    hub.broken_commits = 0
    model.push_to_hub("me/x")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x")), before)


@pytest.mark.parametrize(("token", "repo_id"), [("hf_wrong", "me/x"), ("hf_guest", "me/x"), (False, "me/x")])
def test_refusals(token: Any, repo_id: str, hub: HubServer, base: str, tmp_path: Path) -> None:
    from_base(base).save_pretrained(tmp_path / "x")
    with pytest.raises(UploadError, match="me/x"):
        push_folder(tmp_path / "x", repo_id, token=token)
    assert repo_id not in hub.repositories
    with pytest.raises(hf_compress.ConfigurationError, match=r"no config\.json"):
        push_folder(tmp_path, repo_id)
    make_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(hf_compress.ConfigurationError, match="holds no model that hf_compress has compressed"):
        push_folder(tmp_path / "dense", repo_id)


def test_xet(hub: HubServer, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    model = from_base(base)
    model.push_to_hub("me/x")
    weights = hub.files("me/x")["model.safetensors"]
    assert weights.sha256 not in hub.blobs and hub.xet_hash(weights.sha256)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/x")), logits(model))


def test_measured_figures_go_along(hub: HubServer, base: str) -> None:
    measured = {"dense": {"parameters": 2, "size": {"weights": 9}}, "small": {"parameters": 1, "size": {"weights": 4}}}
    from_base(base).push_to_hub("me/x", evaluation=measured, evaluation_data="a text")
    assert "| bytes on disk (weights) | 9 | 4 | -55.6% |" in hub.text("me/x", "README.md")
    assert json.loads(hub.text("me/x", "evaluation.json"))["data"] == "a text"


def test_models_that_are_not_ours_go_as_ever(hub: HubServer) -> None:
    model = make_model("llama")
    model.push_to_hub("me/dense")
    assert set(hub.files("me/dense")) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert "hf_compress" not in hub.text("me/dense", "README.md")


def test_an_image_processor_goes_along(hub: HubServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    dense = ViTForImageClassification(
        ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4, num_labels=3)
    )
    dense.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit")
    hf_compress.compress(model, hf_compress.CodebookConfig(bits=3, learning="none", rows_per_codebook=8))
    model.push_to_hub("me/vit")
    assert "preprocessor_config.json" in hub.files("me/vit")
    card = hub.text("me/vit", "README.md")
    assert metadata(card)["pipeline_tag"] == "image-classification"
    assert "No calibration data were used" in card


def rows() -> list[dict[str, torch.Tensor]]:
    ids = calibration().dataset[:4]
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model: PreTrainedModel, folder: Path, tokenizer: Any = None, **fields: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=2, use_cpu=True, disable_tqdm=True, report_to=[], **{"save_strategy": "no", **fields}
    )
    return Trainer(model, arguments, train_dataset=rows(), processing_class=tokenizer)


def test_the_trainer_pushes(hub: HubServer, base: str, tmp_path: Path) -> None:
    trainer = trainer_of(from_base(base), tmp_path / "out", hub_model_id="me/tuned", hub_token="hf_owner")
    trainer.train()
    trainer.push_to_hub()
    assert set(hub.files("me/tuned")) >= (CONTENT | TOKENIZER)
    card = hub.text("me/tuned", "README.md")
    assert "## Training\n" in card and "learning_rate" in card and "Modular decomposition" in card
    assert "More information needed" not in card and card.count("hf_compress: begin") == 1
    assert metadata(card)["base_model_relation"] == "finetune"
    assert "A training was part of it" in card
    hub.edit("me/tuned", {"README.md": card + "\nMine.\n"})
    trainer.push_to_hub()
    again = hub.text("me/tuned", "README.md")
    assert again.endswith("\nMine.\n") and again.count("## Training\n") == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tuned")), logits(trainer.model.eval()))
    hub.broken_commits = 100
    trainer.model.lm_head.weight.data.add_(1)
    with pytest.raises(UploadError, match=r"folder 'out' is whole"):
        trainer.push_to_hub()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_hub_strategies_upload_whole_folders(strategy: str, hub: HubServer, base: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        from_base(base),
        tmp_path / "out",
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_model_id="me/steps",
        hub_token="hf_owner",
        hub_always_push=True,
    )
    trainer.train()
    trainer._finish_current_push()
    there = set(hub.files("me/steps"))
    assert there >= CONTENT
    assert "hf_compress_shim.AutoModelForCausalLM" in hub.text("me/steps", "config.json")
    assert "Modular decomposition" in hub.text("me/steps", "README.md")
    if strategy == "checkpoint":
        assert {f"last-checkpoint/{name}" for name in CONTENT - {".gitattributes"}} <= there
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/steps")), logits(trainer.model.eval()))


def test_a_trainer_of_a_model_that_is_not_ours(hub: HubServer, tmp_path: Path) -> None:
    trainer = trainer_of(make_model("llama"), tmp_path / "out", hub_model_id="me/dense", hub_token="hf_owner")
    trainer.push_to_hub()
    assert "hf_compress" not in hub.text("me/dense", "README.md")


def test_the_command(hub: HubServer, base: str, tmp_path: Path) -> None:
    from_base(base).save_pretrained(tmp_path / "x")
    result = CliRunner().invoke(app, ["push", str(tmp_path / "x"), "me/x", "--private", "--no-figures"])
    assert result.exit_code == 0, result.output
    assert set(hub.files("me/x")) == (CONTENT | TOKENIZER) - {"compression.svg"}
    assert hub.repositories["me/x"].private
    hub.broken_commits = 100
    failed = CliRunner().invoke(app, ["push", str(tmp_path / "x"), "me/y"])
    assert failed.exit_code == 2 and "is whole" in failed.output
    assert not re.search("Traceback", failed.output)


def test_the_license_of_a_push_from_the_shell(hub: HubServer, base: str, tmp_path: Path) -> None:
    from_base(base).save_pretrained(tmp_path / "out")
    pushed = CliRunner().invoke(app, ["push", str(tmp_path / "out"), "me/licensed", "--license", "mit"])
    assert pushed.exit_code == 0, pushed.output
    assert "license: mit" in hub.text("me/licensed", "README.md")
    refused = CliRunner().invoke(app, ["push", str(tmp_path / "out"), "me/no", "--base", str(tmp_path)])
    assert refused.exit_code != 0 and "holds no README.md" in refused.output.replace("\n", " ")
