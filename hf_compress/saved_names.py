"""Checkpoints of a training whose names are those of the files, not of the modules."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .errors import CheckpointError


def accept_saved_names(model: PreTrainedModel) -> None:
    """Let `load_state_dict` find what `save_pretrained` wrote.

    Transformers saves ViT, DINOv2 and others under the names of their first releases, and cuts some matrices for the
    file, as those of experts. `from_pretrained` knows both; the Trainer, when it resumes or takes back its best
    checkpoint, hands the file to `load_state_dict`, which leaves out what it does not know. A matrix that cannot be
    put together again is refused with a `CheckpointError`.
    """
    if not any(getattr(hook, "hook", None) is _translate for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_translate)


def _translate(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = model.state_dict(keep_vars=True)
    if all(prefix + name in state_dict for name in own):
        return
    names = {_identity(tensor): name for name, tensor in own.items() if tensor.data_ptr()}
    cut = set()
    for saved, tensor in revert_weight_conversion(model, dict(own)).items():
        if saved in own or prefix + saved not in state_dict:
            continue
        name = names.get(_identity(tensor))
        if name is None:
            cut.add(saved)
        elif prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + saved)
    if cut:
        missing = {name: tensor for name, tensor in own.items() if prefix + name not in state_dict}
        for _, group in groupby(missing, key=_block):  # the numbers of a whole model would be larger than it
            cut -= _join(model, {name: missing[name] for name in group}, state_dict, prefix)
    if cut:
        raise CheckpointError(
            f"{min(cut)!r} is a part of a matrix of this {type(model).__name__}, which was cut for the file, and "
            "load_state_dict (the Trainer's resuming) cannot put it together again: the weights would stay as "
            "they are. Load the checkpoint with from_pretrained and train on from it."
        )


def _join(model: PreTrainedModel, tensors: dict[str, Tensor], state_dict: dict[str, Any], prefix: str) -> set[str]:
    """Put tensors together from their parts in `state_dict`; the names of the parts that were used.

    Transformers cuts tensors of the same shapes that hold the numbers of their places, so every part says what it is.
    """
    places, ends, end = {}, {}, 0
    for name, tensor in tensors.items():
        places[name] = torch.arange(end, end + tensor.numel()).view(tensor.shape)
        ends[name] = end = end + tensor.numel()
    parts = {
        saved: part
        for saved, part in revert_weight_conversion(model, dict(places)).items()
        if part.numel() and prefix + saved in state_dict and state_dict[prefix + saved].shape == part.shape
    }
    used: set[str] = set()
    for name, own in places.items():
        begin = ends[name] - own.numel()
        mine = {s: part - begin for s, part in parts.items() if begin <= part.min() and part.max() < ends[name]}
        if not mine or sum(part.numel() for part in mine.values()) != own.numel():
            continue
        whole = state_dict[prefix + next(iter(mine))].new_empty(own.numel())
        for saved, part in mine.items():
            whole[part.flatten().to(whole.device)] = state_dict.pop(prefix + saved).flatten()
        state_dict[prefix + name] = whole.view(own.shape)
        used |= mine.keys()
    return used


def _block(name: str) -> str:
    """What the names of a block's tensors begin with."""
    found = re.match(r".*?\.\d+\.", name)
    return found.group() if found else name


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
