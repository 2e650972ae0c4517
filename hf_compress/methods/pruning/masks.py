"""Masks on dense modules: how a model is pruned while it is trained.

The modules stay as they are, so that the optimizer's parameters stay the model's. What is kept stands beside the
weight in a buffer, and what a criterion has gathered in another: both are part of the state dict, so that checkpoints
of a training hold them and resuming from anywhere restores them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...anatomy import dense_rows
from ...engine.exclusion import is_excluded
from ...errors import ConfigurationError
from ...layout import MASKED
from ...resized import stood_on
from .configuration import Values
from .format import store
from .modules import SparseLinear

MASK, BEFORE, SCORE, START, VALUE, STATE = (
    f"pruning_{name}" for name in ("mask", "before", "score", "start", "value", "state")
)
BUFFERS = (MASK, BEFORE, SCORE, START, VALUE, STATE)
# How the values of an opened layer were stored.
STORED = "pruning_values"


def mask_of(module: nn.Module) -> Bool[Tensor, "*shape"] | None:
    """What is kept of a dense module's weight, in the weight's shape."""
    return module._buffers.get(MASK)


def masked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The dense modules with masks, by path."""
    return {path: module for path, module in model.named_modules() if mask_of(module) is not None}


def attach_masks(modules: Iterable[nn.Module]) -> None:
    """Give modules that have none a mask that keeps everything."""
    for module in modules:
        if mask_of(module) is None:
            weight = module.get_parameter("weight")
            module.register_buffer(MASK, torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        if not any(getattr(hook, "hook", None) is _fill_in for hook in module._load_state_dict_pre_hooks.values()):
            module.register_load_state_dict_pre_hook(_fill_in)


def _fill_in(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """A training's state dict lacks what it had no more need of when it was taken; a strict load would miss it."""
    if prefix + MASK in state_dict:
        for name in (BEFORE, SCORE, START, VALUE):
            if name in module._buffers:
                state_dict.setdefault(prefix + name, module.get_buffer(name))


def has_lost_masks(model: PreTrainedModel) -> bool:
    """Whether a model comes from a training's checkpoint by `from_pretrained`, which does not read its masks."""
    return bool(getattr(model.config, MASKED, False)) and not masked_modules(model)


def lost_masks_error() -> ConfigurationError:
    """Why such a model is not pruned further."""
    return ConfigurationError(
        "the model comes from a checkpoint of a pruning in a training, whose masks from_pretrained leaves out: what "
        "was pruned would come back. Resume that training (resume_from_checkpoint), which ends with a sparse model; "
        f"or, to prune it as the dense model that it is now, del model.config.{MASKED}."
    )


@torch.no_grad()
def apply_masks(modules: Iterable[nn.Module]) -> None:
    """Set to zero what the masks leave out: neither momentum nor weight decay brings it back."""
    for module in modules:
        mask = mask_of(module)
        if mask is not None:
            # Not a product: that of zero and infinity is none.
            module.get_parameter("weight").masked_fill_(~mask, 0.0)


def remove_masks(model: PreTrainedModel) -> None:
    """Take off masks and all that criteria gathered."""
    model.config.__dict__.pop(MASKED, None)
    for module in model.modules():
        for name in BUFFERS:
            module._buffers.pop(name, None)


def open_layers(model: PreTrainedModel, modules_to_not_convert: Sequence[str] = ()) -> None:
    """Dense modules with masks in place of sparse layers, as a training or another pruning needs them."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is SparseLinear and not is_excluded(path, modules_to_not_convert)
    ]
    if not found:
        return
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for path, layer in found:
        dense = skeleton.get_submodule(path)
        opened = _dense_module(layer, dense)
        opened.train(layer.training)
        model.set_submodule(path, opened)


@torch.no_grad()
def _dense_module(layer: SparseLinear, dense: nn.Module) -> nn.Module:
    transposed = isinstance(dense, Conv1D)
    dense, _ = stood_on(dense, layer.spec())
    if tuple(dense_rows(dense).shape) != (layer.out_features, layer.in_features):
        # Inside an attention that was replaced as a whole, with heads of its own size.
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    weight, mask = layer.matrix(), layer.mask()
    kept: dict[str, Any] = {"weight": weight.T.contiguous() if transposed else weight}
    if layer.bias is not None:
        kept["bias"] = layer.bias.detach()
    dense.to(weight.dtype).to_empty(device=weight.device)
    dense.load_state_dict(kept)
    dense.register_buffer(MASK, mask.T.contiguous() if transposed else mask)
    wanted = layer.values.requires_grad or not isinstance(layer.values, nn.Parameter)
    for parameter in dense.parameters():
        parameter.requires_grad_(wanted)
    dense.__dict__[STORED] = layer.format.values
    return dense


@torch.no_grad()
def sparse_layer(module: nn.Module, mask: Bool[Tensor, "*shape"], values: Values) -> SparseLinear:
    """The sparse layer in place of a dense module, for a mask in the shape of its weight; values are stored as they
    were before where nothing else is asked for."""
    values = module.__dict__.get(STORED, values) if values == "auto" else values
    rows = mask.T if isinstance(module, Conv1D) else mask
    weight = dense_rows(module)
    return SparseLinear.in_place_of(module, store(weight, rows, values, weight.dtype))
