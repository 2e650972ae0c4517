"""What `save_pretrained` writes of a compressed model: a caller's state dict, and finished files in one go."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import CheckpointError
from .layout import compressed_modules, is_sharded

_GATHER = (
    "Let every process call state_dict = accelerator.get_state_dict(model), and pass save_pretrained(..., "
    "state_dict=state_dict); the Trainer does it where state_dict_type is FULL_STATE_DICT"
)


class _Given(NamedTuple):
    """`state_dict` of a call of `save_pretrained`, and whether this process writes files."""

    state: dict[str, Tensor] | None
    writes: bool


_GIVEN: ContextVar[_Given | None] = ContextVar("given", default=None)


def keep_state_dict(
    save: Callable[..., Any], model: PreTrainedModel, directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """Transformers' `save_pretrained`, with `state_dict` kept for the quantizer: Transformers puts what its quantizer
    returns in place of the caller's, and hands that hook the model alone."""
    is_main = kwargs.get("is_main_process", args[0] if args else True)
    state = kwargs.get("state_dict", args[1] if len(args) > 1 else None)
    token = _GIVEN.set(_Given(state, model.should_save_on_this_rank(is_main)))
    try:
        return save(model, directory, *args, **kwargs)
    finally:
        _GIVEN.reset(token)


def state_to_save(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The caller's state dict, or `None` for the model's own.

    Raises:
        CheckpointError: tensors that FSDP has divided over processes, or a state dict that lacks some of those without
            which the file could never be loaded.
    """
    state, writes = _GIVEN.get() or (None, True)
    if getattr(model, "is_distributed_loading_by_transformers", False):
        return state  # gathered by Transformers
    tensors = dict(model.named_parameters()) if state is None else state
    divided = next((name for name, tensor in tensors.items() if is_sharded(tensor)), None)
    if divided is not None:
        raise CheckpointError(f"{divided!r} is divided over processes by FSDP, which no file can hold. {_GATHER}.")
    if state is not None and writes and not getattr(model, "_hf_peft_config_loaded", False):
        missing = next((name for name in kept_beside_parameters(model) if name not in state), None)
        if missing is not None:
            raise CheckpointError(
                f"the state_dict lacks {missing!r}, a tensor of a compressed layer that is no parameter: the file "
                f"could not be loaded. {_GATHER}."
            )
    return state


def kept_beside_parameters(model: nn.Module) -> list[str]:
    """Names of the buffers of compressed modules that are saved: codes, positions, rotary pairs."""
    names = []
    for path, module in compressed_modules(model):
        buffers = (name for name, buffer in module._buffers.items() if buffer is not None)
        names += [f"{path}.{name}" for name in buffers if name not in module._non_persistent_buffers_set]
    return names


def move_into_place(scratch: Path, target: Path, variant: str | None) -> None:
    """Put finished files where they belong: an interrupted save leaves what was there before.

    The config goes last, and shards of an earlier save go with it: together they say which weights are meant.
    """
    suffix = f"\\.{re.escape(variant)}" if variant else ""
    weight_file = re.compile(
        rf"model(-\d{{5}}-of-\d{{5}})?{suffix}(-\d{{5}}-of-\d{{5}})?\.safetensors|"
        rf"model\.safetensors\.index{suffix}\.json"
    )
    new = sorted(scratch.iterdir(), key=lambda file: file.name == "config.json")
    names = {file.name for file in new}
    for file in new:
        os.replace(file, target / file.name)
    for old in target.iterdir():
        if weight_file.fullmatch(old.name) and old.name not in names:
            old.unlink()
