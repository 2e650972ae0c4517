"""Resuming a pruning: from the Trainer's checkpoints and strict loads, on new models and on interrupted ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IDS, logits, make_model
from safetensors.torch import load_file
from test_pruning import layers, pruned, sparsity
from test_pruning_training import config, trainer, zeros
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback

import hf_compress
from hf_compress import Pruner, PruningCallback, PruningConfig
from hf_compress.layout import layout_of
from hf_compress.saved_names import accept_saved_names


@pytest.mark.parametrize("at", [4, 8])
@pytest.mark.parametrize("criterion", ["sensitivity", "movement", "delta"])
def test_resuming_brings_back_masks_schedule_and_scores(criterion: str, at: int, tmp_path: Path) -> None:
    fields = {"criterion": criterion}
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": at}
    whole = make_model("llama")
    trainer(whole, tmp_path, [PruningCallback(config(**fields))], **arguments).train()
    resumed = make_model("llama")
    checkpoint = tmp_path / f"checkpoint-{at}"
    run = trainer(resumed, tmp_path / "again", [PruningCallback(config(**fields))], **arguments)
    run.train(resume_from_checkpoint=str(checkpoint))
    for path, layer in layers(whole).items():
        assert torch.equal(layers(resumed)[path].mask(), layer.mask())
    torch.testing.assert_close(logits(resumed.eval()), logits(whole.eval()), rtol=1e-4, atol=1e-4)
    # A checkpoint in between loads as the dense model that it is.
    assert not layout_of(AutoModelForCausalLM.from_pretrained(checkpoint))


@pytest.mark.parametrize("at", [4, 8, 10])
def test_structured_pruning_resumes(at: int, tmp_path: Path) -> None:
    fields = {"sparsity": 0.4, "structured": True}
    whole = make_model("llama")
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": at}
    trainer(whole, tmp_path, [PruningCallback(config(**fields))], **arguments).train()
    resumed = make_model("llama")
    run = trainer(resumed, tmp_path / "again", [PruningCallback(config(**fields))], **arguments)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    torch.testing.assert_close(logits(resumed.eval()), logits(whole.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [3, 4])
def test_a_single_shot_after_the_warm_up_resumes(at: int, tmp_path: Path) -> None:
    recipe = PruningConfig(sparsity=0.8, criterion="snip", warmup_steps=3)
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": at, "steps": 6}
    whole = make_model("llama")
    trainer(whole, tmp_path, [PruningCallback(recipe)], **arguments).train()
    resumed = make_model("llama")
    run = trainer(resumed, tmp_path / "again", [PruningCallback(recipe)], **arguments)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert sparsity(resumed) == pytest.approx(0.8, abs=1e-4)
    assert all(torch.equal(layer.mask(), zeros(whole)[path]) for path, layer in layers(resumed).items())


def test_checkpoints_of_other_trainings_are_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8}
    trainer(make_model("llama"), tmp_path / "plain", [], **arguments).train()
    run = trainer(make_model("llama"), tmp_path, [PruningCallback(config())], **arguments)
    with pytest.raises(hf_compress.ConfigurationError, match="holds no masks"):
        run.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-8"))
    trainer(make_model("llama"), tmp_path / "half", [PruningCallback(config(sparsity=0.5))], **arguments).train()
    run = trainer(make_model("llama"), tmp_path, [PruningCallback(config())], **arguments)
    with pytest.raises(hf_compress.ConfigurationError, match=r"sparsity of 0\.5, and this one goes to 0\.9"):
        run.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-8"))

    run = trainer(
        make_model("llama"), tmp_path, [PruningCallback(config(sparsity=0.5, criterion="delta"))], **arguments
    )
    with pytest.raises(hf_compress.ConfigurationError, match="another recipe"):
        run.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-8"))
    for other in (
        {"scope": "layer"},
        {"structured": True},
        {"end_step": 7},
        {"modules_to_not_convert": ["down_proj"]},
    ):
        run = trainer(make_model("llama"), tmp_path, [PruningCallback(config(sparsity=0.5, **other))], **arguments)
        with pytest.raises(hf_compress.ConfigurationError, match="another recipe"):
            run.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-8"))


def test_what_an_unfinished_training_gathered_is_left_out_of_the_next() -> None:
    model = make_model("llama").train()
    pruner = Pruner(model, config(criterion="movement"))
    model(IDS, labels=IDS).loss.backward()
    pruner.update(1)
    assert any("pruning_value" in name for name in model.state_dict())
    Pruner(model, config(criterion="magnitude"))
    assert not any("pruning_value" in name or "pruning_score" in name for name in model.state_dict())


def loop(model: Any, pruner: Pruner, optimizer: Any, steps: range) -> None:
    for step in steps:
        batch = IDS.roll(step, dims=1)
        model(batch, labels=batch).loss.backward()
        pruner.before_step(step)
        optimizer.step()
        pruner.update(step)
        optimizer.zero_grad()


@pytest.mark.parametrize("at", [5, 9])
@pytest.mark.parametrize("criterion", ["sensitivity", "movement", "delta", "magnitude"])
def test_a_strict_load_resumes_before_and_after_the_end(criterion: Any, at: int) -> None:
    def begin() -> tuple[Any, Pruner, torch.optim.Optimizer]:
        model = make_model("llama").train()
        return model, Pruner(model, config(criterion=criterion)), torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, pruner, optimizer = begin()
    loop(model, pruner, optimizer, range(1, at + 1))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    loop(model, pruner, optimizer, range(at + 1, 12))
    again, second, other = begin()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.resume(at)
    loop(again, second, other, range(at + 1, 12))
    assert torch.equal(logits(second.finalize()), logits(pruner.finalize()))


@pytest.mark.parametrize("criterion", ["sensitivity", "movement", "delta", "magnitude"])
def test_the_same_model_resumes_after_an_interruption(criterion: Any, tmp_path: Path) -> None:
    """What the interrupted training had pruned later than its checkpoint may come back."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    recipe, saving = config(criterion=criterion), {"save_strategy": "steps", "save_steps": 4}
    whole = make_model("llama")
    trainer(whole, tmp_path / "whole", [PruningCallback(recipe)], **saving).train()
    model = make_model("llama")
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path / "cut", [PruningCallback(recipe), Interrupt()], **saving).train()
    trainer(model, tmp_path / "cut", [PruningCallback(recipe)], **saving).train(resume_from_checkpoint=True)
    assert all(torch.equal(mask, zeros(whole)[path]) for path, mask in zeros(model).items())
    assert torch.equal(logits(model), logits(whole))


def test_a_second_pruning_resumes_on_the_model_that_it_began_with(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    pruned(make_model("llama"), sparsity=0.5).save_pretrained(tmp_path / "half")

    def run(model: Any, name: str) -> Trainer:
        return trainer(model, tmp_path / name, [PruningCallback(config(criterion="delta"))], **saving)

    def half() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "half")

    whole = run(half(), "whole")
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    again = run(half(), "again")
    again.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(mask, zeros(whole.model)[path]) for path, mask in zeros(again.model).items())
    opened = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(hf_compress.ConfigurationError, match="weights were pruned before the training"):
        run(opened, "opened").train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_whose_masks_were_not_read_is_not_pruned_again(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    model = make_model("llama")
    trainer(model, tmp_path, [PruningCallback(config())], **saving).train()
    assert "has_pruning_masks" not in model.config.to_dict()
    checkpoint = tmp_path / "checkpoint-8"
    with pytest.raises(hf_compress.ConfigurationError, match="masks from_pretrained leaves out"):
        trainer(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path, [PruningCallback(config())]).train()
    recipe = PruningConfig(sparsity=0.95, criterion="magnitude")
    with pytest.raises(hf_compress.ConfigurationError, match="masks from_pretrained leaves out"):
        AutoModelForCausalLM.from_pretrained(checkpoint, compression_config=recipe)
    run = trainer(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path, [PruningCallback(config())])
    run.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(logits(run.model), logits(model))
    # Saved again it is a dense model, and its masks are no one's.
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "dense")
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", compression_config=recipe)


def test_models_that_share_a_configuration_do_not_share_masks(tmp_path: Path) -> None:
    model = make_model("llama")
    other = type(model)(model.config)
    Pruner(model, config())
    with pytest.warns(UserWarning, match="saved dense"):
        model.save_pretrained(tmp_path / "masked")
    assert "has_pruning_masks" in (tmp_path / "masked" / "config.json").read_text()
    other.save_pretrained(tmp_path / "other")
    assert "has_pruning_masks" not in (tmp_path / "other" / "config.json").read_text()
    pruned(other)


def mixtral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=96, num_attention_heads=2, num_key_value_heads=2, **sizes))


def test_matrices_that_were_cut_for_the_file_are_put_together_again(tmp_path: Path) -> None:
    """The Trainer hands the file's experts to load_state_dict, which knows them in one piece alone."""
    torch.manual_seed(0)
    whole, resumed = mixtral(), mixtral()
    run = trainer(whole, tmp_path, [PruningCallback(config())], save_strategy="steps", save_steps=4)
    run.train()
    again = trainer(resumed, tmp_path / "again", [PruningCallback(config())])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert zeros(resumed).keys() == zeros(whole).keys()
    assert all(torch.equal(mask, zeros(whole)[path]) for path, mask in zeros(resumed).items())
    torch.testing.assert_close(logits(resumed.eval()), logits(whole.eval()), rtol=1e-4, atol=1e-4)


def test_a_matrix_whose_parts_are_not_all_there_is_not_left_as_it_was(tmp_path: Path) -> None:
    model, other = mixtral(), mixtral()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    accept_saved_names(other)
    other.load_state_dict(state)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    whole = {**state, **model.state_dict()}  # under both names, and without a key that has nothing to do with it
    del whole["model.norm.weight"]
    assert other.load_state_dict(whole, strict=False).missing_keys == ["model.norm.weight"]
    for name in ("experts.1.w3.weight", "experts.0.w2.weight"):
        gone = f"model.layers.1.block_sparse_moe.{name}"
        for changed in (None, state[gone][:-1]):
            cut = {key: tensor for key, tensor in state.items() if key != gone}
            cut |= {} if changed is None else {gone: changed}
            with pytest.raises(hf_compress.CheckpointError, match=r"layers\.1.*experts.*cut for the file"):
                other.load_state_dict(cut, strict=False)


def test_a_trainer_that_has_seen_the_end_does_not_resume_from_before_it(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 9:
                raise KeyboardInterrupt

    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    run = trainer(make_model("llama"), tmp_path, [PruningCallback(config()), Interrupt()], **saving)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(hf_compress.ConfigurationError, match="Make a new Trainer"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_cast_leaves_the_counters() -> None:
    model = make_model("llama")
    pruner = Pruner(model, config(sparsity=0.123456789, end_step=900))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop(model, pruner, optimizer, range(301, 302))
    model.bfloat16()
    pruner.resume(301)
    model.float()
    loop(model, pruner, torch.optim.SGD(model.parameters(), lr=0.0), range(302, 303))
    assert all(module.pruning_score.dtype == torch.float32 for module in pruner.modules.values())
