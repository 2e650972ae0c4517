"""Random step sizes while a model with shared layers is trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigurationError
from ..methods.sharing.stepping import running_blocks, schedule_of, set_iterations


class RandomStepCallback(TrainerCallback):  # type: ignore[misc]
    """
    Draws the number of iterations of a model with shared layers for every optimizer step, so that the model learns to
    be run in fewer, larger steps (W. Chen et al., arXiv 2310.12818). Evaluation runs all loops.

    The draws follow from the seed and the step alone: they are the same on all processes and after resuming.

    Args:
        min_iterations (`int`): the fewest iterations.
        weights (`dict[int, float]`, *optional*): numbers of iterations and their weights. By default all that the
            sharing allows from `min_iterations` to the depth, equally likely.
        coarse_to_fine (`float`, defaults to 0): share of the training in which the most iterations rise from
            `min_iterations` to the depth.
        per_micro_batch (`bool`, defaults to `False`): draw anew for every micro-batch of gradient accumulation.
        seed (`int`, *optional*): by default the training's.

    Raises:
        `ConfigurationError`: a model without shared layers, or numbers of iterations that it does not allow.
    """

    def __init__(
        self,
        min_iterations: int,
        *,
        weights: dict[int, float] | None = None,
        coarse_to_fine: float = 0.0,
        per_micro_batch: bool = False,
        seed: int | None = None,
    ) -> None:
        if not 0 <= coarse_to_fine <= 1:
            raise ConfigurationError(f"RandomStepCallback: `coarse_to_fine` is {coarse_to_fine}, expected 0 to 1.")
        if weights is not None and (not weights or any(not weight > 0 for weight in weights.values())):
            raise ConfigurationError("RandomStepCallback: `weights` must be positive.")
        self.min_iterations, self.weights = min_iterations, weights
        self.coarse_to_fine, self.per_micro_batch, self.seed = coarse_to_fine, per_micro_batch, seed
        self._micro = 0
        self._choices: list[int] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        running = running_blocks(model)
        if running is None:
            raise ConfigurationError(
                f"RandomStepCallback: {type(model).__name__} has no shared layers; see LayerSharingConfig."
            )
        if not 1 <= self.min_iterations <= running.depth:
            raise ConfigurationError(
                f"RandomStepCallback: `min_iterations` is {self.min_iterations}, expected 1 to {running.depth}."
            )
        wanted = range(self.min_iterations, running.depth + 1) if self.weights is None else sorted(self.weights)
        self._choices = []
        for iterations in wanted:
            try:
                schedule_of(running.assigned, running.order, iterations, None)
            except ConfigurationError:
                # Not every number fits groups; one that was asked for by name must.
                if self.weights is not None:
                    raise
                continue
            self._choices.append(iterations)

    def draw(self, step: int, total: int, micro_batch: int, seed: int) -> int:
        """The number of iterations of a step."""
        choices = self._choices
        if self.coarse_to_fine and total:
            progress = min(step / (self.coarse_to_fine * total), 1.0)
            most = self.min_iterations + progress * (choices[-1] - self.min_iterations)
            choices = [choice for choice in choices if choice <= most] or choices[:1]
        weights = torch.tensor([1.0 if self.weights is None else self.weights[choice] for choice in choices])
        generator = torch.Generator().manual_seed(hash((seed, step, micro_batch)) & 0x7FFFFFFF)
        return choices[int(torch.multinomial(weights, 1, generator=generator))]

    def _set(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        seed = args.seed if self.seed is None else self.seed
        set_iterations(model, self.draw(state.global_step, state.max_steps, self._micro, seed))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._micro = 0
        self._set(args, state, model)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.per_micro_batch:
            self._micro += 1
            self._set(args, state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # Evaluation, saving and whatever comes after the training see the full model.
        set_iterations(model)
