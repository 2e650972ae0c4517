"""Experts whose weights are packed codes: all of a block in one module, as the dense model has them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...anatomy import Experts
from ...anatomy.experts import chosen_tokens, gated, up_name
from ...errors import CompressionError, ConfigurationError
from ...experts import ResizedExperts, dense_class, dense_experts, take_settings
from ...kernels import codebook as kernel
from ...kernels.matrix import CodebookMatrix, check_matrix
from ...kernels.packing import pack_codes, words_per_row
from ...layout import checked_size, register_module_type
from .coded import Coded
from .configuration import TERNARY
from .weight import FORMAT_TENSORS, CodebookFormat, fill_tables, keeping_formats, register_table

DOWN = "down_proj"


@register_module_type
class CodebookExperts(nn.Module):
    """The experts of a block as packed codes: an expert is unpacked by the kernel that multiplies with it.

    The codes have the names of the dense parameters, int32 (experts, rows, bits · ⌈columns / 32⌉): Transformers'
    conversions split them into files by expert, and put them together again, as they do with the dense ones. Beside
    them are, each with the name of the codes in front, `codebooks`, fp16 (experts, books, 2^bits), `scales`, uint8 or
    fp16 (experts, rows, groups), `row_scales`, fp16 (experts, rows), and `row_codebook`, int16 or int32 (experts,
    rows), the last two where the format has them.

    Args:
        dense: of the dense model, or with fewer channels.
        up, down: how the two matrices of an expert are kept.
    """

    layout_type: ClassVar[str] = "codebook_experts"
    packs_weight: ClassVar[bool] = True
    _is_hf_initialized: ClassVar[bool] = True
    has_gate: bool

    def __init__(self, dense: nn.Module, up: CodebookFormat, down: CodebookFormat, device: Any = None) -> None:
        super().__init__()
        experts = dense_experts(dense)
        if TERNARY in (up.bits, down.bits):
            raise ValueError(f"has experts, which are kept with 2, 3 or 4 bits, not {TERNARY}")
        device = experts.down.device if device is None else device
        take_settings(self, dense)
        # Not a child: its gate and activation are asked for.
        self.__dict__["dense_class"] = dense_class(dense)
        self.resized = isinstance(dense, ResizedExperts)
        self.formats: dict[str, CodebookFormat] = {}
        self.columns: dict[str, int] = {}
        for name, format, weight in ((up_name(dense), up, experts.up), (DOWN, down, experts.down)):
            self.formats[name], self.columns[name] = format, weight.shape[2]
            self._make_tensors(name, weight.shape[0], weight.shape[1], device)

    def _apply_gate(self, rows: Float[Tensor, "tokens rows"]) -> Float[Tensor, "tokens width"]:
        found: Tensor = self.__dict__["dense_class"]._apply_gate(self, rows)
        return found

    @property
    def matrices(self) -> tuple[str, str]:
        """Names of the codes, which are those of the dense parameters."""
        return up_name(self), DOWN

    def _make_tensors(self, name: str, count: int, rows: int, device: Any) -> None:
        format, columns = self.formats[name], self.columns[name]
        words = words_per_row(columns, format.kernel_bits)
        self.register_buffer(name, torch.empty((count, rows, words), dtype=torch.int32, device=device))
        for part, kind in format.tables(rows, columns).items():
            stacked = None if kind is None else ((count, *kind[0]), kind[1])
            register_table(self, f"{name}_{part}", stacked, device)

    def _tensors(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        parts = ("", "_codebooks", "_scales", "_row_scales", "_row_codebook")
        return tuple(getattr(self, f"{name}{part}") for part in parts)

    def matrix(self, name: str, expert: int) -> CodebookMatrix:
        """What the kernel takes of one matrix of an expert; views."""
        codes, codebooks, scales, row_scales, row_codebook = (
            None if tensor is None else tensor[expert] for tensor in self._tensors(name)
        )
        assert codes is not None and codebooks is not None and scales is not None
        format = self.formats[name]
        return CodebookMatrix(
            codes,
            codebooks,
            scales,
            format.kernel_bits,
            self.columns[name],
            format.column_group,
            row_scales,
            row_codebook,
        )

    @torch.no_grad()
    def fill(self, name: str, expert: int, coded: Coded) -> None:
        """Take over one matrix of an expert, rounded as the file holds it."""
        own = self.matrix(name, expert)
        own.packed.copy_(pack_codes(coded.codes.to(torch.uint8), own.bits))
        fill_tables(own, coded)

    def _apply(self, fn: Any, recurse: bool = True) -> CodebookExperts:
        """Moves go to every tensor; casts leave the format's floats as they are."""
        floats = tuple(f"{name}_{part}" for name in self.matrices for part in FORMAT_TENSORS)
        with keeping_formats(self, floats):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def spec(self) -> dict[str, Any]:
        up, down = (self.formats[name].spec() for name in self.matrices)
        spec: dict[str, Any] = {"up": up, "down": down}
        return {**spec, "width": self.columns[DOWN]} if self.resized else spec

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> CodebookExperts:
        experts = dense_experts(dense)
        if set(spec) - {"width"} != {"up", "down"} or not all(isinstance(spec[n], dict) for n in ("up", "down")):
            raise ValueError(f"expected the fields `up` and `down` with objects, got {sorted(map(str, spec))}")
        if "width" in spec:
            width = checked_size(spec, "width", experts.width)
            dense = ResizedExperts.from_spec(dense, {"width": width})
            experts = dense_experts(dense)
        formats = (
            CodebookFormat.from_spec(spec[name], *weight.shape[1:])
            for name, weight in (("up", experts.up), ("down", experts.down))
        )
        return cls(dense, *formats)

    @property
    def has_trainable_tables(self) -> bool:
        return any(format.trainable for format in self.formats.values())

    @property
    def count(self) -> int:
        return int(self.get_buffer(DOWN).shape[0])

    @property
    def dense_weights(self) -> int:
        """Weights of the dense experts that the codes stand for."""
        return sum(self.get_buffer(name)[..., 0].numel() * self.columns[name] for name in self.matrices)

    def matrix_bytes(self, name: str) -> int:
        """Bytes of everything that stands for one of the two matrices of all experts."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors(name) if tensor is not None)

    def stored_bytes(self) -> int:
        return sum(self.matrix_bytes(name) for name in self.matrices)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens chosen"],
        top_k_weights: Float[Tensor, "tokens chosen"],
    ) -> Float[Tensor, "tokens hidden"]:
        up, down = self.matrices
        total = torch.zeros_like(hidden_states)
        for expert, tokens, places in chosen_tokens(top_k_index, self.count):
            rows = kernel.codebook_linear(hidden_states[tokens], self.matrix(up, expert))
            out = kernel.codebook_linear(gated(self, rows), self.matrix(down, expert))
            total.index_add_(0, tokens, (out * top_k_weights[tokens, places, None]).to(total.dtype))
        return total

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        small = {
            name: torch.stack([kernel.dequantize(self.matrix(name, expert)) for expert in range(self.count)])
            for name in self.matrices
        }
        whole = Experts.of(dense)
        if whole is None or not self.resized:
            return small
        kept = ResizedExperts.from_tensors(dense, *(small[name] for name in self.matrices))
        return kept.dequantize(dense)

    def check_tensors(self) -> None:
        """After loading: shapes, finite numbers, and codebooks that exist. Raises `ValueError`."""
        try:
            for name in self.matrices:
                for expert in range(self.count):
                    matrix = self.matrix(name, expert)
                    if not any(isinstance(part, Tensor) and part.is_meta for part in matrix):  # or it is offloaded
                        check_matrix(matrix)
        except ConfigurationError as error:
            raise ValueError(str(error)) from error

    def reset_parameters(self) -> None:
        raise CompressionError("a CodebookExperts has no dense weight to initialise.")
