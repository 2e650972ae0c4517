"""How fast the layers of a compressed model are beside dense ones of the same size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError
from ..layout import layout_of


@dataclass(frozen=True)
class LayerLatency:
    """One kind of layer.

    Args:
        path: the first layer of its kind.
        count: layers of the same shape and format.
        description: what it says of itself.
        dense_milliseconds, milliseconds: medians of a dense layer of its size and of itself.
    """

    path: str
    count: int
    description: str
    dense_milliseconds: float
    milliseconds: float

    @property
    def speedup(self) -> float:
        return self.dense_milliseconds / self.milliseconds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup}


def measure_layers(model: PreTrainedModel, *, tokens: int = 1, repeats: int = 9) -> list[LayerLatency]:
    """Time every kind of compressed linear layer of a model beside a dense one, in turns, on random inputs.

    Args:
        model: compressed, in memory.
        tokens: rows of the input.
        repeats: timed turns; the medians are reported.

    Raises:
        ConfigurationError: the model has no compressed linear layer.
    """
    kinds = compressed_layers(model)
    if not kinds:
        raise ConfigurationError(f"{type(model).__name__} has no compressed linear layer to time.")
    return [_measure(model, paths, tokens, repeats) for paths in kinds]


def compressed_layers(model: PreTrainedModel) -> list[list[str]]:
    """Paths of the compressed linear layers, those of one kind together."""
    kinds: dict[Any, list[str]] = {}
    for entry in layout_of(model):
        module = model.get_submodule(entry["path"])
        if isinstance(module, nn.Linear):
            # Densities differ a little from layer to layer: they are one kind.
            density = getattr(module, "density", None)
            rounded = None if density is None else round(density, 2)
            key = (entry["type"], module.in_features, module.out_features, getattr(module, "bits", None), rounded)
            kinds.setdefault(key, []).append(entry["path"])
    return list(kinds.values())


@torch.inference_mode()
def _measure(model: PreTrainedModel, paths: list[str], tokens: int, repeats: int) -> LayerLatency:
    layer: Any = model.get_submodule(paths[0])
    device, dtype = model.device, model.dtype
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device=device, dtype=dtype)
    states = torch.randn(tokens, layer.in_features, device=device, dtype=dtype)
    found: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for times, module in zip(found, (dense, layer), strict=True):
            seconds = _seconds(lambda module=module: module(states), device)  # type: ignore[misc]
            if turn:  # the first one warms up
                times.append(1000 * seconds)
    description = f"{type(layer).__name__}({layer.extra_repr()})"
    return LayerLatency(paths[0], len(paths), description, median(found[0]), median(found[1]))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, on average over a hundredth of a second."""
    count, began = 0, time.perf_counter()
    while True:
        call()
        count += 1
        if device.type != "cpu":
            torch.accelerator.synchronize()
        elapsed = time.perf_counter() - began
        if elapsed > 0.01:
            return elapsed / count
