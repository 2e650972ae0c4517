"""Pruning inside a training, for any loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy import resolve_anatomy
from ..engine.compress import attach_result, describe_run
from ..engine.report import CompressionReport
from ..engine.weights import count_weights
from ..errors import ConfigurationError, NumericalError
from ..layout import layout_of
from ..methods.pruning.configuration import PruningConfig
from ..methods.pruning.gathering import GATHERED, Gathering
from ..methods.pruning.masks import (
    BEFORE,
    apply_masks,
    attach_masks,
    has_lost_masks,
    lost_masks_error,
    mask_of,
    masked_modules,
    open_layers,
    remove_masks,
    sparse_layer,
)
from ..methods.pruning.mathematics import all_finite, cubic_sparsity
from ..methods.pruning.method import report_row
from ..methods.pruning.parts import prunable_parts
from ..methods.pruning.scores import rounded_ratio, warn_if_fresh_head
from ..methods.pruning.selection import select, sparsity_of, warn_if_undecided
from ..methods.pruning.state import TrainingState
from ..methods.pruning.structured import removable_groups
from .pruning_checks import check_head, check_recipe, check_whole, plain_model


class Pruner:
    """
    Prunes a model while it is trained, in any loop:

        pruner = Pruner(model, config, total_steps=1000)
        optimizer = torch.optim.AdamW(model.parameters())      # after the Pruner
        for step in range(1, 1001):
            loss(model).backward()
            pruner.before_step(step)                           # holds back NaN, and the body in a warm-up
            optimizer.step()
            pruner.update(step)                                # before the gradients are cleared
            optimizer.zero_grad()
        pruner.finalize()

    The modules stay dense with masks until `finalize`. Scores are taken from the gradients of the finished step, with
    the weights after it.

    Args:
        model (`PreTrainedModel`): dense, or pruned before; its sparse layers are opened.
        config (`PruningConfig`, *optional*): what to prune and when. Without it, the zeros of a pruned model are kept.
        total_steps (`int`, *optional*): optimizer steps of the whole training; needed for steps given as shares.

    Raises:
        `ConfigurationError`: nothing to prune, a criterion that is not for trainings, or steps that do not fit.
        `UnsupportedModelError`: a family without an anatomy record, or weights that are spread over processes.
    """

    def __init__(self, model: Any, config: PruningConfig | None = None, *, total_steps: int | None = None) -> None:
        model = plain_model(model)
        self.model, self.config = model, config
        self.earlier: dict[str, Any] = {}
        check_recipe(model, config)
        if config is not None and config.warmup_steps:
            check_head(model)
        anatomy = resolve_anatomy(model)
        self._counts_before = count_weights(anatomy)
        if layout_of(model):
            self._open(model)
        self.anatomy = resolve_anatomy(model)
        parts, self._alone = prunable_parts(config or PruningConfig(sparsity=0), self.anatomy)
        self._parts = {part.path: part for part in prunable_parts(PruningConfig(sparsity=0), self.anatomy)[0]}
        already = masked_modules(model)
        pruned = [part.path for part in parts if config is not None or part.path in already]
        self.modules = {path: model.get_submodule(path) for path in pruned}
        # Pruned before and left out of this recipe: their zeros stay.
        self._held = {path: module for path, module in already.items() if path not in self.modules}
        check_whole(self.modules)
        self._lost = has_lost_masks(model)
        attach_masks(self.modules.values())
        zeros = sum(int((~mask).sum()) for mask in self._masks().values())
        for path, mask in self._masks().items() if zeros else ():
            self.modules[path].register_buffer(BEFORE, mask.clone())
        self._structure = removable_groups(self.anatomy, parts) if config is not None and config.structured else None
        self._gathering = None if config is None else Gathering(config, self.modules)
        self._state = TrainingState(next(iter(self.modules.values())), config, zeros)
        # The last steps that `before_step` has seen, and has taken the gradients of.
        self._prepared = self._dropped = -1
        self._window: tuple[int, int] | None = None
        if total_steps is not None:
            self.set_total_steps(total_steps)
        elif config is None or not any(isinstance(step, float) for step in (config.start_step, config.end_step)):
            self.set_total_steps(None)
        if (
            config is not None
            and config.needs_gradients
            and config.schedule == "single_shot"
            and not config.warmup_steps
        ):
            warn_if_fresh_head(model)

    def _open(self, model: PreTrainedModel) -> None:
        stored = model.config.quantization_config
        self.earlier = {"recipe": stored.recipe, "provenance": stored.provenance}
        open_layers(model)
        model.hf_quantizer.remove_quantization_config(model)
        model.__dict__.pop("compression_report", None)

    def set_total_steps(self, total: int | None) -> None:
        """Work out the steps that are given as shares. Raises `ConfigurationError` for an end after the training's."""
        config = self.config
        if config is None:
            self._window = (0, 0)
            return
        start = max(_in_steps(config.start_step, total), config.warmup_steps)
        end = start if config.end_step is None else _in_steps(config.end_step, total)
        if config.schedule == "single_shot":
            # The first step whose gradients come through a trained head.
            start = end = max(start, config.warmup_steps + 1)
        if total is not None and end > total:
            raise ConfigurationError(
                f"PruningConfig: the pruning ends at step {end}, and the training has {total} steps. Lower `end_step` "
                "(or `start_step` and `warmup_steps`), or train longer."
            )
        if config.schedule == "cubic" and start >= end:
            raise ConfigurationError(f"PruningConfig: the schedule starts at step {start} and ends at step {end}.")
        self._window = (start, end)

    def modules_in_place(self) -> bool:
        """Whether the model still holds the masked modules: not after `finalize`."""
        return all(self.model.get_submodule(path) is module for path, module in self.modules.items())

    @property
    def finished(self) -> bool:
        """Whether the masks are final."""
        return self._gathering is None

    @property
    def sparsity(self) -> float:
        """Share of zeros of all matrices that are pruned."""
        return sparsity_of(list(self._masks().values()))

    @property
    def skipped_steps(self) -> int:
        """Steps whose gradients were NaN or infinite, and which no score has seen."""
        return self._state.skipped

    @property
    def score_ratio(self) -> float | None:
        """Sum of |w·g| over the sum of α w² when `"snip_magnitude"` was last worked out."""
        terms = self._state.terms
        return None if terms is None or not terms[1] else terms[0] / terms[1]

    def resume(self, step: int) -> None:
        """Go on after `step` steps with the masks and scores that the state dict has brought back.

        Raises:
            ConfigurationError: the checkpoint was written without a Pruner, with another recipe, or from another
                model; or this Pruner has seen the end of the schedule, and the checkpoint is from before it.
        """
        self._state.check(step, self.config)
        self._prepared = self._dropped = -1
        before = self._zeros_before()
        if not self._state.zeros:
            for path in before:  # what an interrupted training had left in this model
                del self.modules[path]._buffers[BEFORE]
        elif self._state.zeros != sum(int((~mask).sum()) for mask in before.values()):
            raise ConfigurationError(
                f"the checkpoint is of a model of which {self._state.zeros} weights were pruned before the training. "
                "Resume with the model that the training began with."
            )
        if self._state.finished:
            self._close()
        elif self.finished and self.config is not None:
            raise ConfigurationError(
                f"the schedule had ended in this training, and the checkpoint of step {step} is from before that. "
                "Make a new Trainer (or Pruner) to resume from it."
            )
        self._lost = False

    @torch.no_grad()
    def before_step(self, step: int, *, parameters: Iterable[nn.Parameter] = (), drop_non_finite: bool = True) -> bool:
        """Before optimizer step number `step` (from 1), once its gradients are reduced and clipped.

        Takes away the gradients of a step that has NaN or infinite ones, which would destroy the weights, and in the
        `warmup_steps` those of all but the head; optimizers leave out parameters without.

        Args:
            parameters: what the optimizer steps on, where it is not the model's own parameters.
            drop_non_finite: `False` where a gradient scaler leaves such steps out, and has to see why. No score sees
                them either way: an optimizer that unscales within its step leaves the gradients of such a one scaled.

        Returns:
            Whether the step's gradients were finite, as far as looked at.
        """
        held = list(parameters)
        judged = {id(parameter): parameter for parameter in [*held, *self.model.parameters()]}
        if held and not drop_non_finite:  # a scaler judges by what its optimizer holds
            judged = {id(parameter): parameter for parameter in held}
        finite = all_finite(parameter.grad for parameter in judged.values() if parameter.grad is not None)
        for parameter in judged.values() if drop_non_finite and not finite else ():
            parameter.grad = None
        if self.config is not None and step <= self.config.warmup_steps:
            for parameter in self.model.base_model.parameters():
                parameter.grad = None
        self._prepared, self._dropped = step, -1 if finite else step
        return finite

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (from 1), before the gradients are cleared.

        Raises:
            ConfigurationError: the total number of steps is needed and not known, the model is finalized, or
                `before_step` was left out in a warm-up.
            NumericalError: there are no gradients, or weights that are NaN.
            UnsupportedModelError: the weights have been spread over processes.
        """
        if self._window is None:
            raise ConfigurationError("steps are given as shares of the training: set_total_steps(...) comes first.")
        self._require_in_place()
        check_whole(self.modules)
        start, end = self._window
        config, chosen, dropped = self.config, False, self._dropped == step
        self._check_step(step)
        if dropped:
            self._state.count(False)
        if config is not None and self._gathering is not None and step > config.warmup_steps:
            if not dropped:
                self._state.count(self._gathering.observe())
            due = step >= end or (step > start and (step - start) % config.update_interval == 0)
            due = due and not (dropped and self._gathering.looks_at_this_step)
            if due and (config.schedule == "cubic" or step >= start) and self._choose(step, start, end):
                chosen = True
                if step >= end:
                    self._close()
        if chosen or self.finished:
            apply_masks(self.modules.values())
        elif self._gathering is not None and self._gathering.keeps_values:
            apply_masks(self.modules.values())  # what grew from a zero is neither judged nor given back
        else:
            for path, mask in self._zeros_before().items():
                self.modules[path].get_parameter("weight").masked_fill_(~mask, 0.0)
        apply_masks(self._held.values())
        self._state.step = step

    def _check_step(self, step: int) -> None:
        if self._lost and not self._state.step:
            raise lost_masks_error()
        if self.config is not None and step <= self.config.warmup_steps and self._prepared != step:
            raise ConfigurationError(
                "PruningConfig: `warmup_steps` needs before_step(step) before every optimizer.step(), which holds "
                "back the gradients of all but the head."
            )

    def _choose(self, step: int, start: int, end: int) -> bool:
        assert self.config is not None and self._gathering is not None
        target = self.config.sparsity
        if self.config.schedule == "cubic":
            target = cubic_sparsity(step, start, end, target)
        if self.config.criterion in GATHERED and not self._state.observed:
            return False  # nothing was seen yet
        scores = self._gathering.scores()
        if scores is None:
            self._state.count(False)
            return False  # this step's gradients say nothing; the next one is asked
        if self._gathering.terms is not None:
            self._state.terms = self._gathering.terms
        if self._structure is not None:
            self._structure.choose(scores, target, self.config.compared)
            masks = self._structure.masks(scores)
        else:
            transposed = [path for path, module in self.modules.items() if isinstance(module, Conv1D)]
            try:
                masks = select(scores, target, self.config.compared, self._zeros_before() or None, transposed)
            except NumericalError as failure:
                raise NumericalError(
                    f"criterion {self.config.criterion!r}, step {step}: {failure}: the weights have diverged. Lower "
                    "the learning rate; in a loop of your own call before_step(step) before optimizer.step()."
                ) from failure
        self._gathering.exchange(masks)
        for path, mask in masks.items():
            own = mask_of(self.modules[path])
            assert own is not None
            own.copy_(mask)
        if step >= end and self._structure is None:
            warn_if_undecided(scores, masks)
        return True

    def _zeros_before(self) -> dict[str, torch.Tensor]:
        """What is kept of matrices that had zeros when the training began."""
        return {path: module.get_buffer(BEFORE) for path, module in self.modules.items() if BEFORE in module._buffers}

    def _close(self) -> None:
        if self._gathering is not None:
            self._gathering.close()
            self._gathering = None
        self._state.finished = True

    def _require_in_place(self) -> None:
        if not self.modules_in_place():
            raise ConfigurationError("the model is finalized already; make a new Pruner to prune it further.")

    def _masks(self) -> dict[str, torch.Tensor]:
        return {path: module.get_buffer("pruning_mask") for path, module in self.modules.items()}

    @torch.no_grad()
    def finalize(self) -> PreTrainedModel:
        """Put sparse layers (or smaller dense ones) in place of the masked modules, and attach the report.

        Returns:
            The same model, ready for `save_pretrained`.

        Raises:
            ConfigurationError: the schedule has not come to its end, or the model is finalized already.
            NumericalError: a weight that is kept is NaN or infinite.
        """
        self._require_in_place()
        if not self.finished:
            raise ConfigurationError("the pruning schedule has not come to its end; train on, then finalize().")
        model, rows = self.model, []
        notes: dict[str, Any] = {"sparsity": round(self.sparsity, 6)}
        if self.config is not None:
            notes["skipped_steps"] = self.skipped_steps
        if self._state.terms is not None:
            notes["sensitivity_to_magnitude"] = rounded_ratio(self._state.terms)
        modules = {**self.modules, **self._held}
        apply_masks(modules.values())
        for path, module in modules.items():
            if not all_finite([module.get_parameter("weight")]):
                raise NumericalError(
                    f"{path!r} has weights that are NaN or infinite: the training has diverged. Go back to a "
                    "checkpoint from before that, and lower the learning rate."
                )
        if self._structure is not None:
            # As the masks say: a checkpoint may have brought them back.
            self._structure.adopt(self._masks())
            assert self.config is not None
            notes["removed_share"] = self._structure.warn_if_short(self.config)
            for block in range(len(self.anatomy)):
                result = self._structure.compress_block(block)
                rows += result.rows
                _replace(model, result.modules)
        else:
            for path, module in modules.items():
                mask = mask_of(module)
                assert mask is not None
                values = "auto" if self.config is None or path in self._held else self.config.values
                layer = sparse_layer(module, mask, values)
                rows.append(report_row(self._parts[path], module, layer))
                _replace(model, {path: layer})
        remove_masks(model)
        before, after = self._counts_before, count_weights(self.anatomy)
        sizes = (before[0], after[0], before[1], after[1], before[2], after[2])
        report = CompressionReport(rows, *sizes, notes, self._alone)
        recipe = self.config or PruningConfig(sparsity=notes["sparsity"])
        stages = [*self.earlier.get("recipe", {}).get("stages", []), *([recipe.to_dict()] if self.config else [])]
        provenance = self.earlier.get("provenance") or describe_run(str(model.config.name_or_path or ""), model)
        attach_result(model, {"stages": stages or [recipe.to_dict()]}, report, provenance)
        return model


def _replace(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        old = model.get_submodule(path)
        module.train(old.training)
        for parameter in module.parameters():
            parameter.requires_grad_(old.get_parameter("weight").requires_grad)
        model.set_submodule(path, module)


def _in_steps(step: int | float, total: int | None) -> int:
    if isinstance(step, int):
        return step
    if total is None:
        raise ConfigurationError(f"PruningConfig: {step} is a share of the training: total_steps is needed.")
    return round(step * total)
