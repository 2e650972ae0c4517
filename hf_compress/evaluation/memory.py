"""Peak memory of a model at work: what its weights take, and what a run takes on top."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, UnsupportedModelError
from .forward import accepts_logits_to_keep, check_length, evaluation_mode, input_device, vocabulary_size

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryResult:
    """Bytes of memory.

    Attributes:
        weights: bytes of the parameters and buffers.
        growth: bytes that the run took on top at its peak: activations, cache, and working copies of weights.
        workload: what was run.
        device: where.
    """

    weights: int
    growth: int
    workload: str
    device: str

    @property
    def peak(self) -> int:
        return self.weights + self.growth

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "peak": self.peak}


def measure_memory(
    model: PreTrainedModel, *, prompt_length: int = 512, new_tokens: int = 64, batch_size: int = 1
) -> MemoryResult:
    """Peak memory of reading a prompt and generating after it, or of one forward pass of other models.

    Layers that keep a working copy of their weights make it in their first run: measure a model before it is used
    otherwise, else the copy is missing from the result.

    Args:
        model: a causal language model, a text encoder (which reads `prompt_length` tokens) or an image model (which
            sees random images of the size in its configuration).
        prompt_length: tokens of the prompt.
        new_tokens: tokens generated after it.
        batch_size: sequences or images that run together.

    Raises:
        ConfigurationError: for counts below one, more tokens than the model has positions, or a machine that does not
            tell its peak (a CPU under another system than Linux).
        UnsupportedModelError: for a model whose input is neither token ids nor images.
    """
    if min(prompt_length, batch_size) < 1 or new_tokens < 0:
        raise ConfigurationError(
            f"measure_memory needs counts of at least one; got prompt_length={prompt_length}, "
            f"new_tokens={new_tokens}, batch_size={batch_size}."
        )
    run, workload = _workload(model, prompt_length, new_tokens, batch_size)
    device = input_device(model)
    if device.type == "cpu":
        _page_in(model)
    with evaluation_mode(model), torch.inference_mode():
        growth = peak_growth(run, device)
    return MemoryResult(bytes_in_memory(model), growth, workload, device.type)


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    found = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        # Several tensors may be views of one mapped file, so it is not the storages that count.
        found[(tensor.device, tensor.data_ptr() or id(tensor), tensor.nbytes)] = tensor.nbytes
    return sum(found.values())


def _page_in(model: nn.Module) -> None:
    """Weights that are mapped from a file become resident when they are first read: that is no growth of the run."""
    for tensor in model.parameters():
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.detach().reshape(-1).view(torch.uint8)[:: 2**12].sum()


def peak_growth(run: Callable[[], object], device: torch.device) -> int:
    """Bytes by which the memory in use rises above its level before `run()` while that runs.

    On a CPU that is the resident memory of the process, which other threads of it can raise too.
    """
    gc.collect()
    if device.type != "cpu":
        if not hasattr(torch.accelerator, "reset_peak_memory_stats"):
            raise ConfigurationError("peak memory of an accelerator needs torch 2.9 or newer.")
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        torch.accelerator.synchronize(device)
        return max(0, int(torch.accelerator.max_memory_allocated(device)) - int(before))
    _give_back_freed_memory()
    try:
        # Sets the kernel's high-water mark to what is resident now.
        _CLEAR.write_text("5")
    except OSError as error:
        raise ConfigurationError(
            f"peak memory on a CPU is read from {_CLEAR.parent}, which is Linux's and has to be writable: {error}."
        ) from error
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _give_back_freed_memory() -> None:
    """Else the allocator would serve the run from what it still holds, and no growth would be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise ConfigurationError(f"{_STATUS} has no field {field}: peak memory cannot be read on this machine.")
    return 1024 * int(found.group(1))


def _workload(
    model: PreTrainedModel, prompt_length: int, new_tokens: int, batch_size: int
) -> tuple[Callable[[], object], str]:
    device = input_device(model)
    if model.main_input_name == "pixel_values":
        images = torch.randn(batch_size, *_image_shape(model), device=device, dtype=model.dtype)
        size = "×".join(str(length) for length in images.shape[2:])
        return lambda: model(pixel_values=images), f"a forward pass of {batch_size} images of {size}"
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} reads {model.main_input_name!r}; peak memory is measured of models that read "
            f"token ids or images."
        )
    generates = model.can_generate()
    check_length(model, prompt_length + (new_tokens if generates else 0), "the text of the memory measurement")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary_size(model), (batch_size, prompt_length), generator=generator).to(device)
    if not generates:
        return lambda: model(input_ids=prompt), f"a forward pass of {batch_size}×{prompt_length} tokens"
    options = {"logits_to_keep": 1} if accepts_logits_to_keep(model) else {}

    def generate() -> None:
        output = model(input_ids=prompt, use_cache=True, **options)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1).to(device)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **options)

    return generate, f"a prompt of {batch_size}×{prompt_length} tokens and {new_tokens} generated ones"


def _image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    size = getattr(model.config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(getattr(model.config, "num_channels", 3)), int(height), int(width)
