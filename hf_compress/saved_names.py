"""Checkpoints of a training whose names are those of the files, not of the modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .errors import CheckpointError


def accept_saved_names(model: PreTrainedModel) -> None:
    """Let `load_state_dict` find what `save_pretrained` wrote.

    Transformers saves ViT, DINOv2 and others under the names of their first releases. `from_pretrained` knows both;
    the Trainer, when it resumes or takes back its best checkpoint, hands the file to `load_state_dict`, which leaves
    out what has another name. Matrices that are cut for the file, as those of experts, are refused with a
    `CheckpointError`.
    """
    if not any(getattr(hook, "hook", None) is _rename for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_rename)


def _rename(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = model.state_dict(keep_vars=True)
    if all(prefix + name in state_dict for name in own):
        return
    names = {_identity(tensor): name for name, tensor in own.items() if tensor.data_ptr()}
    for saved, tensor in revert_weight_conversion(model, dict(own)).items():
        if saved in own or prefix + saved not in state_dict:
            continue
        name = names.get(_identity(tensor))
        if name is None:
            raise CheckpointError(
                f"{saved!r} is a part of a matrix of this {type(model).__name__}, which was cut for the file, and "
                "load_state_dict (the Trainer's resuming) cannot put it together again: the weights would stay as "
                "they are. Load the checkpoint with from_pretrained and train on from it."
            )
        if prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + saved)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
