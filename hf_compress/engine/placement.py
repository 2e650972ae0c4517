"""Whether every process holds the whole model: what a compression, and the loading of its result, need."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from ..errors import ConfigurationError
from ..layout import compressed_modules, is_sharded

# Arguments of from_pretrained with which Transformers divides a model over processes while it loads.
_SHARDING_ARGUMENTS = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
# Sizes in Transformers' DistributedConfig that divide single layers, or leave some to other processes. FSDP's are not
# among them: it gathers every layer before it is called.
_DIVIDING = ("tp_size", "ep_size", "pp_size")
# Module types whose tensors need nothing done to them after they were read.
_DIVISIBLE = {"linear", "attention", "codebook_linear", "codebook_embedding", "codebook_tied_linear"}
_FIRST = "Compress in processes that hold the whole model each, save the result, and train that"
#: What Accelerate's own option for loading less does to the models of this package.
_EFFICIENT = "FSDP's cpu_ram_efficient_loading is on (FSDP_CPU_RAM_EFFICIENT_LOADING)"


def refuse_sharded_loading(arguments: dict[str, Any]) -> None:
    """Before a dense model is loaded to be compressed.

    Args:
        arguments: those of `from_pretrained`.

    Raises:
        ConfigurationError: the model would be divided over processes while it loads.
    """
    _refuse_zero3(f"a compression needs every weight whole. {_FIRST}")
    given = [name for name in _SHARDING_ARGUMENTS if arguments.get(name) is not None]
    if given:
        raise ConfigurationError(
            f"{given[0]}= divides the model over processes while it loads, and a compression needs every weight "
            f"whole. Leave it out. {_FIRST}."
        )
    _refuse_efficient_loading()


def require_whole(model: nn.Module) -> None:
    """Before a model in memory is compressed.

    Raises:
        ConfigurationError: its weights are divided over processes, or other processes hold none.
    """
    _refuse_zero3(f"a compression needs every weight whole. {_FIRST}")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) or hasattr(parameter, "ds_id"):
            kind = "DeepSpeed ZeRO-3" if hasattr(parameter, "ds_id") else "FSDP2 or tensor parallelism (a DTensor)"
            raise ConfigurationError(
                f"{name!r} is divided over processes by {kind}, and a compression needs every weight whole. Compress "
                "before accelerator.prepare() and without a plan of parallelism, then train."
            )
    _refuse_efficient_loading()


def refuse_unfit_training(model: nn.Module | None, packed: bool) -> None:
    """Before a compressed model is loaded, or trained by the Trainer.

    Args:
        model: the skeleton of the model that is loaded, with its compressed modules; `None` where it is loaded
            already, or not looked at yet.
        packed: whether modules of the model keep tensors that are no parameters, such as codes.

    Raises:
        ConfigurationError: DeepSpeed ZeRO-3, tensor, expert or pipeline parallelism, or a way of loading that
            Accelerate has for parameters alone.
    """
    _refuse_zero3("it cannot divide the tensors of compressed layers. Train with FSDP2, ZeRO-2 or DDP")
    asked: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    for name in _DIVIDING:
        size = getattr(asked, name, None) or 1
        if size > 1:
            raise ConfigurationError(
                f"{name}={size} divides the layers of a model over processes, by a plan for their dense sizes, which "
                "compressed layers do not have. Load the model without tp_plan, tp_size or device_mesh; to divide it, "
                "train it with FSDP2, or call dequantize() and save it dense."
            )
    other = (
        {module.layout_type for _, module in compressed_modules(model)} - _DIVISIBLE if model is not None else set()
    )
    if other and (getattr(asked, "dp_size", None) or 1) > 1:
        raise ConfigurationError(
            f"distributed_config= divides the model over processes while it loads, which modules of type "
            f"{sorted(other)} cannot be. Leave it out, and let Accelerate's FSDP2 divide the model: "
            "accelerator.prepare() or the Trainer's fsdp."
        )
    if packed and is_fsdp_enabled():
        raise ConfigurationError(
            f"{_EFFICIENT}, with which Accelerate sends out parameters alone, and this compressed model keeps other "
            "tensors (codes, positions, rotary pairs) as well. Set cpu_ram_efficient_loading to false."
        )


def _refuse_zero3(reason: str) -> None:
    if is_deepspeed_zero3_enabled():
        raise ConfigurationError(f"DeepSpeed ZeRO-3 is on, and {reason}.")


def _refuse_efficient_loading() -> None:
    if is_fsdp_enabled():
        raise ConfigurationError(
            f"{_EFFICIENT}: some processes hold no weights, and a compression needs them in all. Set it to false. "
            f"{_FIRST}."
        )
