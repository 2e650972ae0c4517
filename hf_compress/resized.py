"""Linear layers of another size than the dense model's: what decomposition and structured pruning leave."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layout import checked_size, register_module_type

# The fields of a spec that say what size a layer had before it was packed.
_SHAPE = ("in_features", "out_features", "groups")


def stood_on(dense: nn.Module, spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The layer in whose place one with this spec was made, and the spec without its sizes: `dense` itself, or a
    smaller one where an earlier stage had resized it. Raises `ValueError` for sizes that cannot be."""
    if not any(name in spec for name in _SHAPE):
        return dense, spec
    sizes = {name: spec[name] for name in ("in_features", "out_features")}
    sizes.update({"groups": spec["groups"]} if "groups" in spec else {})
    kind = ResizedConv1D if isinstance(dense, Conv1D) else ResizedLinear
    return kind.from_spec(dense, sizes), {name: value for name, value in spec.items() if name not in _SHAPE}


def resized(layer: Any) -> int:
    """0 for a layer of the dense model's size; else the groups of channels of a smaller one, usually 1."""
    return layer.groups if isinstance(layer, (ResizedLinear, ResizedConv1D)) else 0


def shape_spec(layer: Any) -> dict[str, int]:
    """What `stood_on` reads, of a layer that has replaced a resized one: its `resized` is what the function gave."""
    groups = int(getattr(layer, "resized", 0))
    if not groups:
        return {}
    sizes = {"out_features": layer.out_features, "in_features": layer.in_features}
    return {**sizes, "groups": groups} if groups > 1 else sizes


def widened(state: dict[str, torch.Tensor], dense: nn.Module, groups: int = 1) -> dict[str, torch.Tensor]:
    """Weight and bias with zero rows and columns for removed channels: the layers around compute the same with them.

    Args:
        groups: the kept channels stand in front of each of so many groups.
    """
    wide: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        shape = dense.get_parameter(name).shape
        wide[name] = tensor.new_zeros(shape)
        place = wide[name]
        for axis in reversed(range(tensor.dim())):
            if groups > 1 and tensor.shape[axis] < shape[axis]:
                tensor, place = (each.unflatten(axis, (groups, -1)) for each in (tensor, place))
        place[tuple(slice(size) for size in tensor.shape)] = tensor
    return wide


@register_module_type
class ResizedLinear(nn.Linear):
    """An `nn.Linear` with fewer inputs or outputs than the dense model's; the kept channels stand in front.

    It stays a plain linear layer for PEFT, exporters and kernels: only its class tells the layout what it is.

    Attributes:
        groups: in how many equal groups the channels are that have become fewer: the heads of an attention, or gate
            and up in one matrix. The kept ones stand in front of every group.
    """

    layout_type: ClassVar[str] = "linear"
    groups: int = 1

    def spec(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "groups": self.groups} if self.groups > 1 else sizes

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> ResizedLinear:
        if not isinstance(dense, nn.Linear):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an nn.Linear")
        module: ResizedLinear = nn.utils.skip_init(
            cls,
            checked_size(spec, "in_features", dense.in_features),
            checked_size(spec, "out_features", dense.out_features),
            bias=dense.bias is not None,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        if "groups" in spec:
            module.groups = checked_size(spec, "groups", min(module.in_features, module.out_features))
            for now, before in ((module.in_features, dense.in_features), (module.out_features, dense.out_features)):
                if now < before and (now % module.groups or before % module.groups):
                    raise ValueError(f"{now} of {before} channels are not those of {module.groups} equal groups")
        return module

    @classmethod
    def from_tensors(cls, weight: torch.Tensor, bias: torch.Tensor | None, groups: int = 1) -> ResizedLinear:
        """A layer that owns `weight` (out_features, in_features) and `bias` (out_features,)."""
        module = cls(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
        module.weight = nn.Parameter(weight.contiguous(), requires_grad=weight.is_floating_point())
        if bias is not None:
            module.bias = nn.Parameter(bias.contiguous())
        if groups > 1:
            module.groups = groups
        return module

    def dequantize(self, dense: nn.Module) -> dict[str, torch.Tensor]:
        """Zero rows and columns for the removed channels: an MLP with them computes the same function."""
        return widened(dict(self.named_parameters()), dense, self.groups)


@register_module_type
class ResizedConv1D(Conv1D):  # type: ignore[misc]
    """The same for the `Conv1D` of GPT-2, whose weight is (in_features, out_features)."""

    layout_type: ClassVar[str] = "conv1d"
    groups: ClassVar[int] = 1

    @property
    def in_features(self) -> int:
        return int(self.nx)

    @property
    def out_features(self) -> int:
        return int(self.nf)

    def spec(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features}

    @classmethod
    def _on_meta(cls, inputs: int, outputs: int, dtype: torch.dtype) -> ResizedConv1D:
        with torch.device("meta"):
            module: ResizedConv1D = cls(outputs, inputs).to(dtype)
        return module

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> ResizedConv1D:
        if not isinstance(dense, Conv1D):
            raise ValueError(f"replaces a {type(dense).__name__}, expected a Conv1D")
        inputs = checked_size(spec, "in_features", dense.nx)
        module = cls._on_meta(inputs, checked_size(spec, "out_features", dense.nf), dense.weight.dtype)
        module.to_empty(device=dense.weight.device)
        return module

    @classmethod
    def from_tensors(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> ResizedConv1D:
        """A layer that owns `weight` (out_features, in_features), turned round, and `bias` (out_features,)."""
        module = cls._on_meta(weight.shape[1], weight.shape[0], weight.dtype)
        module.weight = nn.Parameter(weight.T.contiguous())
        module.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias.contiguous())
        return module

    def dequantize(self, dense: nn.Module) -> dict[str, torch.Tensor]:
        """Zero rows and columns for the removed channels."""
        return widened(dict(self.named_parameters()), dense)
