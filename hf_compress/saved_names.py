"""Checkpoints of a training whose names are those of the files, not of the modules."""

from __future__ import annotations

import re
from functools import reduce
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
    file, as those of experts, or joins them. `from_pretrained` knows both; the Trainer, when it resumes or takes back
    its best checkpoint, hands the file to `load_state_dict`, which leaves out what it does not know. A matrix whose
    parts are not all in the same state dict (the shards of a checkpoint come one by one) is refused with a
    `CheckpointError`.
    """
    if not any(getattr(hook, "hook", None) is _translate for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_translate)


def _translate(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = model.state_dict(keep_vars=True)
    if all(prefix + name in state_dict for name in own):
        return
    names, cut = {id(tensor): name for name, tensor in own.items()}, False
    for saved, tensor in revert_weight_conversion(model, dict(own)).items():
        if saved in own or prefix + saved not in state_dict:
            continue
        name = names.get(id(tensor))
        cut |= name is None
        if name is not None and prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + saved)
    missing = [name for name in own if prefix + name not in state_dict] if cut else []
    for _, group in groupby(missing, key=_block):  # the places of a whole model would be larger than it
        _join(model, {name: own[name] for name in group}, state_dict, prefix)


def _join(model: PreTrainedModel, tensors: dict[str, Tensor], state_dict: dict[str, Any], prefix: str) -> None:
    """Put tensors together from the file's. Transformers converts tensors of the same shapes that hold the numbers of
    their places, and so every one of the file's says what it is made of."""
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = torch.arange(end, end + tensor.numel(), device="cpu").view(tensor.shape)
        end += tensor.numel()
    parts = {
        saved: (part, int(part.min()), int(part.max()))
        for saved, part in revert_weight_conversion(model, dict(places)).items()
        if part.numel() and prefix + saved in state_dict
    }
    for name, own in places.items():
        if not own.numel():
            continue
        first, last = int(own.flatten()[0]), int(own.flatten()[-1])
        mine = [saved for saved, (_, low, high) in parts.items() if low <= last and high >= first]
        if not mine:
            continue  # a key that is missing, as any other
        dtype = reduce(torch.promote_types, [state_dict[prefix + saved].dtype for saved in mine])
        whole = torch.empty(own.numel(), dtype=dtype, device="cpu")
        filled = torch.zeros(own.numel(), dtype=torch.bool, device="cpu")
        for saved in mine:
            part, value = parts[saved][0], state_dict[prefix + saved]
            if value.shape == part.shape:
                inside = (part >= first) & (part <= last)
                at = part[inside] - first
                whole[at], filled[at] = value.cpu()[inside].to(dtype), True
        if not filled.all():
            raise CheckpointError(
                f"{mine[0]!r} is a part of {name!r} of this {type(model).__name__}, which was cut for the file, and "
                "load_state_dict (the Trainer's resuming) does not find the other parts beside it, or not in their "
                "shapes: the weights would stay as they are. Load the checkpoint with from_pretrained and train on "
                "from it."
            )
        state_dict[prefix + name] = whole.view(own.shape)
    for saved in parts:
        del state_dict[prefix + saved]


def _block(name: str) -> str:
    """What the names of a block's tensors begin with."""
    found = re.match(r".*?\.\d+\.", name)
    return found.group() if found else name
