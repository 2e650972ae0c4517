"""A student and its teacher: whether they fit, and which of their hidden states are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import ConfigurationError
from ..methods.sharing.stepping import running_blocks
from .configuration import DistillationConfig


def inner_model(model: Any) -> Any:
    """The Transformers model under an adapter."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") and hasattr(model, "peft_config") else model
    if inner is None:
        raise ConfigurationError("`model` is missing; `model_init` is not supported.")
    if not isinstance(inner, PreTrainedModel):
        raise ConfigurationError(f"`model` is a {type(inner).__name__}, expected a Transformers model.")
    return inner


def is_causal(model: nn.Module) -> bool:
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def state_at(model: nn.Module, states: Any, layer: int) -> Tensor:
    """The hidden state after `layer` layers; of a model that runs fewer, larger steps the one nearest in time."""
    running = running_blocks(model)
    if running is None or running.iterations == running.depth:
        state: Tensor = states[layer]
        return state
    times = torch.tensor([0.0, *running.schedule.steps], dtype=torch.float64).cumsum(0)
    nearest: Tensor = states[int((times - layer).abs().argmin())]
    return nearest


def check_pair(args: DistillationConfig, student: Any, teacher: Any) -> None:
    """Raises `ConfigurationError` for what would fail, or teach nothing, after the training has begun."""
    if teacher is student:
        raise ConfigurationError("teacher and student are one model: load the teacher a second time.")
    if any(parameter.is_meta for parameter in teacher.parameters()):
        raise ConfigurationError("the teacher has no weights in memory: it is offloaded or on the meta device.")
    if args.label_smoothing_factor:
        raise ConfigurationError("DistillationConfig: `label_smoothing_factor` has no effect on a distillation.")
    heads = type(student).__name__.rpartition("For")[2], type(teacher).__name__.rpartition("For")[2]
    if heads[0] != heads[1] or "For" not in type(student).__name__:
        raise ConfigurationError(
            f"{type(student).__name__} cannot learn from {type(teacher).__name__}: expected two models with a head "
            "for the same task."
        )
    classes = getattr(student.config, "num_labels", 2) if "Classification" in heads[0] else None
    if classes == 1:
        raise ConfigurationError("a regression has no classes whose probabilities could be compared.")
    most = classes if classes is not None else getattr(student.config.get_text_config(), "vocab_size", None)
    if args.teacher_top_k is not None and not 1 <= args.teacher_top_k < (most or float("inf")):
        raise ConfigurationError(
            f"DistillationConfig: `teacher_top_k` is {args.teacher_top_k}, expected from 1 to fewer than the {most} "
            "classes."
        )


def require_same_classes(student: Any, teacher: Any) -> None:
    first, second = student.get_text_config(), teacher.get_text_config()
    pairs = {
        "vocabularies": (getattr(first, "vocab_size", None), getattr(second, "vocab_size", None)),
        "numbers of classes": (getattr(student, "num_labels", None), getattr(teacher, "num_labels", None)),
    }
    for what, (own, theirs) in pairs.items():
        if own != theirs:
            raise ConfigurationError(
                f"student and teacher have different {what}: {own} and {theirs}. Distillation compares their "
                "probabilities class by class."
            )


def _depth(config: Any) -> int:
    return int(config.get_text_config().num_hidden_layers)


def layer_pairs(args: DistillationConfig, student: Any, teacher: Any) -> list[tuple[int, int]]:
    if not args.hidden_state_weight:
        return []
    own, theirs = _depth(student), _depth(teacher)
    if args.layer_mapping is None:
        return [(layer, round(layer * theirs / own)) for layer in range(own + 1)]
    pairs = [(int(first), int(second)) for first, second in args.layer_mapping]
    for first, second in pairs:
        if not (0 <= first <= own and 0 <= second <= theirs):
            raise ConfigurationError(
                f"`layer_mapping` names the pair ({first}, {second}); the student has hidden states 0 to {own}, the "
                f"teacher 0 to {theirs}."
            )
    return pairs


def make_projections(args: DistillationConfig, pairs: list[tuple[int, int]], student: Any, teacher: Any) -> Any:
    """Where the widths differ: a learned map from the student's to the teacher's for every pair."""
    own, theirs = student.get_text_config().hidden_size, teacher.get_text_config().hidden_size
    if not pairs or own == theirs:
        return None
    return nn.ModuleList(nn.Linear(own, theirs, bias=False) for _ in pairs)
