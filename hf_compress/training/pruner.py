"""Pruning inside a training, for any loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy import resolve_anatomy
from ..engine.compress import attach_result, describe_run
from ..engine.report import CompressionReport
from ..engine.weights import count_weights
from ..errors import ConfigurationError, UnsupportedModelError
from ..layout import layout_of
from ..methods.pruning.configuration import CRITERIA, PruningConfig
from ..methods.pruning.gathering import Gathering
from ..methods.pruning.masks import (
    apply_masks,
    attach_masks,
    mask_of,
    masked_modules,
    open_layers,
    remove_masks,
    sparse_layer,
)
from ..methods.pruning.mathematics import cubic_sparsity
from ..methods.pruning.method import Pruning, report_row
from ..methods.pruning.parts import prunable_parts
from ..methods.pruning.scores import rounded_ratio, warn_if_fresh_head
from ..methods.pruning.selection import select, sparsity_of, warn_if_undecided
from ..methods.pruning.state import TrainingState
from ..methods.pruning.structured import removable_groups


class Pruner:
    """
    Prunes a model while it is trained, in any loop:

        pruner = Pruner(model, config, total_steps=1000)
        optimizer = torch.optim.AdamW(model.parameters())      # after the Pruner
        for step in range(1, 1001):
            loss(model).backward()
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
        model = _plain_model(model)
        self.model, self.config = model, config
        self.earlier: dict[str, Any] = {}
        self._check(model, config)
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
        _check_whole(self.modules)
        attach_masks(self.modules.values())
        zeros = any(not bool(mask.all()) for mask in self._masks().values())
        self._before = {path: mask.clone() for path, mask in self._masks().items()} if zeros else {}
        self._structure = removable_groups(self.anatomy, parts) if config is not None and config.structured else None
        self._gathering = None if config is None else Gathering(config, self.modules)
        holder, target = next(iter(self.modules.values())), 0.0 if config is None else config.sparsity
        self._state = TrainingState(holder, target, _number(config))
        self._terms: tuple[float, float] | None = None
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

    @staticmethod
    def _check(model: PreTrainedModel, config: PruningConfig | None) -> None:
        types = {entry["type"] for entry in layout_of(model)}
        if types - set(Pruning.continues):
            raise ConfigurationError(
                f"the model holds compressed modules ({', '.join(sorted(types))}) that cannot be pruned. Prune the "
                "dense original."
            )
        if config is None and not types and not masked_modules(model):
            raise ConfigurationError(
                "the model has no pruned matrices whose zeros could be kept. Give a PruningConfig, or load the model "
                "with compression_config=PruningConfig(...)."
            )
        if config is None:
            return
        if config.criterion == "wanda":
            raise ConfigurationError('PruningConfig: `criterion="wanda"` is for models that are not trained.')
        if config.calibration is not None:
            raise ConfigurationError(
                "PruningConfig: `calibration` has no effect in a training, which has its own data."
            )
        if config.structured and (types or masked_modules(model)):
            raise ConfigurationError(
                "PruningConfig: `structured=True` removes heads and columns of a dense model, and in this one single "
                "weights are pruned already. Begin with the dense original."
            )
        if config.base_model is not None:
            raise ConfigurationError(
                "PruningConfig: `base_model` has no effect in a training: the weights at its start are the base."
            )
        if config.criterion in ("delta", "movement") and config.schedule == "single_shot" and not config.start_step:
            raise ConfigurationError(
                f"PruningConfig: criterion {config.criterion!r} knows nothing at the start of a training. Give "
                '`start_step`, or schedule="cubic" with `end_step`.'
            )

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
        return None if self._terms is None or not self._terms[1] else self._terms[0] / self._terms[1]

    def resume(self, step: int) -> None:
        """Go on after `step` steps with the masks and scores that the state dict has brought back.

        Raises:
            ConfigurationError: the checkpoint was written without a Pruner, or with another recipe.
        """
        if self._state.step != step:
            raise ConfigurationError(
                f"the checkpoint of step {step} holds no masks of that step: it was written without a "
                "PruningCallback, or not loaded into this model. Start the training afresh."
            )
        wanted = 0.0 if self.config is None else self.config.sparsity
        if abs(self._state.target - wanted) > 1e-6:
            raise ConfigurationError(
                f"the checkpoint was written by a pruning to a sparsity of {self._state.target:g}, and this one goes "
                f"to {wanted:g}. Resume with the recipe that it was made with."
            )
        if self._state.criterion != _number(self.config):
            raise ConfigurationError(
                "the checkpoint was written by a pruning with another criterion. Resume with the recipe that it was "
                "made with."
            )
        if self._state.finished:
            self._close()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (from 1), before the gradients are cleared.

        Raises:
            ConfigurationError: the total number of steps is needed and not known, or the model is finalized.
            NumericalError: there are no gradients.
        """
        if self._window is None:
            raise ConfigurationError("steps are given as shares of the training: set_total_steps(...) comes first.")
        self._require_in_place()
        start, end = self._window
        config, chosen = self.config, False
        if config is not None and self._gathering is not None and step > config.warmup_steps:
            self._state.count(self._gathering.observe())
            due = step >= end or (step > start and (step - start) % config.update_interval == 0)
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

    def _choose(self, step: int, start: int, end: int) -> bool:
        assert self.config is not None and self._gathering is not None
        target = self.config.sparsity
        if self.config.schedule == "cubic":
            target = cubic_sparsity(step, start, end, target)
        if self.config.criterion in ("sensitivity", "movement") and not self._state.observed:
            return False  # nothing was seen yet
        scores = self._gathering.scores()
        if scores is None:
            self._state.count(False)
            return False  # this step's gradients say nothing; the next one is asked
        self._terms = self._gathering.terms
        if self._structure is not None:
            self._structure.choose(scores, target, self.config.compared)
            masks = self._structure.masks(scores)
        else:
            transposed = [path for path, module in self.modules.items() if isinstance(module, Conv1D)]
            masks = select(scores, target, self.config.compared, self._zeros_before() or None, transposed)
        self._gathering.exchange(masks)
        for path, mask in masks.items():
            own = mask_of(self.modules[path])
            assert own is not None
            own.copy_(mask)
        if step >= end and self._structure is None:
            warn_if_undecided(scores, masks)
        return True

    def _zeros_before(self) -> dict[str, torch.Tensor]:
        """What is kept of matrices that had zeros when the training began, where the weights are by now."""
        return {
            path: mask.to(self.modules[path].get_parameter("weight").device) for path, mask in self._before.items()
        }

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
        """
        self._require_in_place()
        if not self.finished:
            raise ConfigurationError("the pruning schedule has not come to its end; train on, then finalize().")
        model, rows = self.model, []
        notes: dict[str, Any] = {"sparsity": round(self.sparsity, 6)}
        if self.config is not None:
            notes["skipped_steps"] = self.skipped_steps
        if self._terms is not None:
            notes["sensitivity_to_magnitude"] = rounded_ratio(self._terms)
        modules = {**self.modules, **self._held}
        apply_masks(modules.values())
        if self._structure is not None:
            # As the masks say: a checkpoint may have brought them back.
            self._structure.adopt(self._masks())
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


def _number(config: PruningConfig | None) -> int:
    """Of a recipe's criterion; -1 where only zeros are kept."""
    return -1 if config is None else CRITERIA.index(config.criterion)


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


def _plain_model(model: Any) -> PreTrainedModel:
    """What a wrapper for several devices holds. Raises `UnsupportedModelError` if it is no Transformers model."""
    inner = model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model
    adapted = hasattr(inner, "get_base_model") and hasattr(inner, "peft_config")
    if adapted or getattr(inner, "_hf_peft_config_loaded", False):
        raise ConfigurationError(
            "the model carries a PEFT adapter: the matrices are frozen under it and their zeros stay. Train it "
            "without a PruningCallback, or prune before the adapter is attached."
        )
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"expected a Transformers model (PreTrainedModel), got {type(inner).__name__}.")
    return inner


def _check_whole(modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        weight = module.get_parameter("weight")
        if weight.is_meta or weight.numel() == 0 or type(weight.data) is not torch.Tensor:
            raise UnsupportedModelError(
                f"the weight of {path!r} is not whole on this process (offloaded, or spread by FSDP, ZeRO-3 or tensor "
                "parallelism): masks under one threshold need whole matrices. Train with DDP."
            )
