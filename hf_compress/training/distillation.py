"""Distillation: a Trainer whose model learns from a teacher, whatever either was compressed with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..engine.resume import model_checksum
from ..errors import ConfigurationError
from ..methods.sharing.stepping import running_blocks
from .divergence import divergence, log_probabilities, top_classes, with_the_rest
from .teacher_cache import TeacherCache

PROJECTIONS = "distillation_projections.safetensors"


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
            relative to the teacher's mean square.
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


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """
    A `Trainer` whose model learns from a teacher as well as from labels.

    The student is any model: decomposed, coded (with an adapter, or `trainable_codebooks`), pruned, shared, or plain.
    Evaluation gives `eval_loss`, the labels' loss of the student, and beside it `eval_teacher_loss` and
    `eval_divergence` (in nats, at the temperature).

    Args:
        teacher_model (`PreTrainedModel` or `str`): the teacher, or its id or path, which is loaded in the student's
            class. It may be on another device, or quantized.
        peft_config (`peft.PeftConfig`, *optional*): trains an adapter on the student.
        All others as of `Trainer`; `args` is a [`DistillationConfig`].

    Raises:
        `ConfigurationError`: teacher and student of different vocabularies or classes, or a layer mapping that does
            not fit.
    """

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: DistillationConfig | None = None,
        *positional: Any,
        peft_config: Any = None,
        **options: Any,
    ) -> None:
        args = args if args is not None else DistillationConfig(output_dir="trainer_output")
        if not isinstance(args, DistillationConfig):
            raise ConfigurationError(f"`args` is a {type(args).__name__}, expected a DistillationConfig.")
        if teacher_model is None:
            raise ConfigurationError("`teacher_model` is missing: a model, or an id or path.")
        student = _inner(model)
        teacher = teacher_model
        if isinstance(teacher_model, (str, Path)):
            _require_same_classes(student.config, AutoConfig.from_pretrained(teacher_model))
            teacher = type(student).from_pretrained(teacher_model, dtype=student.dtype)
        _require_same_classes(student.config, teacher.config)
        _check_pair(args, student, teacher)
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self.layer_pairs = _layer_pairs(args, student.config, teacher.config)
        self.projections = _projections(args, self.layer_pairs, student.config, teacher.config)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if not positional and options.get("data_collator") is None:
            options["data_collator"] = _collator(options.get("processing_class"), options.get("train_dataset"))
        super().__init__(model, args, *positional, **options)
        # The loss below is a mean over the micro-batch.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        own_place = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
        if not own_place:
            self.teacher.to(args.device)
        if self.projections is not None:
            self.projections.to(args.device)
        self.cache = self._open_cache(args, teacher_model)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def _open_cache(self, args: DistillationConfig, named: Any) -> TeacherCache | None:
        if args.teacher_cache is None:
            return None
        name = str(named) if isinstance(named, (str, Path)) else str(self.teacher.config.name_or_path)
        identity = {
            "teacher": name,
            "weights": model_checksum(self.teacher),
            "temperature": args.temperature,
            "classes": args.teacher_top_k,
        }
        return TeacherCache(args.teacher_cache, identity)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        args: DistillationConfig = self.args
        # The model's own mode would be that of a wrapper.
        training = model.training
        with_hidden = bool(args.hidden_state_weight) and training
        outputs = model(**inputs, **({"output_hidden_states": True} if with_hidden else {}))
        labels = inputs.get("labels")
        labels_loss = outputs.loss if labels is not None else None
        wanted = self._wanted(inputs, outputs.logits)
        found, teacher = self._divergence(inputs, outputs.logits, wanted)
        if not training:
            if teacher is None and labels is not None:
                teacher = self._ask_teacher(inputs)  # the cache holds no loss
            self._remember(found, teacher, labels, len(outputs.logits))
            loss = labels_loss if labels_loss is not None else found
            return (loss, _without_hidden(outputs)) if return_outputs else loss
        loss = args.kl_weight * args.temperature**2 * found
        if labels_loss is not None and args.kl_weight < 1:
            loss = loss + (1 - args.kl_weight) * labels_loss
        if with_hidden:
            states = self._hidden_states(outputs.hidden_states, teacher.hidden_states, inputs.get("attention_mask"))
            loss = loss + args.hidden_state_weight * states
        return (loss, _without_hidden(outputs)) if return_outputs else loss

    def _wanted(self, inputs: dict[str, Any], logits: Tensor) -> Tensor | None:
        """Which places count, (rows of the flattened logits,): those with a label, or that are no padding."""
        if logits.dim() == 2:
            return None
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        if labels is not None and labels.shape == logits.shape[:-1]:
            places: Tensor = labels != -100
        elif mask is not None and mask.shape == logits.shape[:-1]:
            places = mask.bool()
        else:
            return None
        if _is_causal(_inner(self.model)):
            # A place is judged by the token after it; padding before a text is none.
            places = torch.cat((places[:, 1:], torch.zeros_like(places[:, :1])), dim=1)
            if mask is not None and mask.shape == places.shape:
                places = places & mask.bool()
        return places.reshape(-1)

    def _divergence(self, inputs: dict[str, Any], logits: Tensor, wanted: Tensor | None) -> tuple[Tensor, Any]:
        """Mean over the places that count, and what the teacher said (`None` from the cache)."""
        args: DistillationConfig = self.args
        own = log_probabilities(_rows(logits, wanted), args.temperature)
        teacher = None
        if self.cache is not None:
            classes, theirs = self._from_cache(self.cache, inputs, logits)
            classes, theirs = _rows(classes, wanted), _rows(theirs, wanted)
        else:
            teacher = self._ask_teacher(inputs)
            theirs = log_probabilities(_rows(teacher.logits.to(own.device), wanted), args.temperature)
            if args.teacher_top_k is not None:
                classes, theirs = top_classes(theirs, args.teacher_top_k)
        if args.teacher_top_k is not None:
            own, theirs = with_the_rest(own.gather(-1, classes)), with_the_rest(theirs)
        if own.shape != theirs.shape:
            raise ConfigurationError(
                f"the student's logits have the shape {tuple(own.shape)} and the teacher's {tuple(theirs.shape)}: "
                "they are models for different tasks."
            )
        kind: Any = args.divergence
        found = divergence(own, theirs, kind)
        # Without a place that counts there is nothing to learn, and a mean would be none.
        return found.mean() if len(found) else found.sum(), teacher

    @torch.no_grad()
    def _ask_teacher(self, inputs: dict[str, Any]) -> Any:
        device = next(self.teacher.parameters()).device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        hidden = bool(self.args.hidden_state_weight)
        return self.teacher(**moved, **({"output_hidden_states": True} if hidden else {}))

    def _from_cache(self, cache: TeacherCache, inputs: dict[str, Any], logits: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest classes and their log-probabilities, (*places, count); padding has probability 0."""
        count, keys = self.args.teacher_top_k, cache.keys(inputs)
        rows = [cache.load(key) for key in keys]
        # (batch, places, classes), where a classifier has one place.
        shape = logits.shape[:-1] if logits.dim() == 3 else (len(logits), 1)
        mask = inputs.get("attention_mask")
        if logits.dim() == 2 or mask is None or mask.shape != shape:
            mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
        classes = torch.zeros((*shape, count), dtype=torch.long, device=logits.device)
        theirs = torch.full((*shape, count), -torch.inf, device=logits.device)
        if any(row is None for row in rows):
            said = log_probabilities(self._ask_teacher(inputs).logits.to(logits.device), self.args.temperature)
            classes, theirs = (found.view(*shape, count) for found in top_classes(said.flatten(0, -2), count))
            for index, key in enumerate(keys):
                cache.keep(key, classes[index][mask[index].bool()], theirs[index][mask[index].bool()])
        else:
            for index, row in enumerate(rows):
                assert row is not None
                place = mask[index].bool()
                classes[index, place], theirs[index, place] = row[0].to(classes.device), row[1].to(theirs.device)
        return classes.view(*logits.shape[:-1], count), theirs.view(*logits.shape[:-1], count)

    def _hidden_states(self, own: Any, theirs: Any, mask: Tensor | None) -> Tensor:
        """Mean over the pairs of the squared error relative to the teacher's mean square."""
        losses = []
        for index, (student, teacher) in enumerate(self.layer_pairs):
            first = _state_at(_inner(self.model), own, student)
            second = _state_at(self.teacher, theirs, teacher).to(first.device)
            if mask is not None and mask.dim() == 2 and mask.shape == first.shape[:2]:
                first, second = first[mask.bool()], second[mask.bool()]
            if self.projections is not None:
                first = self.projections[index](first)
            second = second.float()
            losses.append((first.float() - second).square().mean() / second.square().mean().clamp_min(1e-12))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _remember(self, found: Tensor, teacher: Any, labels: Any, size: int) -> None:
        parts = {"divergence": found}
        loss = getattr(teacher, "loss", None)
        if labels is not None and loss is not None:
            parts["teacher_loss"] = loss
        for name, value in parts.items():
            before = self._sums.get(name, torch.zeros((), device=value.device))
            self._sums[name] = before + size * value.detach().float()
        self._count += size

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if any(inputs.get(name) is not None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # The Trainer has no loss without labels; here the divergence is one.
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach().mean(), None if prediction_loss_only else outputs.logits.detach(), None

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        self._sums, self._count = {}, 0
        output = super().evaluation_loop(*args, **options)
        prefix = options.get("metric_key_prefix", "eval")
        for name, total in self._sums.items():
            count = torch.full_like(total, self._count)
            sums = self.accelerator.gather(torch.stack((total, count)).unsqueeze(0)).sum(dim=0)
            output.metrics[f"{prefix}_{name}"] = float(sums[0] / sums[1])
        return output

    def create_optimizer(self, model: Any = None) -> Any:
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made_here and self.projections is not None:
            optimizer.add_param_group({"params": list(self.projections.parameters()), "weight_decay": 0.0})
            # The Trainer averages and clears the gradients of its model alone.
            optimizer.register_step_pre_hook(lambda *_: self._average_gradients())
            optimizer.register_step_post_hook(lambda *_: self.projections.zero_grad())
        return optimizer

    def _average_gradients(self) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in self.projections.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # Only a checkpoint of the training: the student itself does without.
        folder = Path(output_dir or self.args.output_dir)
        if self.projections is not None and folder.name.startswith("checkpoint-"):
            save_file(self.projections.state_dict(), folder / PROJECTIONS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / PROJECTIONS
        if self.projections is not None and file.exists():
            self.projections.load_state_dict(load_file(file))


def _inner(model: Any) -> Any:
    """The Transformers model under an adapter."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") and hasattr(model, "peft_config") else model
    if inner is None:
        raise ConfigurationError("`model` is missing; `model_init` is not supported.")
    if not isinstance(inner, PreTrainedModel):
        raise ConfigurationError(f"`model` is a {type(inner).__name__}, expected a Transformers model.")
    return inner


def _collator(processing_class: Any, dataset: Any) -> Any:
    """Pads labels of tokens with the tokens, which the Trainer's own does not; `None` for all other data."""
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        return None
    try:
        labels = dataset[0]["labels"]
    except (TypeError, KeyError, IndexError, NotImplementedError):
        return None  # a stream, or no labels
    if not hasattr(labels, "__len__"):
        return None
    if processing_class.pad_token_id is None:
        return default_data_collator  # sequences of one length need no padding
    return DataCollatorForSeq2Seq(processing_class)


def _is_causal(model: nn.Module) -> bool:
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _state_at(model: nn.Module, states: Any, layer: int) -> Tensor:
    """The hidden state after `layer` layers; of a model that runs fewer, larger steps the one nearest in time."""
    running = running_blocks(model)
    if running is None or running.iterations == running.depth:
        state: Tensor = states[layer]
        return state
    times = torch.tensor([0.0, *running.schedule.steps], dtype=torch.float64).cumsum(0)
    nearest: Tensor = states[int((times - layer).abs().argmin())]
    return nearest


def _check_pair(args: DistillationConfig, student: Any, teacher: Any) -> None:
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


def _require_same_classes(student: Any, teacher: Any) -> None:
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


def _layer_pairs(args: DistillationConfig, student: Any, teacher: Any) -> list[tuple[int, int]]:
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


def _projections(args: DistillationConfig, pairs: list[tuple[int, int]], student: Any, teacher: Any) -> Any:
    """Where the widths differ: a learned map from the student's to the teacher's for every pair."""
    own, theirs = student.get_text_config().hidden_size, teacher.get_text_config().hidden_size
    if not pairs or own == theirs:
        return None
    return nn.ModuleList(nn.Linear(own, theirs, bias=False) for _ in pairs)


def _rows(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if wanted is None else flat[wanted.to(flat.device)]


def _without_hidden(outputs: Any) -> Any:
    """Evaluation would gather them."""
    if "hidden_states" in outputs:
        outputs.hidden_states = None
    return outputs
