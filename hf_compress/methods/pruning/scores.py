"""Scores of a model's matrices without a training: from the weights, a base checkpoint, or gradients on batches."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import ModelAnatomy, resolve_anatomy, text_config
from ...engine.blocks import Batch, model_inputs, next_token_labels, only_these_train
from ...engine.session import Session
from ...errors import CalibrationError, ConfigurationError, NumericalError
from . import mathematics
from .configuration import PruningConfig
from .masks import mask_of

Scores = dict[str, Tensor]


def score_matrices(session: Session, config: PruningConfig, paths: Sequence[str]) -> Scores:
    """A score for every weight of the matrices at `paths`, in the weights' shapes; what is pruned already has none.

    Raises:
        CalibrationError: data without labels.
        ConfigurationError: a base checkpoint that does not fit.
        NumericalError: gradients that are not finite on any batch.
    """
    model = session.anatomy.model
    weights = {path: model.get_submodule(path).get_parameter("weight").detach() for path in paths}
    if config.criterion == "delta":
        base, session.notes["base_model_checksum"] = base_weights(session.anatomy, config, weights)
        return scores_now(config, weights, start=base)[0]
    if not config.needs_gradients:
        return scores_now(config, weights)[0]
    warn_if_fresh_head(model)
    if config.criterion == "sensitivity":
        return _Gradients(session, weights).mean_sensitivity()
    scores, terms = scores_now(config, weights, gradients=_Gradients(session, weights).mean())
    if terms is not None:
        session.notes["sensitivity_to_magnitude"] = rounded_ratio(terms)
    return scores


def scores_now(
    config: PruningConfig,
    weights: Mapping[str, Tensor],
    *,
    gradients: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> tuple[Scores, tuple[float, float] | None]:
    """Scores that follow from the weights, their gradients or their start alone, in float32.

    Returns:
        The scores, and for `"snip_magnitude"` the sums of its two terms over all weights.
    """
    if config.criterion == "magnitude":
        return {path: _float32(weight).abs_() for path, weight in weights.items()}, None
    if config.criterion == "random":
        # The same numbers every time: what is pruned stays pruned.
        generator = torch.Generator().manual_seed(config.seed)
        return {path: torch.rand(w.shape, generator=generator).to(w.device) for path, w in weights.items()}, None
    if config.criterion == "delta":
        assert start is not None
        return {path: _float32(w).sub_(start[path].to(w.device)).abs_() for path, w in weights.items()}, None
    assert gradients is not None
    if config.criterion == "gradient":
        return {path: _float32(gradients[path]).abs_() for path in weights}, None
    if config.criterion == "snip":
        return {path: _float32(w).mul_(gradients[path]).abs_() for path, w in weights.items()}, None
    scores, sums = {}, [0.0, 0.0]
    for path, weight in weights.items():
        found = mathematics.snip_magnitude(weight.float(), gradients[path], config.magnitude_weight, config.normalize)
        scores[path], sums = found[0], [sums[0] + found[1], sums[1] + found[2]]
    return scores, (sums[0], sums[1])


def _float32(tensor: Tensor) -> Tensor:
    """A copy in float32 to go on with in place: pieces that come and go between those that stay leave holes, which
    took as much memory as the scores themselves."""
    return tensor.detach().to(torch.float32, copy=True)


def rounded_ratio(terms: tuple[float, float]) -> float | str:
    """Of the sensitivity's sum to the magnitude's, for a report."""
    return float(f"{terms[0] / terms[1]:.4g}") if terms[1] else "no magnitude term"


def warn_if_fresh_head(model: Any) -> None:
    """Gradients through a head that was just drawn at random are mostly noise."""
    saved_as = getattr(model.config, "architectures", None)
    if not saved_as:
        return
    fresh = f"the checkpoint was saved as {saved_as[0]}, so parts of this {type(model).__name__}"
    if type(model).__name__ in saved_as:
        # Read with `ignore_mismatched_sizes`, for another number of classes.
        inside = {id(parameter) for parameter in model.base_model.parameters()}
        biases = [p for name, p in model.named_parameters() if name.endswith("bias") and id(p) not in inside]
        if not biases or any(bool(bias.detach().any()) for bias in biases):
            return
        fresh = f"all biases of the head of this {type(model).__name__} are zero, so it seems that parts of it"
    warnings.warn(
        f"{fresh} are new and random, and gradients through them say little about the weights. Train the head first: "
        "PruningCallback(PruningConfig(..., warmup_steps=...)) does.",
        stacklevel=2,
    )


def task_loss(anatomy: ModelAnatomy, batch: Batch) -> Tensor:
    """The model's own loss on a batch: by its labels, or for a causal language model by its tokens.

    Raises:
        CalibrationError: there are no labels.
    """
    model: nn.Module = anatomy.model
    inputs = model_inputs(model, batch)
    labels = batch.get("labels")
    if labels is None and anatomy.predicts_tokens():
        labels = next_token_labels(batch)
    if labels is not None:
        inputs["labels"] = labels.to(next(model.parameters()).device)
        loss = getattr(model(**inputs), "loss", None)
        if loss is not None:
            found: Tensor = loss
            return found
    raise CalibrationError(
        f"the criterion needs the loss of {type(model).__name__}, and the batches have {sorted(batch)}. Give examples "
        "with `labels` through a data_collator, to a model with a head for the task; or choose a criterion without "
        'gradients, such as "magnitude".'
    )


class _Gradients:
    """Gradients of the task's loss, batch by batch; a batch whose gradients are not finite is left out and counted."""

    def __init__(self, session: Session, weights: dict[str, Tensor]) -> None:
        self.session, self.weights = session, weights

    def mean(self) -> Scores:
        """Of the mean loss over all examples."""
        sums = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in self.weights.items()}
        examples = 0
        for batch, gradients in self._batches():
            count = len(next(iter(batch.values())))
            examples += count
            for path, gradient in gradients.items():
                sums[path].add_(gradient, alpha=count)
        return {path: total / examples for path, total in sums.items()}

    def mean_sensitivity(self) -> Scores:
        """|w·g| of a batch, on average."""
        sums = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in self.weights.items()}
        for _, gradients in self._batches():
            for path, gradient in gradients.items():
                sums[path].add_((self.weights[path].float() * gradient).abs())
        return sums

    def _batches(self) -> Iterator[tuple[Batch, Scores]]:
        model, skipped, used = self.session.anatomy.model, 0, 0
        modules = {path: model.get_submodule(path) for path in self.weights}
        parameters = {path: module.get_parameter("weight") for path, module in modules.items()}
        with only_these_train(model, list(parameters.values())):
            for batch in self.session.batches:
                with torch.enable_grad():
                    loss = task_loss(self.session.anatomy, batch)
                    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                gradients = {
                    path: torch.zeros_like(parameter) if gradient is None else gradient
                    for (path, parameter), gradient in zip(parameters.items(), found, strict=True)
                }
                if not mathematics.all_finite(gradients.values()):
                    skipped += 1
                    continue
                used += 1
                yield batch, gradients
        if skipped:
            self.session.notes["skipped_batches"] = skipped
        if not used:
            raise NumericalError(
                f"the gradients are NaN or infinite on all {skipped} calibration batches. Check the data, or load the "
                "model in float32."
            )


def base_weights(anatomy: ModelAnatomy, config: PruningConfig, weights: dict[str, Tensor]) -> tuple[Scores, str]:
    """The same matrices in the base checkpoint, and the SHA-256 over them.

    Raises:
        ConfigurationError: no such checkpoint, other shapes, or another checksum than the recipe names.
    """
    model: Any = anatomy.model
    try:
        base, loading = type(model).from_pretrained(
            config.base_model,
            revision=config.base_model_revision or "main",
            dtype=model.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"the base model {config.base_model!r} cannot be loaded: {error}") from error
    if getattr(base, "hf_quantizer", None) is not None:
        raise ConfigurationError(
            f"the base model {config.base_model!r} is compressed: its weights are not the originals."
        )
    kinds = [text_config(each).model_type for each in (base, model)]
    if kinds[0] != kinds[1]:
        raise ConfigurationError(
            f"the base model {config.base_model!r} is of type {kinds[0]!r} and this one of {kinds[1]!r}: it is no "
            "checkpoint that this model was tuned from."
        )
    blocks = len(resolve_anatomy(base))
    if blocks != len(anatomy):
        raise ConfigurationError(
            f"the base model {config.base_model!r} has {blocks} blocks and this one {len(anatomy)}: it is no "
            "checkpoint that this model was tuned from."
        )
    missing = sorted({f"{path}.weight" for path in weights} & set(loading["missing_keys"]))
    if missing:
        raise ConfigurationError(
            f"the base model {config.base_model!r} has no matrix {missing[0]!r}: it is no checkpoint that this model "
            "was tuned from."
        )
    found: Scores = {}
    digest = hashlib.sha256()
    for path, weight in weights.items():
        own = base.get_submodule(path).get_parameter("weight").detach()
        if own.shape != weight.shape:
            raise ConfigurationError(
                f"{path!r} has shape {tuple(own.shape)} in the base model {config.base_model!r} and "
                f"{tuple(weight.shape)} in this one: it is no checkpoint that this model was tuned from."
            )
        digest.update(path.encode())
        digest.update(own.cpu().contiguous().flatten().view(torch.uint8).numpy())
        found[path] = own
    checksum = digest.hexdigest()
    if config.base_model_checksum not in (None, checksum):
        raise ConfigurationError(
            f"the base model {config.base_model!r} is another one than recorded: its matrices have the checksum "
            f"{checksum}, expected {config.base_model_checksum}. Give base_model_revision, or drop the checksum."
        )
    return found, checksum


def pruned_before(anatomy: ModelAnatomy, paths: Sequence[str]) -> dict[str, Tensor] | None:
    """The masks of an earlier pruning, which nothing un-prunes; `None` if there was none."""
    found = {path: mask_of(anatomy.model.get_submodule(path)) for path in paths}
    if all(mask is None for mask in found.values()):
        return None
    return {
        path: torch.ones_like(anatomy.model.get_submodule(path).get_parameter("weight"), dtype=torch.bool)
        if mask is None
        else mask
        for path, mask in found.items()
    }
