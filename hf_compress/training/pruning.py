"""The Trainer's callback that prunes."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigurationError
from ..layout import TRAINED
from ..methods.pruning.configuration import PruningConfig
from ..saved_names import accept_saved_names
from .pruner import Pruner


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """
    Prunes during a `Trainer`'s training and keeps the zeros zero.

        Trainer(model, args, ..., callbacks=[PruningCallback(PruningConfig(sparsity=0.9, criterion="sensitivity",
            schedule="cubic", start_step=0.05, end_step=0.65))])

    Without a configuration it keeps the zeros of a model that was loaded with `compression_config=PruningConfig(...)`.
    It has to be among the `callbacks` that the Trainer is made with. Checkpoints of the training hold dense weights,
    masks and scores, and resuming from them restores all. At the end of the training the model gets its sparse layers.

    While the schedule runs no checkpoint counts as the best one, and early stopping waits. Scores come from the
    gradients after accumulation, reduction over processes and clipping (`pruning_clipped` in the log says whether).
    A step with NaN or infinite gradients is left out and counted.
    The log has `pruning_sparsity`, `pruning_skipped_steps` and, for `"snip_magnitude"`, the ratio of its two terms.
    The reporters of `report_to` are called before any callback that is given, and do not see them; one that stands
    behind this callback does: `report_to=[], callbacks=[PruningCallback(...), TensorBoardCallback()]`.

    Args:
        config (`PruningConfig`, *optional*): what to prune and when.

    Raises:
        `ConfigurationError`, `UnsupportedModelError`: see [`Pruner`].
    """

    def __init__(self, config: PruningConfig | None = None) -> None:
        if config is not None and not isinstance(config, PruningConfig):
            raise ConfigurationError(f"PruningCallback takes a PruningConfig, got {type(config).__name__}.")
        self.config = config
        self.pruner: Pruner | None = None
        # Whether the checkpoint that counts as the best one is from after the schedule's end.
        self._best_is_pruned = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # Before the optimizer is made and a checkpoint is loaded.
        accept_saved_names(model)
        self.pruner = Pruner(model, self.config)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.pruner is not None and model is not self.pruner.model:
            raise ConfigurationError(
                "the Trainer trains another model than it was made with: a PruningCallback does not work with "
                "`model_init`."
            )
        if self.pruner is None or not self.pruner.modules_in_place():
            raise ConfigurationError(
                "the PruningCallback has to be among the `callbacks` that a new Trainer is made with: masks must be "
                "there before the optimizer is made and before a checkpoint is loaded."
            )
        self.pruner.set_total_steps(state.max_steps)
        self._check_optimizer(optimizer)
        if state.global_step:
            self.pruner.resume(state.global_step)
        self._best_is_pruned = self.pruner.finished
        model.__dict__[TRAINED] = True

    def _check_optimizer(self, optimizer: Any) -> None:
        assert self.pruner is not None
        known = {id(p) for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
        weights = {path: module.get_parameter("weight") for path, module in self.pruner.modules.items()}
        # A frozen matrix can be pruned by what it is; gradients it has none.
        needs = self.config is not None and (self.config.needs_gradients or self.config.criterion == "delta")
        strangers = [path for path, w in weights.items() if id(w) not in known and (w.requires_grad or needs)]
        if known and strangers:
            raise ConfigurationError(
                f"the optimizer does not hold the weight of {strangers[0]!r}. Let the Trainer make the optimizer, or "
                "make yours after the Trainer; or the matrices of the blocks are frozen."
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert self.pruner is not None
        scaled = getattr(optimizer, "scaler", None) is not None
        held = [p for group in getattr(optimizer, "param_groups", []) for p in group["params"]]
        self.pruner.before_step(state.global_step + 1, parameters=held, drop_non_finite=not scaled)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.pruner is not None
        self.pruner.update(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.pruner is not None
        if not self.pruner.finished or not self._best_is_pruned:
            # A checkpoint from before the schedule's end is denser than what was asked for: it is never the best.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._best_is_pruned = self.pruner.finished

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.pruner is None or not self.pruner.modules_in_place():
            return
        found: dict[str, Any] = {"pruning_sparsity": round(self.pruner.sparsity, 6)}
        if self.config is not None:
            found["pruning_skipped_steps"] = self.pruner.skipped_steps
            found["pruning_clipped"] = bool(args.max_grad_norm)
        if self.pruner.score_ratio is not None:
            found["pruning_score_ratio"] = self.pruner.score_ratio
        for target in (logs, state.log_history[-1] if state.log_history else None):
            if target is not None:
                target.update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.pruner is not None
        self.pruner.model.__dict__.pop(TRAINED, None)
        if self.pruner.finished:
            self.finalize()
        else:
            warnings.warn(
                f"the training ended before the pruning schedule, at a sparsity of {self.pruner.sparsity:.3f}. The "
                "model stays dense with masks; resume the training to finish it.",
                stacklevel=2,
            )

    def finalize(self) -> PreTrainedModel:
        """Put the sparse layers in place; the end of a training does it. Raises as [`Pruner.finalize`]."""
        assert self.pruner is not None
        return self.pruner.finalize()
