"""The recipe of pruning."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from ...configuration import MethodConfig, register_method_config
from ...errors import ConfigurationError

Criterion = Literal[
    "snip_magnitude",
    "snip",
    "gradient",
    "sensitivity",
    "delta",
    "movement",
    "magnitude",
    "wanda",
    "random",
]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
#: Scores that take gradients of the task's loss.
WITH_GRADIENTS: tuple[Criterion, ...] = ("snip_magnitude", "snip", "gradient", "sensitivity", "movement")
#: What a whole head or MLP column can be judged by: criteria with a score for every weight.
Values = Literal["auto", "float16", "bfloat16", "float32", "int8"]


@register_method_config
class PruningConfig(MethodConfig):
    """Weights of the blocks' matrices set to zero, and kept as their positions and values alone.

    After H. Kohama et al., "Single-Shot Pruning for Pre-trained Models" (ICCV 2023 workshops), and the press release
    of Chubu University of 24 July 2023: what goes is chosen by how much it matters to the change of use.

    Args:
        sparsity (`float`): share of the matrices' weights that become zero, in [0, 1).
        criterion (`str`, defaults to `"snip_magnitude"`): what a weight is kept for. `"snip_magnitude"` is
            |w·g| + magnitude_weight·w² with the gradient g of the task's loss, the ICCV paper's; `"snip"` is |w·g|;
            `"gradient"` is |g|; `"sensitivity"` is a running mean of |w·g| over batches, or over the steps of a
            training; `"delta"` is |w − w₀| with the weights w₀ of `base_model`, or of the training's start;
            `"movement"` is −Σ w·g over a training; `"magnitude"` is |w|; `"wanda"` is |w| times the norm of its
            inputs, compared within a row (language models without training); `"random"` is random.
        scope (`str`, *optional*): `"global"`: one threshold for all matrices; `"layer"`: the same sparsity for every
            matrix; `"row"`: for every row of a matrix. By default global, and row for `"wanda"`.
        structured (`bool`, defaults to `False`): remove whole heads and whole columns of the MLPs by the sum of their
            weights' scores. The result is a smaller dense model.
        schedule (`"single_shot"` or `"cubic"`): all at once at `start_step`, or in a training from `start_step` to
            `end_step` along Zhu and Gupta's cubic curve.
        start_step, end_step (`int` or `float`): optimizer steps of a training, or shares of it below 1.
        update_interval (`int`, defaults to 8): steps between two choices of what is zero, with the cubic schedule.
            What was pruned may grow again until the schedule ends; with `"delta"` and `"movement"` it comes back with
            the value it had, by which it is judged while it is gone.
        decay (`float`, defaults to 0.98): of the running mean of `"sensitivity"` in a training.
        magnitude_weight (`float`, defaults to 0.001): the α of `"snip_magnitude"`. It belongs to a mean cross entropy.
        normalize (`bool`, defaults to `False`): divide both terms of `"snip_magnitude"` by their means first.
        warmup_steps (`int`, defaults to 0): steps of a training in which only what lies outside the blocks is tuned: a
            fresh head has gradients that say nothing.
        base_model (`str`, *optional*): id or path of the weights w₀, for `"delta"` without a training.
        base_model_revision (`str`, *optional*): its branch, tag or commit.
        base_model_checksum (`str`, *optional*): SHA-256 of its matrices, as the report notes it; another is refused.
        values (`str`, defaults to `"auto"`): how the kept values are stored: `"float16"`, `"bfloat16"`, `"float32"`,
            `"int8"` with one scale a row. By default bfloat16 for models in it and float16 for all others.
    """

    method: ClassVar[str] = "pruning"

    sparsity: float = Field(ge=0, lt=1)
    criterion: Criterion = "snip_magnitude"
    scope: Literal["global", "layer", "row"] | None = None
    structured: bool = False
    schedule: Literal["single_shot", "cubic"] = "single_shot"
    start_step: int | float = Field(default=0, ge=0)
    end_step: int | float | None = Field(default=None, gt=0)
    update_interval: int = Field(default=8, ge=1)
    decay: float = Field(default=0.98, ge=0, lt=1)
    magnitude_weight: float = Field(default=1e-3, ge=0)
    normalize: bool = False
    warmup_steps: int = Field(default=0, ge=0)
    base_model: str | None = None
    base_model_revision: str | None = None
    base_model_checksum: str | None = None
    values: Values = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Any:
        if self.schedule == "cubic" and self.end_step is None:
            raise ValueError('`schedule="cubic"` needs `end_step`: a step, or a share of the training below 1')
        if self.schedule == "single_shot" and self.end_step is not None:
            raise ValueError('`end_step` has no effect with `schedule="single_shot"`')
        start, end = self.start_step, self.end_step
        alike = end is not None and (start == 0 or isinstance(start, int) == isinstance(end, int))
        if end is not None and alike and start >= end:
            raise ValueError(f"`start_step` {start} must come before `end_step` {end}")
        for name, value in (("start_step", start), ("end_step", end)):
            if isinstance(value, float) and value > 1:
                raise ValueError(f"`{name}` is {value}: give whole steps as an int, or a share of at most 1")
        if self.criterion == "wanda" and (self.structured or self.schedule != "single_shot"):
            raise ValueError('`criterion="wanda"` is for single weights and for a single shot')
        if self.structured and self.scope == "row":
            raise ValueError('`scope="row"` has no meaning for whole heads and columns')
        if self.structured and self.values != "auto":
            raise ValueError("`values` has no effect with `structured=True`: what stays is dense")
        if self.base_model is not None and self.criterion != "delta":
            raise ValueError(f'`base_model` has no effect with `criterion="{self.criterion}"`: "delta" looks at it')
        for name in ("base_model_revision", "base_model_checksum"):
            if getattr(self, name) is not None and self.base_model is None:
                raise ValueError(f"`{name}` has no effect without `base_model`")
        return self

    @property
    def compared(self) -> Literal["global", "layer", "row"]:
        """Among which weights the scores are compared."""
        return self.scope or ("row" if self.criterion == "wanda" else "global")

    @property
    def needs_gradients(self) -> bool:
        return self.criterion in WITH_GRADIENTS

    @property
    def needs_data(self) -> bool:
        """Without a training."""
        return self.needs_gradients or self.criterion == "wanda"

    def check_in_one_call(self) -> None:
        reason = None
        if self.criterion == "movement":
            reason = '`criterion="movement"` sums over the steps of a training'
        elif self.schedule == "cubic":
            reason = '`schedule="cubic"` prunes step by step'
        elif self.warmup_steps:
            reason = "`warmup_steps` trains the head first"
        if reason is not None:
            raise ConfigurationError(
                f"PruningConfig: {reason}, and here nothing is trained. Give the configuration to a Trainer: "
                "callbacks=[hf_compress.PruningCallback(config)]."
            )
        if self.criterion == "delta" and self.base_model is None:
            raise ConfigurationError(
                'PruningConfig: `criterion="delta"` needs `base_model`, the checkpoint that this model was tuned '
                "from; or give the configuration to a Trainer: callbacks=[hf_compress.PruningCallback(config)]."
            )
        if self.criterion == "wanda" and self.compared == "global":
            raise ConfigurationError(
                'PruningConfig: `criterion="wanda"` compares within rows or layers, not globally.'
            )
