"""Distillation: a Trainer whose model learns from a teacher, whatever either was compressed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
)

from ..engine.resume import model_checksum
from ..errors import ConfigurationError
from ..saved_names import accept_saved_names
from .configuration import DistillationConfig
from .divergence import divergence, log_probabilities, top_classes, with_the_rest
from .pairs import (
    check_pair,
    inner_model,
    is_causal,
    layer_pairs,
    make_projections,
    require_same_classes,
    state_at,
)
from .teacher_cache import TeacherCache

PROJECTIONS = "distillation_projections.safetensors"


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
        student = inner_model(model)
        accept_saved_names(student)
        teacher = teacher_model
        if isinstance(teacher_model, (str, Path)):
            require_same_classes(student.config, AutoConfig.from_pretrained(teacher_model))
            teacher = type(student).from_pretrained(teacher_model, dtype=student.dtype)
        require_same_classes(student.config, teacher.config)
        check_pair(args, student, teacher)
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self.layer_pairs = layer_pairs(args, student.config, teacher.config)
        self.projections = make_projections(args, self.layer_pairs, student.config, teacher.config)
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
        labels = inputs.get("labels")
        if training and args.kl_weight == 1:
            labels = None  # they choose the places below; their loss would be worked out for nothing
        asked = inputs if labels is not None else self._without_labels(inputs)
        outputs = model(**asked, **({"output_hidden_states": True} if with_hidden else {}))
        labels_loss = outputs.loss if labels is not None else None
        wanted = self._wanted(inputs, outputs.logits)
        # In training nobody asks for the teacher's own loss, in evaluation for its hidden states.
        question = self._without_labels(inputs) if training else inputs
        found, teacher = self._divergence(question, outputs.logits, wanted, with_hidden)
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

    def _without_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if getattr(inner_model(self.model).config, "is_encoder_decoder", False):
            return inputs  # its decoder reads them
        return {name: value for name, value in inputs.items() if name != "labels"}

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
        if is_causal(inner_model(self.model)):
            # A place is judged by the token after it; padding before a text is none.
            places = torch.cat((places[:, 1:], torch.zeros_like(places[:, :1])), dim=1)
            if mask is not None and mask.shape == places.shape:
                places = places & mask.bool()
        return places.reshape(-1)

    def _divergence(
        self, inputs: dict[str, Any], logits: Tensor, wanted: Tensor | None, with_hidden: bool = False
    ) -> tuple[Tensor, Any]:
        """Mean over the places that count, and what the teacher said (`None` from the cache)."""
        args: DistillationConfig = self.args
        own = log_probabilities(_rows(logits, wanted), args.temperature)
        teacher = None
        if self.cache is not None:
            classes, theirs = self._from_cache(self.cache, inputs, logits)
            classes, theirs = _rows(classes, wanted), _rows(theirs, wanted)
        else:
            teacher = self._ask_teacher(inputs, with_hidden)
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
    def _ask_teacher(self, inputs: dict[str, Any], with_hidden: bool = False) -> Any:
        device = next(self.teacher.parameters()).device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        return self.teacher(**moved, **({"output_hidden_states": True} if with_hidden else {}))

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
        """Mean over the pairs and places of the squared error relative to the teacher's square at the place.

        Relative to the mean over all places it would be an error of the first token: in many language models that has
        states a thousand times as long as others (Sun et al., Massive Activations, arXiv 2402.17762).
        """
        losses = []
        for index, (student, teacher) in enumerate(self.layer_pairs):
            first = state_at(inner_model(self.model), own, student)
            second = state_at(self.teacher, theirs, teacher).to(first.device)
            if mask is not None and mask.dim() == 2 and mask.shape == first.shape[:2]:
                first, second = first[mask.bool()], second[mask.bool()]
            if self.projections is not None:
                first = self.projections[index](first)
            second = second.float()
            squares = second.square().mean(-1)
            # A place where the teacher has next to nothing shall not outweigh all others.
            squares = squares.clamp_min((squares.median() / 100).clamp_min(1e-12))
            losses.append(((first.float() - second).square().mean(-1) / squares).mean())
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


def _rows(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if wanted is None else flat[wanted.to(flat.device)]


def _without_hidden(outputs: Any) -> Any:
    """Evaluation would gather them."""
    if "hidden_states" in outputs:
        outputs.hidden_states = None
    return outputs
