"""Pruning inside a training: plain loops, the Trainer, resuming, best models, mixed precision, several processes."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import IDS, calibration, logits, make_model, token_ids
from test_pruning import classifier, layers, pruned, sparsity
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import hf_compress
from hf_compress import Pruner, PruningCallback, PruningConfig
from hf_compress.methods.pruning.masks import mask_of, masked_modules
from hf_compress.resized import ResizedLinear

CUBIC: dict[str, Any] = {"schedule": "cubic", "start_step": 2, "end_step": 8, "update_interval": 2}


def config(**fields: Any) -> PruningConfig:
    return PruningConfig(**{"sparsity": 0.9, "criterion": "sensitivity", **CUBIC, **fields})


def trainer(model: Any, directory: Path, callbacks: list[Any], steps: int = 10, **arguments: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in token_ids(16, 16)]
    options = {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=callbacks,
    )


def zeros(model: Any) -> dict[str, torch.Tensor]:
    return {path: layer.mask() for path, layer in layers(model).items()}


@pytest.mark.parametrize(
    "criterion",
    ["sensitivity", "movement", "delta", "magnitude", "random", "snip", "snip_magnitude", "gradient"],
)
def test_a_plain_loop(criterion: str, tmp_path: Path) -> None:
    model = make_model("llama").train()
    pruner = Pruner(model, config(criterion=criterion), total_steps=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    reached = []
    for step in range(1, 13):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        pruner.update(step)
        optimizer.zero_grad()
        reached.append(pruner.sparsity)
        if step >= 8:
            assert pruner.finished
            for module in masked_modules(model).values():
                assert not module.weight[~mask_of(module)].any()
    assert reached[1] == 0
    assert reached == sorted(reached)
    assert reached[7] == reached[-1] == pytest.approx(0.9, abs=1e-4)
    pruner.finalize()
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)
    assert not masked_modules(model)
    assert not any("pruning" in name for name in model.state_dict())
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.compression_report.notes["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert again.config.quantization_config.recipe["stages"][0]["criterion"] == criterion


def test_finalizing_too_early_is_refused() -> None:
    pruner = Pruner(make_model("llama"), config())
    with pytest.raises(hf_compress.ConfigurationError, match="not come to its end"):
        pruner.finalize()


def test_the_running_mean_is_of_weight_times_gradient() -> None:
    model = make_model("llama").train()
    pruner = Pruner(model, config(decay=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    layer, expected = model.model.layers[1].mlp.up_proj, torch.zeros(64, 48)
    for step in (1, 2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        expected = 0.5 * expected + 0.5 * (layer.weight * layer.weight.grad).abs().detach()
        pruner.update(step)
        optimizer.zero_grad()
    torch.testing.assert_close(layer.pruning_score, expected)


def test_what_was_pruned_may_grow_again_until_the_end() -> None:
    model = make_model("llama").train()
    pruner = Pruner(model, config(criterion="magnitude", sparsity=0.3, start_step=1, end_step=9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    layer = model.model.layers[0].mlp.up_proj

    def step(number: int) -> torch.Tensor:
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        pruner.update(number)
        optimizer.zero_grad()
        return layer.pruning_mask.clone()

    step(1), step(2)
    gone = ~step(3)
    row, column = gone.nonzero()[0].tolist()
    with torch.no_grad():
        layer.weight[row, column] = 100.0
    step(4)
    assert step(5)[row, column]
    for number in range(6, 10):
        mask = step(number)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    assert torch.equal(step(10), mask)
    assert not layer.weight[~mask].any()


@pytest.mark.parametrize("criterion", ["delta", "movement"])
def test_what_was_pruned_is_judged_by_its_value_and_comes_back_with_it(criterion: str) -> None:
    """Against a loop that keeps the values beside the zeros."""
    model = make_model("llama").train()
    pruner = Pruner(
        model, config(criterion=criterion, sparsity=0.6, scope="layer", start_step=1, end_step=15, update_interval=3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = model.model.layers[1].mlp.up_proj
    start = layer.weight.detach().clone()
    values, moved, kept = start.clone(), torch.zeros_like(start), torch.ones_like(start, dtype=torch.bool)
    returned = 0
    for number in range(1, 16):
        # Other tokens every time, so that the ranking changes.
        ids = IDS.roll(number, dims=1).add(number) % model.config.vocab_size
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        values = torch.where(kept, layer.weight.detach(), values)
        moved -= values * layer.weight.grad
        pruner.update(number)
        optimizer.zero_grad()
        before, kept = kept, layer.pruning_mask.clone()
        if not torch.equal(before, kept):
            scores = moved if criterion == "movement" else (values - start).abs()
            assert scores[kept].min() >= scores[~kept].max()
            torch.testing.assert_close(layer.weight[kept], values[kept])
            assert not layer.weight[~kept].any()
            returned += int((kept & ~before).sum())
    assert returned > 0
    assert float(kept.float().mean()) == pytest.approx(0.4, abs=1e-3)


def test_trainer_prunes_and_saves(tmp_path: Path) -> None:
    model = make_model("llama")
    run = trainer(model, tmp_path, [PruningCallback(config(start_step=0.1, end_step=0.8))])
    run.train()
    assert run.model is model
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)
    found = [entry["pruning_sparsity"] for entry in run.state.log_history if "pruning_sparsity" in entry]
    assert found[0] == 0
    assert found[-1] == pytest.approx(0.9, abs=1e-4)
    assert any(entry.get("pruning_clipped") is True for entry in run.state.log_history)
    run.save_model(str(tmp_path / "out"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model.eval()))
    assert torch.isfinite(torch.tensor(run.evaluate()["eval_loss"]))


def test_the_zeros_of_a_call_are_kept_in_a_training(tmp_path: Path) -> None:
    model = pruned(criterion="snip_magnitude", calibration=calibration())
    masks = zeros(model)
    model.save_pretrained(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    run = trainer(model, tmp_path, [PruningCallback()], weight_decay=0.1)
    assert not layers(model)  # dense with masks, before the optimizer is made
    assert not hasattr(model.config, "quantization_config")
    run.train()
    assert all(torch.equal(layer.mask(), masks[path]) for path, layer in layers(model).items())
    assert len(layers(model)) == len(masks)
    assert not torch.equal(logits(model.eval()), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")))
    model.save_pretrained(tmp_path / "out")
    recipe = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config.recipe
    assert [stage["criterion"] for stage in recipe["stages"]] == ["snip_magnitude"]


def test_matrices_left_out_of_a_second_pruning_keep_their_zeros(tmp_path: Path) -> None:
    model = pruned(sparsity=0.5)
    masks = zeros(model)
    again = copy.deepcopy(model)
    trainer(model, tmp_path, [PruningCallback(config(modules_to_not_convert=["mlp"]))]).train()
    hf_compress.compress(again, PruningConfig(sparsity=0.9, criterion="random", modules_to_not_convert=["mlp"]))
    for one in (model, again):
        assert layers(one).keys() == masks.keys()
        assert all(torch.equal(layer.mask(), masks[path]) for path, layer in layers(one).items() if "mlp" in path)
        assert not any("pruning" in name for name in one.state_dict())
    for recipe in (PruningConfig(sparsity=0.6, criterion="magnitude", structured=True),):
        with pytest.raises(hf_compress.ConfigurationError, match="single weights are pruned already"):
            hf_compress.compress(again, recipe)
        with pytest.raises(hf_compress.ConfigurationError, match="single weights are pruned already"):
            Pruner(again, recipe)


@pytest.mark.parametrize("values", ["int8", "float32", "bfloat16"])
def test_values_stay_stored_as_they_were(values: str, tmp_path: Path) -> None:
    model = pruned(values=values)
    trainer(model, tmp_path, [PruningCallback()], steps=2).train()
    assert {layer.format.values for layer in layers(model).values()} == {values}


def test_a_criterion_that_has_seen_nothing_does_not_choose(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for parameter in kwargs["model"].parameters():
                parameter.grad.fill_(float("nan"))

    model = make_model("llama")
    run = trainer(model, tmp_path, [Poison(), PruningCallback(config())], learning_rate=0.0)
    with pytest.warns(UserWarning, match="ended before the pruning schedule"):
        run.train()
    assert not layers(model)


def test_a_model_is_finalized_once_and_says_what_it_has_seen(tmp_path: Path) -> None:
    model = make_model("llama")
    callback = PruningCallback(PruningConfig(sparsity=0.9, criterion="snip_magnitude"))
    dense_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    run = trainer(model, tmp_path, [callback], steps=3)
    run.train()
    assert any(entry.get("pruning_score_ratio", 0) > 0 for entry in run.state.log_history)
    report = model.compression_report
    assert report.notes["skipped_steps"] == 0
    assert report.notes["sensitivity_to_magnitude"] > 0
    assert report.bytes_before == dense_bytes
    for call in (callback.finalize, lambda: callback.pruner.update(4)):
        with pytest.raises(hf_compress.ConfigurationError, match="finalized already"):
            call()


def test_a_reporter_behind_the_callback_sees_the_sparsity(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer(make_model("llama"), tmp_path, [PruningCallback(config()), Reporter()]).train()
    assert [entry["pruning_sparsity"] for entry in seen][-1] == pytest.approx(0.9, abs=1e-4)


def test_saving_masks_outside_a_training_warns(tmp_path: Path) -> None:
    run = trainer(pruned(), tmp_path, [PruningCallback()])
    with pytest.warns(UserWarning, match="saved dense"):
        run.save_model(str(tmp_path / "out"))


def test_frozen_matrices_are_held_and_new_models_refused(tmp_path: Path) -> None:
    model = pruned()
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    trainer(model, tmp_path, [PruningCallback()], steps=2).train()
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)
    frozen = make_model("llama")
    frozen.model.layers.requires_grad_(False)
    with pytest.raises(hf_compress.ConfigurationError, match="blocks are frozen"):
        trainer(frozen, tmp_path, [PruningCallback(config())]).train()
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 16)]
    run = Trainer(
        model_init=lambda: make_model("llama"),
        args=arguments,
        train_dataset=rows,
        callbacks=[PruningCallback(config())],
    )
    with pytest.raises(hf_compress.ConfigurationError, match="model_init"):
        run.train()


def test_the_best_model_is_never_from_before_the_schedules_end(tmp_path: Path) -> None:
    model = make_model("llama")
    arguments: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "learning_rate": 1e-5,
    }
    callbacks = [EarlyStoppingCallback(early_stopping_patience=1), PruningCallback(config())]
    run = trainer(model, tmp_path, callbacks, steps=14, **arguments)
    run.train()
    # Pruning makes it worse at first, so that the densest would win, and stopping early would cut the schedule short.
    assert run.state.best_global_step >= 8
    assert run.state.global_step > 8
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)


def test_accumulated_gradients_are_the_large_batchs(tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = make_model("llama")
        run = trainer(
            model,
            tmp_path,
            [PruningCallback(config())],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        found.append(zeros(model))
    agreement = [(found[0][path] == mask).float().mean() for path, mask in found[1].items()]
    assert min(agreement) > 0.99


def test_bf16_autocast(tmp_path: Path) -> None:
    model = make_model("llama")
    trainer(model, tmp_path, [PruningCallback(config())], bf16=True).train()
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("at", [(4, 5), (8, 9)])
@pytest.mark.parametrize("criterion", ["sensitivity", "movement", "snip", "magnitude", "delta", "random"])
def test_nan_gradients_are_skipped_and_counted(criterion: Any, at: tuple[int, int], tmp_path: Path) -> None:
    """In the schedule, at its last step and after it; clipping makes one NaN a NaN everywhere."""

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 in at:
                for parameter in kwargs["model"].parameters():
                    parameter.grad.fill_(float("nan"))

    model = make_model("llama")
    run = trainer(model, tmp_path, [Poison(), PruningCallback(config(criterion=criterion))], steps=11)
    run.train()
    counted = [e["pruning_skipped_steps"] for e in run.state.log_history if "pruning_skipped_steps" in e]
    assert counted[-1] == 2 and model.compression_report.notes["skipped_steps"] == 2
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert torch.isfinite(logits(model)).all()


def test_a_nan_reaches_nothing_that_the_optimizer_holds() -> None:
    """Such as the projections of a distillation, outside the model."""
    model, outside = make_model("llama"), torch.nn.Parameter(torch.ones(3))
    pruner = Pruner(model, config())
    optimizer = torch.optim.AdamW([*model.parameters(), outside])
    model(IDS, labels=IDS).loss.backward()
    outside.grad = torch.full((3,), float("nan"))
    assert not pruner.before_step(1, parameters=[outside])
    optimizer.step()
    pruner.update(1)
    assert torch.equal(outside, torch.ones(3)) and pruner.skipped_steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_leaves_out_reaches_no_score(fused: bool) -> None:
    """Fused optimizers unscale within their step, so one that is left out keeps gradients that are a thousandfold."""

    def masks(scaler: Any) -> dict[str, torch.Tensor]:
        model = make_model("llama").train()
        pruner = Pruner(model, config())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        for step in range(1, 10):
            scaler.scale(model(IDS, labels=IDS).loss).backward()
            if step == 3:
                model.lm_head.weight.grad[0, 0] = float("inf")
            assert pruner.before_step(step, drop_non_finite=not scaler.is_enabled()) == (step != 3)
            scaler.step(optimizer)
            pruner.update(step)
            scaler.update()
            optimizer.zero_grad()
        assert pruner.skipped_steps == 1 and all(weight.isfinite().all() for weight in model.parameters())
        return {path: mask_of(module).clone() for path, module in pruner.modules.items()}

    scaled = masks(torch.amp.GradScaler("cpu", init_scale=1024.0))
    plain = masks(torch.amp.GradScaler("cpu", enabled=False))
    assert all(torch.equal(mask, plain[path]) for path, mask in scaled.items())


def test_a_step_is_judged_by_its_own_gradients() -> None:
    """Not by those of the last try with its number, nor beside a scaler by those that the optimizer does not hold."""
    model = make_model("llama").train()
    held = [p for p in model.parameters() if p is not model.get_input_embeddings().weight]
    pruner = Pruner(model, config(warmup_steps=1))
    model(IDS, labels=IDS).loss.backward()
    good = {parameter: parameter.grad.clone() for parameter in held}
    model.get_input_embeddings().weight.grad.fill_(float("inf"))
    assert pruner.before_step(1, parameters=held, drop_non_finite=False)
    assert model.lm_head.weight.grad is not None and model.model.norm.weight.grad is None
    held[3].grad = torch.full_like(held[3], float("inf"))
    assert not pruner.before_step(2, parameters=held, drop_non_finite=False)
    for parameter, gradient in good.items():
        parameter.grad = gradient
    assert pruner.before_step(2, parameters=held, drop_non_finite=False)
    model.lm_head.weight.grad[0, 0] = float("inf")
    assert not pruner.before_step(1, drop_non_finite=False)
    assert model.lm_head.weight.grad is not None and model.model.norm.weight.grad is None  # held back all the same


def test_a_training_that_has_diverged_is_not_finalized() -> None:
    model = make_model("llama")
    pruner = Pruner(model, config(criterion="random"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(1, 10):
        model(IDS, labels=IDS).loss.backward()
        if step == 9:
            model.get_submodule(next(iter(pruner.modules))).weight.grad.fill_(float("nan"))
        optimizer.step()  # without before_step
        pruner.update(step)
        optimizer.zero_grad()
    with pytest.raises(hf_compress.NumericalError, match=r"q_proj' has weights that are NaN"):
        pruner.finalize()


def test_a_warm_up_in_a_loop_trains_the_head_alone() -> None:
    model = classifier()
    recipe = PruningConfig(sparsity=0.8, criterion="snip", warmup_steps=2)
    pruner = Pruner(model, recipe, total_steps=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [parameter.detach().clone() for parameter in model.base_model.parameters()]
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def step(number: int, prepare: bool = True) -> None:
        model(pixel_values=images, labels=torch.arange(8)).loss.backward()
        if prepare:
            assert pruner.before_step(number)
        optimizer.step()
        pruner.update(number)
        optimizer.zero_grad()

    step(1)
    step(2)
    assert all(torch.equal(a, b) for a, b in zip(model.base_model.parameters(), before, strict=True))
    step(3)
    assert sparsity(pruner.finalize()) == pytest.approx(0.8, abs=1e-4)
    model = classifier()
    pruner, optimizer = Pruner(model, recipe, total_steps=4), torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(hf_compress.ConfigurationError, match="before_step"):
        step(1, prepare=False)


def test_a_layer_that_a_step_leaves_out_has_no_gradient_in_it() -> None:
    model = make_model("llama")
    pruner, optimizer = Pruner(model, config()), torch.optim.SGD(model.parameters(), lr=1e-3)
    left_out = next(iter(pruner.modules))
    for step in range(1, 10):
        model(IDS, labels=IDS).loss.backward()
        if step % 2:
            model.get_submodule(left_out).weight.grad = None
        pruner.before_step(step)
        optimizer.step()
        pruner.update(step)
        optimizer.zero_grad()
    assert sparsity(pruner.finalize()) == pytest.approx(0.9, abs=1e-4)


def test_the_head_is_trained_first(tmp_path: Path) -> None:
    model = classifier()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": label % 10} for label, image in enumerate(images)]
    seen: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            body = kwargs["model"].base_model.named_parameters(prefix="vit")
            seen.append(all(torch.equal(before[name], p) for name, p in body if name in before))
            assert not torch.equal(kwargs["model"].classifier.weight, before["classifier.weight"])

    recipe = PruningConfig(sparsity=0.8, criterion="snip_magnitude", warmup_steps=3)
    run = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=rows,
        callbacks=[Watch(), PruningCallback(recipe)],
    )
    run.train()
    assert seen[:3] == [True] * 3
    assert not any(seen[3:])
    assert sparsity(model) == pytest.approx(0.8, abs=1e-4)


def test_structured_shrinks_at_the_end(tmp_path: Path) -> None:
    model = make_model("llama")
    run = trainer(model, tmp_path, [PruningCallback(config(sparsity=0.4, structured=True))])
    masked: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            masked.append(logits(kwargs["model"].eval()))

    run.callback_handler.callbacks.insert(0, Watch())
    run.train()
    assert any(isinstance(module, ResizedLinear) for module in model.modules())
    torch.testing.assert_close(logits(model.eval()), masked[0], rtol=1e-4, atol=1e-4)
    assert 0.3 < model.compression_report.block_linear_reduction < 0.5
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_pruning_on_top_of_a_pruned_model(tmp_path: Path) -> None:
    model = pruned(sparsity=0.5)
    masks = zeros(model)
    trainer(model, tmp_path, [PruningCallback(config())]).train()
    assert sparsity(model) == pytest.approx(0.9, abs=1e-4)
    assert all(not (layer.mask() & ~masks[path]).any() for path, layer in layers(model).items())


def test_a_training_that_ends_too_early_stays_dense(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    model = make_model("llama")
    run = trainer(model, tmp_path, [PruningCallback(config()), Stop()])
    with pytest.warns(UserWarning, match="ended before the pruning schedule"):
        run.train()
    assert not layers(model)
    assert masked_modules(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"end_step": 20}, "ends at step 20, and the training has 10 steps"),
        ({"criterion": "movement", "schedule": "single_shot", "end_step": None, "start_step": 0}, "knows nothing"),
        ({"criterion": "wanda", "schedule": "single_shot", "end_step": None, "scope": "row"}, "not trained"),
        ({"base_model": "x", "criterion": "delta"}, "no effect in a training"),
        ({"warmup_steps": 2, "start_step": 3}, "OPTForCausalLM has no head of its own"),  # it is the embedding
    ],
)
def test_recipes_that_no_training_can_carry_out(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        trainer(make_model("opt"), tmp_path, [PruningCallback(config(**fields))]).train()


def test_there_is_nothing_to_hold_without_sparse_layers(tmp_path: Path) -> None:
    model = pruned(make_model("llama"), sparsity=0.4, structured=True)
    with pytest.raises(hf_compress.ConfigurationError, match="no pruned matrices whose zeros could be kept"):
        trainer(model, tmp_path, [PruningCallback()])


def test_weights_that_are_spread_after_the_pruner_was_made_are_refused() -> None:
    model = make_model("llama")
    pruner = Pruner(model, config())
    layer = model.get_submodule(next(iter(pruner.modules)))
    layer.weight = torch.nn.Parameter(torch.empty(0))  # as FSDP leaves it on another process
    with pytest.raises(hf_compress.UnsupportedModelError, match="not whole on this process"):
        pruner.update(1)


def test_models_that_cannot_be_pruned(tmp_path: Path, unchecked_types: None) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match="no pruned matrices"):
        trainer(make_model("llama"), tmp_path, [PruningCallback()])
    everything = config(modules_to_not_convert=["layers"])
    with pytest.raises(hf_compress.ConfigurationError, match="no matrix that could be pruned"):
        trainer(make_model("llama"), tmp_path, [PruningCallback(everything)])
    sparse = pruned()
    sparse.save_pretrained(tmp_path / "sparse")
    adapted = peft.get_peft_model(sparse, peft.LoraConfig(target_modules="all-linear", r=2))
    with pytest.raises(hf_compress.ConfigurationError, match="PEFT adapter"):
        trainer(adapted, tmp_path, [PruningCallback()])
    coded = hf_compress.compress(make_model("llama"), hf_compress.CodebookConfig(bits=3, learning="none"))
    with pytest.raises(hf_compress.ConfigurationError, match="cannot be pruned"):
        trainer(coded, tmp_path, [PruningCallback(config())])
    with pytest.raises(hf_compress.ConfigurationError, match="PruningConfig"):
        PruningCallback({"sparsity": 0.5})  # type: ignore[arg-type]


def test_an_optimizer_from_before_and_a_callback_from_after(tmp_path: Path) -> None:
    model = pruned()
    optimizer = torch.optim.AdamW(model.parameters())
    run = trainer(model, tmp_path, [])
    run.add_callback(PruningCallback())
    with pytest.raises(hf_compress.ConfigurationError, match="among the `callbacks`"):
        run.train()
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 16)]
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True)
    late = Trainer(
        model=copy.deepcopy(model),
        args=arguments,
        train_dataset=rows,
        callbacks=[PruningCallback()],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )
    with pytest.raises(hf_compress.ConfigurationError, match="optimizer does not hold"):
        late.train()


SCRIPT = """
import os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from accelerate import Accelerator
from conftest import make_model, token_ids
from hf_compress import Pruner, PruningConfig
import hf_compress

accelerator = Accelerator(cpu=True)
model = make_model("llama").train()
options = dict(schedule="cubic", start_step=1, end_step=6, update_interval=2)
config = PruningConfig(sparsity=0.9, criterion=sys.argv[1], **options)
pruner = Pruner(model, config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
wrapped, optimizer = accelerator.prepare(model, optimizer)
ids = token_ids(16, 16)[accelerator.process_index :: accelerator.num_processes]
for step in range(1, 9):
    accelerator.backward(wrapped(ids, labels=ids).loss)
    optimizer.step()
    pruner.update(step)
    optimizer.zero_grad()
pruner.finalize()
layers = [layer for layer in model.modules() if hasattr(layer, "mask")]
digest = sum(layer.mask().nonzero().double().pow(2).sum().item() for layer in layers)
print(f"RANK {{accelerator.process_index}} MASK {{digest!r}} SPARSITY {{pruner.config.sparsity}}", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("criterion", ["sensitivity", "snip_magnitude"])
def test_two_processes_have_the_same_masks(criterion: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    port = 21000 + os.getpid() % 20000
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, str(script), criterion], capture_output=True, text=True, timeout=240, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    digests = re.findall(r"MASK (\S+) ", result.stdout)  # wherever they stand: the processes share a stream
    assert len(digests) == 2
    assert digests[0] == digests[1]
