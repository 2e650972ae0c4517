"""What the measurements share: running a model that may be offloaded, wrapped or in training."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..errors import ConfigurationError

# fp32 logits and their log-softmax are made for so many elements at a time (128 MB), whatever the vocabulary.
LOGIT_ELEMENTS = 2**24


@contextmanager
def evaluation_mode(*models: PreTrainedModel) -> Iterator[None]:
    """No dropout; afterwards every submodule has the training flag that it had before."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the inputs go: the device of the embedding, also when its weights are offloaded."""
    if model.main_input_name != "input_ids":
        return torch.device(model.device)
    embedding = model.get_input_embeddings()
    # An offloaded embedding's weight is on meta between calls; accelerate's hook knows where it runs.
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if place is not None:
        return torch.device(place)
    # A table that is kept as codes has buffers alone.
    held: torch.Tensor = next(itertools.chain(embedding.parameters(), embedding.buffers()))
    return held.device


def accepts_logits_to_keep(model: PreTrainedModel) -> bool:
    """Whether `forward` can compute the logits of the last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of rows of the input embedding: token ids lie in [0, this)."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """Raise `ConfigurationError` where `length` tokens exceed the positions that the model was made for."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigurationError(
            f"{what} is {length} tokens, but the model has {positions} positions (`max_position_embeddings`); "
            f"use at most {positions}."
        )
