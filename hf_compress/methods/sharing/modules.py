"""Layers that use another layer's matrices."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...anatomy import MATRICES, dense_rows
from ...checked import is_integer, is_path, short
from ...errors import CompressionError
from ...layout import register_module_type, require_gathered


@register_module_type
class SharedLinear(nn.Linear):
    """`y = s (x (W + B A)ᵀ + b)` where W is this layer's own or another's.

    Attributes:
        weight: (1, out, in) where the matrix is kept here, one byte where it is another's: in both cases another
            shape than the dense one's, so that Transformers alone stops.
        lora_A, lora_B: (rank, in) and (out, rank), of this loop alone.
        step: s, what an iteration's size scales the block's output by; 1 in the full model.
    """

    layout_type: ClassVar[str] = "shared_linear"
    #: Nothing may be merged into `weight`: other layers use it.
    packs_weight: ClassVar[bool] = True
    source: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        source: str | None,
        rank: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if source:
            self.register_buffer("weight", torch.zeros(1, dtype=torch.uint8, device=device))
        else:
            self.weight = nn.Parameter(torch.empty((1, out_features, in_features), device=device, dtype=dtype))
        self._make_own(in_features, out_features, bias, source, rank, device, dtype)

    def _make_own(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        source: str | None,
        rank: int,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        """Everything but the matrix."""
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.source_path = source
        self.step = 1.0

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.lora_A = parameter(rank, in_features) if rank else None
        self.lora_B = parameter(out_features, rank) if rank else None
        # Not a child: the matrix belongs to the other layer.
        self.__dict__["source"] = None if source else self

    def spec(self) -> dict[str, Any]:
        return {"source": self.source_path, "rank": self.rank, "bias": self.bias is not None}

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> SharedLinear:
        if not isinstance(dense, (nn.Linear, Conv1D)):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an nn.Linear or a Conv1D")
        rows, columns = dense_rows(dense).shape
        source, rank, bias = spec["source"], *cls.own_sizes(rows, columns, spec)
        if source is not None and not is_path(source):
            raise ValueError(f"`source` must be a module path or null, got {short(source)}")
        weight: Any = dense.weight
        return cls(columns, rows, bias, source=source, rank=rank, device=weight.device, dtype=weight.dtype)

    @staticmethod
    def own_sizes(rows: int, columns: int, spec: dict[str, Any]) -> tuple[int, bool]:
        """Rank and presence of a bias from a spec. Raises `ValueError` for what does not fit a matrix of this size."""
        rank, bias = spec["rank"], spec["bias"]
        if not is_integer(rank, 0, min(rows, columns)):
            raise ValueError(f"`rank` must be from 0 to {min(rows, columns)}, got {short(rank)}")
        if not isinstance(bias, bool):
            raise ValueError(f"`bias` must be true or false, got {short(bias)}")
        return rank, bias

    def connect(self, source: nn.Module) -> None:
        """Use the matrix of `source`. Raises `ValueError` if it has none of the same shape."""
        if not isinstance(source, SharedLinear) or source.source_path is not None:
            raise ValueError(f"uses the matrix of a {type(source).__name__} that keeps none")
        if (source.in_features, source.out_features) != (self.in_features, self.out_features):
            raise ValueError("uses a matrix of another shape")
        self.__dict__["source"] = source

    @property
    def dense_weights(self) -> int:
        """Weights of the dense layer."""
        return self.in_features * self.out_features

    @property
    def kept_weights(self) -> int:
        """Weights that are stored for this layer."""
        own = 0 if self.source_path else self.dense_weights
        return own + self.rank * (self.in_features + self.out_features)

    def own_matrix(self) -> Float[Tensor, "rows columns"]:
        """The matrix that is kept here."""
        return self.weight[0]

    def times_own_matrix(
        self, input: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None
    ) -> Float[Tensor, "*batch rows"]:
        """`x Wᵀ + b` with the matrix that is kept here, for a loop that may be on another device."""
        return nn.functional.linear(input, self.own_matrix().to(input.device), bias)

    def _owner(self) -> SharedLinear:
        """The layer that keeps the matrix."""
        owner: SharedLinear = self.source
        if owner.weight.is_meta and not self.weight.is_meta:
            raise CompressionError(
                f"the matrix at {self.source_path!r}, which other layers use, is offloaded. Put its block on a device "
                "in the device_map."
            )
        if owner is not self:
            require_gathered(owner, self.source_path)
        return owner

    def shared_weight(self) -> Float[Tensor, "rows columns"]:
        """W, on this layer's device."""
        weight = self._owner().own_matrix()
        return weight if self.weight.is_meta else weight.to(self.weight.device)

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        bias = self.bias if self.bias is not None else self._bias_of_source()
        return self.corrected(input, self._owner().times_own_matrix(input, bias))

    def corrected(
        self, input: Float[Tensor, "*batch columns"], output: Float[Tensor, "*batch rows"]
    ) -> Float[Tensor, "*batch rows"]:
        """What this loop makes of the shared matrix's output: its correction added, its step taken."""
        if self.lora_A is not None and self.lora_B is not None:
            output = output + nn.functional.linear(nn.functional.linear(input, self.lora_A), self.lora_B)
        return output if self.step == 1.0 else output * self.step

    def _bias_of_source(self) -> Tensor | None:
        return None if self.source is self else self.source.bias

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        """The dense matrix with the correction added."""
        weight = self.shared_weight().detach()
        if self.lora_A is not None and self.lora_B is not None:
            weight = weight + (self.lora_B.double() @ self.lora_A.double()).to(weight.dtype)
        state = {"weight": weight.T.contiguous() if isinstance(dense, Conv1D) else weight.clone()}
        bias = self.bias if self.bias is not None else self._bias_of_source()
        return state if bias is None else {**state, "bias": bias.detach().clone()}

    def reset_parameters(self) -> None:
        raise CompressionError("a SharedLinear has no dense weight to initialise.")

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, source={self.source_path!r}, rank={self.rank}"


@register_module_type
class SharedModule(nn.Module):
    """A norm of another loop."""

    layout_type: ClassVar[str] = "shared_module"
    source: Any
    #: Class and sizes of the module that a layout replaces.
    stands_for: tuple[type[nn.Module], dict[str, torch.Size]] | None

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source_path = source
        self.stands_for = None
        self.__dict__["source"] = None

    def spec(self) -> dict[str, Any]:
        return {"source": self.source_path}

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> SharedModule:
        if not is_path(spec["source"]):
            raise ValueError(f"`source` must be a module path, got {short(spec['source'])}")
        shapes = _own_shapes(dense)
        if isinstance(dense, (*MATRICES, nn.Embedding)) or not shapes:
            raise ValueError(f"replaces a {type(dense).__name__}, expected a norm")
        module = cls(spec["source"])
        module.stands_for = (type(dense), shapes)
        return module

    def connect(self, source: nn.Module) -> None:
        """Use `source`. Raises `ValueError` for a module of another class or size than the one that stood here, and
        for one that uses others itself: calls would go round in a circle."""
        if any(isinstance(inner, SharedModule) for inner in source.modules()):
            raise ValueError("uses a module that is another's itself")
        if self.stands_for not in (None, (type(source), _own_shapes(source))):
            raise ValueError(f"uses a {type(source).__name__} of another kind or size than the module it replaces")
        self.__dict__["source"] = source

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        require_gathered(self.source, self.source_path)
        return self.source(*args, **kwargs)

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.source.state_dict().items()}


def _own_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Of the parameters that are no child's."""
    return {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}


def other_loops(model: nn.Module) -> dict[str, list[str]]:
    """Of every layer whose matrix others use: the paths of those."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SharedLinear)}
    using: dict[int, list[str]] = {}
    for path, layer in layers.items():
        if layer.source is not layer:
            using.setdefault(id(layer.source), []).append(path)
    return {path: using[id(layer)] for path, layer in layers.items() if id(layer) in using}
