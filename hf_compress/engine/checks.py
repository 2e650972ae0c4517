"""What a model has to be before it is compressed."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, NumericalError, UnsupportedModelError
from ..layout import UNFINISHED, layout_of


def require_dense(model: PreTrainedModel, goes_on: bool) -> None:
    """Refuse a model that is wrapped, half compressed, quantized, or compressed and no method goes on with it.

    Raises:
        UnsupportedModelError, ConfigurationError: with what to do.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a Transformers model (PreTrainedModel), got {type(model).__name__}. "
            "Compress before wrapping: first compress(model), then PEFT, DDP or compile."
        )
    if UNFINISHED in model.__dict__:
        raise ConfigurationError(
            "an earlier compression of this model was interrupted or failed, and some of its blocks are compressed. "
            "Load the dense model again; with the same working_directory the run goes on where it stopped."
        )
    if layout_of(model) and not goes_on:
        raise ConfigurationError(
            "the model is compressed already, and a second compression on top of the first is not supported. "
            "Compress the dense original with the recipe that you want."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and type(quantizer).__module__.split(".")[0] != __name__.split(".")[0]:
        method = quantizer.quantization_config.quant_method
        raise ConfigurationError(
            f"the model is quantized with {getattr(method, 'value', method)}; its weights are not plain matrices. "
            "Load the original in float32 or bfloat16 and compress that."
        )


def require_finite_weights(model: nn.Module) -> None:
    """Raise `NumericalError` for a weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise NumericalError(f"the weight {name!r} holds NaN or infinite values: the checkpoint is damaged.")
