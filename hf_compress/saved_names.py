"""Checkpoints of a training whose names are those of the files, not of the modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def accept_saved_names(model: PreTrainedModel) -> None:
    """Let `load_state_dict` find what `save_pretrained` wrote.

    Transformers saves ViT, DINOv2 and others under the names of their first releases. `from_pretrained` knows both;
    the Trainer, when it resumes or takes back its best checkpoint, hands the file to `load_state_dict`, which leaves
    out what has another name.
    """
    if not any(getattr(hook, "hook", None) is _rename for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_rename)


def _rename(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = model.state_dict()
    if all(prefix + name in state_dict for name in own):
        return
    # A matrix that was cut or joined for the file is another tensor, and left to what loads those.
    names = {_identity(tensor): name for name, tensor in own.items() if tensor.data_ptr()}
    for saved, tensor in revert_weight_conversion(model, dict(own)).items():
        name = names.get(_identity(tensor))
        if name is not None and name != saved and prefix + saved in state_dict and prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + saved)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
