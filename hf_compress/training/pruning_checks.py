"""What a pruning in a training refuses before it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, UnsupportedModelError
from ..layout import layout_of
from ..methods.pruning.configuration import PruningConfig
from ..methods.pruning.masks import mask_of, masked_modules
from ..methods.pruning.method import Pruning
from ..methods.pruning.modules import SparseLinear


def check_recipe(model: PreTrainedModel, config: PruningConfig | None) -> None:
    """Whether a training of this model can carry out a recipe. Raises `ConfigurationError`."""
    types = {entry["type"] for entry in layout_of(model)}
    if types - set(Pruning.continues):
        raise ConfigurationError(
            f"the model holds compressed modules ({', '.join(sorted(types))}) that cannot be pruned. Prune the "
            "dense original."
        )
    if config is None and SparseLinear.layout_type not in types and not masked_modules(model):
        raise ConfigurationError(
            "the model has no pruned matrices whose zeros could be kept. Give a PruningConfig, or load the model "
            "with compression_config=PruningConfig(...). Heads and columns that were removed need no callback."
        )
    if config is None:
        return
    if config.criterion == "wanda":
        raise ConfigurationError('PruningConfig: `criterion="wanda"` is for models that are not trained.')
    if config.calibration is not None:
        raise ConfigurationError("PruningConfig: `calibration` has no effect in a training, which has its own data.")
    masks = (mask_of(module) for module in masked_modules(model).values())
    if config.structured and (types or any(mask is not None and not mask.all() for mask in masks)):
        raise ConfigurationError(
            "PruningConfig: `structured=True` removes heads and columns of a dense model, and in this one single "
            "weights are pruned already. Begin with the dense original; to resume a training, load that first."
        )
    if config.base_model is not None:
        raise ConfigurationError(
            "PruningConfig: `base_model` has no effect in a training: the weights at its start are the base."
        )
    if config.criterion in ("delta", "movement") and config.schedule == "single_shot" and not config.start_step:
        raise ConfigurationError(
            f"PruningConfig: criterion {config.criterion!r} knows nothing at the start of a training. Give "
            '`start_step`, or schedule="cubic" with `end_step`.'
        )


def check_head(model: Any) -> None:
    """Whether there is something outside the base model for `warmup_steps` to train. Raises `ConfigurationError`."""
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    if model.base_model is model or all(id(parameter) in inside for parameter in model.parameters()):
        raise ConfigurationError(
            f"PruningConfig: `warmup_steps` trains the head first, and {type(model).__name__} has no head of its own."
        )


def plain_model(model: Any) -> PreTrainedModel:
    """What a wrapper for several devices holds. Raises `UnsupportedModelError` if it is no Transformers model."""
    inner = model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model
    adapted = hasattr(inner, "get_base_model") and hasattr(inner, "peft_config")
    if adapted or getattr(inner, "_hf_peft_config_loaded", False):
        raise ConfigurationError(
            "the model carries a PEFT adapter: the matrices are frozen under it and their zeros stay. Train it "
            "without a PruningCallback, or prune before the adapter is attached."
        )
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"expected a Transformers model (PreTrainedModel), got {type(inner).__name__}.")
    return inner


def check_whole(modules: dict[str, nn.Module]) -> None:
    """Whether matrices are whole on this process. Raises `UnsupportedModelError`."""
    for path, module in modules.items():
        weight = module.get_parameter("weight")
        if weight.is_meta or weight.numel() == 0 or type(weight.data) is not torch.Tensor:
            raise UnsupportedModelError(
                f"the weight of {path!r} is not whole on this process (offloaded, or spread by FSDP, ZeRO-3 or tensor "
                "parallelism): masks under one threshold need whole matrices. Train with DDP."
            )
