"""Counting weights and bytes, of live models and of skeletons on the meta device."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import ModelAnatomy, weight_count


def count_weights(anatomy: ModelAnatomy) -> tuple[int, int, int]:
    """Weights of the blocks' matrices, weights of the model (tied once), and the bytes of what is stored of it."""
    model: nn.Module = anatomy.model
    matrices = sum(kept_weights(model.get_submodule(path)) for path in anatomy.linear_paths())
    # A matrix kept as codes has no parameter and still its weights; tables that are trained are none of the model's.
    packed = [module for module in model.modules() if getattr(module, "packs_weight", False)]
    coded = sum(kept_weights(module) for module in packed)
    tables = {id(p) for module in packed for name, p in module.named_parameters(recurse=False) if name != "bias"}
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in tables)
    return matrices, coded + dense, stored_bytes(model)


def kept_weights(module: nn.Module) -> int:
    """Weights that a module has or its codes stand for; zeros that are not stored do not count."""
    kept = getattr(module, "kept_weights", None)
    return weight_count(module) if kept is None else int(kept)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors as they are written, those that are one once."""
    # What is written may be a cast copy; which tensors are one shows on the tensors themselves. On the meta device
    # there is no memory to compare, and tied tensors are one object.
    kept: dict[str, Tensor] = module.state_dict(keep_vars=True)
    # Tables that Transformers makes anew when it loads the model.
    for name in getattr(module, "_keys_to_ignore_on_save", None) or ():
        kept.pop(name, None)
    written: dict[str, Tensor] = module.state_dict()
    different = {id(t) if t.is_meta else (t.data_ptr(), t.shape): written[name] for name, t in kept.items()}
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())


def loaded_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What Transformers makes of a tensor when it loads the model in `dtype`: it keeps some in another."""
    kept = model._get_dtype_plan(dtype)  # empty for most
    return next((kept[pattern] for pattern in kept if re.search(pattern.replace("*", ".*"), name)), dtype)
