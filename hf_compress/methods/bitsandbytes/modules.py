"""bitsandbytes' own layers, with their tensors under names that any loader finds."""

from __future__ import annotations

from typing import Any, ClassVar

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from ...checked import is_number, short
from ...layout import register_module_type
from ...resized import resized, shape_spec, stood_on, widened

# Weights that share a scale, and scales that share one of theirs.
BLOCK, NESTED_BLOCK = 64, 256
# Rows of a tile of bitsandbytes' kernel for CPUs.
CPU_ROWS = 32


def _float_dtype(name: Any) -> torch.dtype:
    """A dtype from a spec. Raises `ValueError` for anything else that torch has under that name."""
    if name not in ("float32", "float16", "bfloat16", "float64"):
        raise ValueError(f"{short(name)} is no dtype that weights have")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class _Packed:
    """What both layers share."""

    packs_weight: ClassVar[bool] = True
    _is_hf_initialized: ClassVar[bool] = True
    resized: int = 0
    in_features: int
    out_features: int

    @property
    def dense_weights(self) -> int:
        """Weights of the dense layer."""
        return self.in_features * self.out_features

    def stored_bytes(self) -> int:
        """Bytes in a file of everything that stands for the matrix, without the bias."""
        state: dict[str, Tensor] = {}
        self._save_to_state_dict(state, "", False)  # type: ignore[attr-defined]
        return sum(tensor.numel() * tensor.element_size() for name, tensor in state.items() if name != "bias")

    def _take_over(self, dense: nn.Linear) -> None:
        """What is not quantized of the layer in whose place this one stands."""
        if dense.bias is not None:
            self.bias = nn.Parameter(dense.bias.detach().clone())
        self.resized = resized(dense)
        self.train(dense.training)  # type: ignore[attr-defined]

    @staticmethod
    def _stood_on(dense: nn.Module, spec: dict[str, Any]) -> tuple[nn.Linear, dict[str, Any]]:
        if not isinstance(dense, nn.Linear):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an nn.Linear")
        return stood_on(dense, spec)

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        bias = self.bias
        state = {"weight": self.matrix()}  # type: ignore[attr-defined]
        return widened(state if bias is None else {**state, "bias": bias.detach()}, dense, self.resized or 1)


@register_module_type
class BnbLinear4bit(_Packed, Linear4bit):  # type: ignore[misc]
    """4 bits a weight.

    A file holds `weight`, uint8 of shape (⌈weights / 2⌉, 1), `absmax` and `quant_map`, and with double quantization
    `nested_absmax` and `nested_quant_map`; the numbers of the quantization's state are in the spec.
    """

    layout_type: ClassVar[str] = "bnb_linear4bit"
    #: What PEFT looks for on the model.
    model_flags: ClassVar[dict[str, bool]] = {"is_loaded_in_4bit": True}
    weight: Any
    TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

    @classmethod
    def in_place_of(cls, dense: nn.Linear, *, quant_type: str, double: bool, compute_dtype: Any) -> BnbLinear4bit:
        """The quantized layer on the dense one's device."""
        layer = cls._empty(dense, quant_type, double, compute_dtype)
        weight = Params4bit(
            dense.weight.detach().clone(),
            requires_grad=False,
            quant_type=quant_type,
            compress_statistics=double,
            quant_storage=torch.uint8,
            module=layer,
        )
        layer.weight = weight.to(dense.weight.device)
        layer.quant_state = layer.weight.quant_state
        layer._take_over(dense)
        return layer

    @classmethod
    def _empty(cls, dense: nn.Linear, quant_type: str, double: bool, compute_dtype: Any) -> BnbLinear4bit:
        layer: BnbLinear4bit = cls(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=double,
            quant_type=quant_type,
            device="meta",
        )
        if dense.out_features % CPU_ROWS or dense.in_features % BLOCK:
            # The packing for CPUs with AVX-512 knows whole tiles only, and does not check.
            layer.support_avx512bf16_for_cpu = False
        return layer

    def spec(self) -> dict[str, Any]:
        compute = self.compute_dtype if self.compute_type_is_given else None
        return {
            "quant_type": self.weight.quant_type,
            "dtype": str(self.weight.quant_state.dtype).removeprefix("torch."),
            "double": self.weight.quant_state.nested,
            "offset": float(self.weight.quant_state.offset) if self.weight.quant_state.nested else None,
            "compute_dtype": None if compute is None else str(compute).removeprefix("torch."),
            **shape_spec(self),
        }

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> BnbLinear4bit:
        dense, rest = cls._stood_on(dense, spec)
        if rest["quant_type"] not in ("nf4", "fp4") or not isinstance(rest["double"], bool):
            raise ValueError(
                f"`quant_type` {short(rest['quant_type'])} or `double` {short(rest['double'])} is unknown"
            )
        if rest["double"] and not is_number(rest["offset"]):
            raise ValueError(f"`offset` must be a finite number, got {short(rest['offset'])}")
        compute = None if rest["compute_dtype"] is None else _float_dtype(rest["compute_dtype"])
        _float_dtype(rest["dtype"])
        layer = cls._empty(dense, rest["quant_type"], rest["double"], compute)
        layer.resized, layer.loaded_spec = resized(dense), rest
        device, count = dense.weight.device, dense.weight.numel()
        blocks = -(-count // BLOCK)
        packed = torch.empty((-(-count // 2), 1), dtype=torch.uint8, device=device)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        sizes = {
            "absmax": (blocks, torch.uint8 if rest["double"] else torch.float32),
            "quant_map": (16, torch.float32),
        }
        if rest["double"]:
            sizes["nested_absmax"] = (-(-blocks // NESTED_BLOCK), torch.float32)
            sizes["nested_quant_map"] = (256, torch.float32)
        for name, (size, dtype) in sizes.items():
            layer.register_buffer(name, torch.empty(size, dtype=dtype, device=device))
        if dense.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(dense.bias))
        return layer

    loaded_spec: dict[str, Any] | None = None

    @property
    def compute_type_is_given(self) -> bool:
        """Whether the recipe names a dtype to compute in: the layer itself settles on that of its first input."""
        return bool(self.__dict__.get("_compute_given", self.compute_type_is_set))

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__.setdefault("_compute_given", self.compute_type_is_set)
        output: Tensor = super().forward(x)
        return output

    def check_tensors(self) -> None:
        """After loading: bitsandbytes' parameter of the loaded tensors. Raises `ValueError` for damaged ones."""
        spec = self.loaded_spec
        if spec is None or self.weight.is_meta:
            return
        found = {name: self._buffers.pop(name) for name in self.TENSORS if name in self._buffers}
        for name in self.TENSORS:
            tensor = found.get(name)
            if tensor is not None and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"`{name}` holds numbers that are not finite")
        state = {
            **found,
            "quant_type": spec["quant_type"],
            "blocksize": BLOCK,
            "dtype": spec["dtype"],
            "shape": [self.out_features, self.in_features],
        }
        if spec["double"]:
            offset = float(spec["offset"])
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        device = self.weight.device
        quantized = QuantState.from_dict(dict(state), device=device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            quant_state=quantized,
            blocksize=BLOCK,
            compress_statistics=spec["double"],
            quant_type=spec["quant_type"],
            quant_storage=torch.uint8,
            module=self,
            bnb_quantized=True,
        )
        self.quant_state, self.loaded_spec = quantized, None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        found: dict[str, Tensor] = {}
        super()._save_to_state_dict(found, prefix, keep_vars)
        for name, tensor in found.items():
            inner = name.removeprefix(f"{prefix}weight.")
            if inner == name:
                destination[name] = tensor
            elif inner in self.TENSORS:
                destination[f"{prefix}{inner}"] = tensor

    def matrix(self) -> Tensor:
        """The dense matrix in the dtype that it was quantized from."""
        plain: dict[str, Tensor] = {}
        super()._save_to_state_dict(plain, "", False)  # out of a CPU's own packing
        matrix: Tensor = bitsandbytes.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return matrix


@register_module_type
class BnbLinear8bit(_Packed, Linear8bitLt):  # type: ignore[misc]
    """8 bits a weight with a scale a row: a file holds `weight`, int8 of shape (weights,), and `row_scales`."""

    layout_type: ClassVar[str] = "bnb_linear8bit"
    model_flags: ClassVar[dict[str, bool]] = {"is_loaded_in_8bit": True}
    weight: Any

    @classmethod
    def in_place_of(cls, dense: nn.Linear, *, threshold: float) -> BnbLinear8bit:
        """The quantized layer on the dense one's device."""
        layer = cls._empty(dense, threshold)
        weight, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(dense.weight.detach().to(torch.float16))
        layer._take(weight, scales)
        layer._take_over(dense)
        return layer

    @classmethod
    def _empty(cls, dense: nn.Linear, threshold: float) -> BnbLinear8bit:
        layer: BnbLinear8bit = cls(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            has_fp16_weights=False,
            threshold=threshold,
            device="meta",
        )
        return layer

    def _take(self, weight: Tensor, scales: Tensor) -> None:
        self.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)

    def spec(self) -> dict[str, Any]:
        return {"threshold": self.state.threshold, **shape_spec(self)}

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> BnbLinear8bit:
        dense, rest = cls._stood_on(dense, spec)
        if not is_number(rest["threshold"]) or rest["threshold"] < 0:
            raise ValueError(f"`threshold` must be a finite number and not negative, got {short(rest['threshold'])}")
        layer = cls._empty(dense, float(rest["threshold"]))
        layer.resized = resized(dense)
        device = dense.weight.device
        flat = torch.empty(dense.weight.numel(), dtype=torch.int8, device=device)
        layer.weight = nn.Parameter(flat, requires_grad=False)
        layer.register_buffer("row_scales", torch.empty(dense.out_features, dtype=torch.float32, device=device))
        if dense.bias is not None:
            layer.bias = nn.Parameter(torch.empty_like(dense.bias))
        return layer

    def check_tensors(self) -> None:
        """After loading: bitsandbytes' parameter of the loaded tensors. Raises `ValueError` for damaged ones."""
        if "row_scales" not in self._buffers or self.weight.is_meta:
            return
        scales = self._buffers.pop("row_scales")
        assert scales is not None
        if not torch.isfinite(scales).all():
            raise ValueError("`row_scales` holds numbers that are not finite")
        self._take(self.weight.data.view(self.out_features, self.in_features), scales)

    def _scales(self) -> Tensor:
        found: Tensor = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if "row_scales" in self._buffers:  # not loaded yet
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
            return
        destination[f"{prefix}weight"] = self.weight.data.flatten()
        destination[f"{prefix}row_scales"] = self._scales()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def matrix(self) -> Tensor:
        """The dense matrix in float32."""
        matrix: Tensor = self.weight.data.float() * (self._scales().float() / 127).unsqueeze(1)
        return matrix
