"""The layer that keeps its weights as packed codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import CompressionError, ConfigurationError
from ...kernels import codebook as kernel
from ...kernels.matrix import CodebookMatrix, check_matrix
from ...kernels.packing import pack_codes
from ...layout import checked_size, register_module_type
from .configuration import BITS
from .mathematics import Coded, integer_steps

# Half-precision tensors of the format; a cast of the model must not round them again.
FORMAT_TENSORS = ("codebooks", "scales", "row_scales")


@register_module_type
class CodebookLinear(nn.Linear):
    """`y = x Ŵᵀ + b` with `Ŵ[r, c] = scale[r, c // G] · codebooks[row_codebook[r], code[r, c]]`.

    Args:
        in_features, out_features: as of the dense layer.
        bias: whether there is one.
        bits: 2, 3 or 4.
        books: number of codebooks.
        column_group: columns that share a scale.
        integer_scales: scales in uint8 with one fp16 unit a row.

    Attributes:
        weight: packed codes, int32 (out_features, bits · ⌈in_features / 32⌉).
        codebooks: fp16 (books, 2^bits).
        scales: uint8 or fp16 (out_features, groups); `row_scales`: fp16 (out_features,) or `None`.
        row_codebook: int16 or int32 (out_features,), `None` with a single codebook.
    """

    layout_type: ClassVar[str] = "codebook_linear"
    #: `weight` holds codes: nothing may be added to it.
    packs_weight: ClassVar[bool] = True
    row_scales: Tensor | None
    row_codebook: Tensor | None
    codebooks: Tensor
    scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        bits: int,
        books: int,
        column_group: int,
        integer_scales: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear's: it would make a dense weight. The class is one all the same, for PEFT's "all-linear".
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.column_group = bits, column_group

        def empty(*shape: int, kind: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        groups = -(-in_features // column_group)
        self.register_buffer("weight", empty(out_features, bits * -(-in_features // 32), kind=torch.int32))
        self.register_buffer("codebooks", empty(books, 2**bits, kind=torch.float16))
        scale_type = torch.uint8 if integer_scales else torch.float16
        self.register_buffer("scales", empty(out_features, groups, kind=scale_type))
        self.register_buffer("row_scales", empty(out_features, kind=torch.float16) if integer_scales else None)
        index = torch.int16 if books <= torch.iinfo(torch.int16).max else torch.int32
        self.register_buffer("row_codebook", empty(out_features, kind=index) if books > 1 else None)
        self.register_parameter("bias", nn.Parameter(empty(out_features, kind=dtype)) if bias else None)  # type: ignore[arg-type]

    @classmethod
    def from_coded(cls, dense: nn.Linear, coded: Coded, integer_scales: bool) -> CodebookLinear:
        """The layer for a matrix whose codebooks and scales are rounded as the file holds them."""
        size = coded.codebooks.shape[1]
        module = cls(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            bits=(size - 1).bit_length(),
            books=len(coded.codebooks),
            column_group=coded.column_group,
            integer_scales=integer_scales,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        with torch.no_grad():
            module.get_buffer("weight").copy_(pack_codes(coded.codes.to(torch.uint8), module.bits))
            module.codebooks.copy_(coded.codebooks)
            if module.row_scales is not None:
                steps, unit = integer_steps(coded.scales)
                module.scales.copy_(steps)
                module.row_scales.copy_(unit)
            else:
                module.scales.copy_(coded.scales)
            if module.row_codebook is not None:
                module.row_codebook.copy_(coded.row_codebook)
            if module.bias is not None:
                module.bias.copy_(dense.bias)
        return module

    def spec(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "books": len(self.codebooks),
            "column_group": self.column_group,
            "integer_scales": self.row_scales is not None,
        }

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> CodebookLinear:
        if not isinstance(dense, nn.Linear):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an nn.Linear")
        if spec["bits"] not in BITS:
            raise ValueError(f"`bits` must be one of {BITS}, got {spec['bits']!r}")
        group = checked_size(spec, "column_group", max(dense.in_features, 1))
        if group % 32 and group != dense.in_features:
            raise ValueError(f"`column_group` must be a multiple of 32 or the row's width, got {group}")
        if not isinstance(spec["integer_scales"], bool):
            raise ValueError(f"`integer_scales` must be true or false, got {spec['integer_scales']!r}")
        return cls(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            bits=spec["bits"],
            books=checked_size(spec, "books", dense.out_features),
            column_group=group,
            integer_scales=spec["integer_scales"],
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )

    def as_matrix(self) -> CodebookMatrix:
        """What the kernel takes."""
        return CodebookMatrix(
            self.get_buffer("weight"),
            self.codebooks,
            self.scales,
            self.bits,
            self.in_features,
            self.column_group,
            self.row_scales,
            self.row_codebook,
        )

    def forward(self, input: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        return kernel.codebook_linear(input, self.as_matrix(), self.bias)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """`Ŵ`, dense."""
        return kernel.dequantize(self.as_matrix(), dtype)

    def check_tensors(self) -> None:
        """After loading: shapes, finite numbers, and codebooks that exist."""
        if not self.codebooks.is_meta:
            try:
                check_matrix(self.as_matrix())
            except ConfigurationError as error:
                raise ValueError(str(error)) from error

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        state = {"weight": self.matrix()}
        return state if self.bias is None else {**state, "bias": self.bias}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodebookLinear:
        """Moves go to every tensor; casts leave the format's half-precision tensors as they are."""
        kept = {name: getattr(self, name) for name in FORMAT_TENSORS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, column_group={self.column_group}"
        )

    def reset_parameters(self) -> None:
        raise CompressionError("a CodebookLinear has no dense weight to initialise.")
