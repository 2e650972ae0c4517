"""The arguments of a distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..errors import ConfigurationError


@dataclass
class DistillationConfig(TrainingArguments):  # type: ignore[misc]
    """
    `TrainingArguments` with the terms of a distillation:

        loss = (1 − kl_weight) · cross entropy + kl_weight · T² · divergence + hidden_state_weight · hidden states

    Args:
        temperature (`float`, defaults to 2.0): T, by which both models' logits are divided.
        kl_weight (`float`, defaults to 0.9): share of the divergence; the labels' cross entropy has the rest.
        divergence (`str`, defaults to `"forward_kl"`): `"forward_kl"`, `"reverse_kl"` or `"jensen_shannon"`.
        hidden_state_weight (`float`, defaults to 0.0): weight of the mean squared error between hidden states,
            at every place relative to the teacher's mean square there.
        layer_mapping (`list[list[int]]`, *optional*): pairs of a student's and a teacher's hidden state, 0 being the
            embedding. By default all of the student's, to the teacher's at equal relative depth.
        teacher_top_k (`int`, *optional*): compare the teacher's likeliest classes and the rest of all others only.
        teacher_cache (`str`, *optional*): folder for the teacher's `teacher_top_k` classes of every example: the
            teacher runs once. The examples must come without random changes.
    """

    temperature: float = field(default=2.0)
    kl_weight: float = field(default=0.9)
    divergence: str = field(default="forward_kl")
    hidden_state_weight: float = field(default=0.0)
    layer_mapping: list[list[int]] | None = field(default=None)
    teacher_top_k: int | None = field(default=None)
    teacher_cache: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ConfigurationError(f"DistillationConfig: `temperature` must be positive, got {self.temperature}.")
        if not 0 <= self.kl_weight <= 1:
            raise ConfigurationError(f"DistillationConfig: `kl_weight` must be from 0 to 1, got {self.kl_weight}.")
        if self.hidden_state_weight < 0:
            raise ConfigurationError("DistillationConfig: `hidden_state_weight` must not be negative.")
        if self.divergence not in ("forward_kl", "reverse_kl", "jensen_shannon"):
            raise ConfigurationError(
                f"DistillationConfig: `divergence` is {self.divergence!r}; expected forward_kl, reverse_kl or "
                "jensen_shannon."
            )
        if self.teacher_cache is not None and self.teacher_top_k is None:
            raise ConfigurationError("DistillationConfig: `teacher_cache` needs `teacher_top_k`, what is kept.")
        if self.teacher_cache is not None and self.hidden_state_weight:
            raise ConfigurationError("DistillationConfig: `teacher_cache` keeps no hidden states.")
