"""What every layer with packed codes shares: the format's tensors, their checks, moves and casts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...checked import short
from ...errors import CompressionError, ConfigurationError
from ...kernels import codebook as kernel
from ...kernels.matrix import CodebookMatrix, check_matrix
from ...kernels.packing import pack_codes, words_per_row
from ...kernels.ternary import pack_ternary, ternary_bytes, unpack_ternary
from ...layout import checked_size
from ...resized import shape_spec
from .coded import Coded, integer_steps
from .configuration import BITS, TERNARY

# Tensors of the format that are floats; a cast of the model must not round them again.
FORMAT_TENSORS = ("codebooks", "scales", "row_scales")
# Codes of three values that are unpacked at once.
UNPACKED = 1 << 20


@dataclass(frozen=True)
class CodebookFormat:
    """How a matrix is kept.

    Args:
        bits: 2, 3 or 4 a weight, or 1.58: three codes, five of them in a byte.
        books: number of codebooks.
        column_group: columns that share a scale.
        integer_scales: scales in uint8 with one unit a row.
        trainable: codebooks and float scales are float32 parameters rather than fp16 buffers.
        in_turn: each codebook serves as many rows that follow each other, and no row needs an index.
    """

    bits: float
    books: int
    column_group: int
    integer_scales: bool
    trainable: bool = False
    in_turn: bool = False

    @property
    def codes(self) -> int:
        """Codes of a codebook."""
        return 3 if self.bits == TERNARY else 1 << int(self.bits)

    @property
    def kernel_bits(self) -> int:
        """Bits of a code where the kernel reads it."""
        return 2 if self.bits == TERNARY else int(self.bits)

    def tables(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
        """Shape and dtype of what belongs to the codes of a matrix, `None` for what this format does without."""
        floats = torch.float32 if self.trainable else torch.float16
        groups = -(-columns // self.column_group)
        index = torch.int16 if self.books <= torch.iinfo(torch.int16).max else torch.int32
        return {
            "codebooks": ((self.books, 1 << self.kernel_bits), floats),
            "scales": ((rows, groups), torch.uint8 if self.integer_scales else floats),
            "row_scales": ((rows,), floats) if self.integer_scales else None,
            "row_codebook": ((rows,), index) if self.books > 1 and not self.in_turn else None,
        }

    def spec(self) -> dict[str, Any]:
        fields = {
            "bits": self.bits,
            "books": self.books,
            "column_group": self.column_group,
            "integer_scales": self.integer_scales,
        }
        return fields | {name: True for name in ("trainable", "in_turn") if getattr(self, name)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], rows: int, columns: int) -> CodebookFormat:
        """Raises `ValueError` or `KeyError` for a spec that does not fit a matrix of this size."""
        unknown = set(spec) - {"bits", "books", "column_group", "integer_scales", "trainable", "in_turn"}
        if unknown:
            raise ValueError(f"unknown fields {short(sorted(unknown))}")
        if spec["bits"] not in BITS or isinstance(spec["bits"], bool):
            raise ValueError(f"`bits` must be one of {BITS}, got {short(spec['bits'])}")
        group = checked_size(spec, "column_group", max(columns, 1))
        if group % 32 and group != columns:
            raise ValueError(f"`column_group` must be a multiple of 32 or the row's width, got {group}")
        for name in ("integer_scales", "trainable", "in_turn"):
            if not isinstance(spec.get(name, False), bool):
                raise ValueError(f"`{name}` must be true or false, got {short(spec[name])}")
        return cls(
            bits=spec["bits"],
            books=checked_size(spec, "books", rows),
            column_group=group,
            integer_scales=spec["integer_scales"],
            trainable=spec.get("trainable", False),
            in_turn=spec.get("in_turn", False),
        )


def register_table(
    module: nn.Module, name: str, kind: tuple[tuple[int, ...], torch.dtype] | None, device: Any
) -> None:
    """A tensor of `CodebookFormat.tables`, uninitialised: a parameter if it is trained, otherwise a buffer."""
    if kind is None:
        module.register_buffer(name, None)
        return
    shape, dtype = kind
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if dtype == torch.float32:  # only tables that are trained are kept in it
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)


@torch.no_grad()
def fill_tables(matrix: CodebookMatrix, coded: Coded) -> None:
    """Write codebooks, scales and the rows' choice, rounded as the file holds them, into the tensors of a matrix.
    Codebooks and codes that nothing makes use of repeat the last."""
    books, size = coded.codebooks.shape
    matrix.codebooks[:books, :size].copy_(coded.codebooks)
    matrix.codebooks[:books, size:].copy_(coded.codebooks[:, -1:])
    matrix.codebooks[books:].copy_(matrix.codebooks[books - 1])
    if matrix.row_scales is not None:
        steps, unit = integer_steps(coded.scales)
        matrix.scales.copy_(steps)
        matrix.row_scales.copy_(unit)
    else:
        matrix.scales.copy_(coded.scales)
    if matrix.row_codebook is not None:
        matrix.row_codebook.copy_(coded.row_codebook)


@contextmanager
def keeping_formats(module: nn.Module, names: tuple[str, ...] = FORMAT_TENSORS) -> Iterator[None]:
    """Around a cast or a move: the format's floats keep their dtype."""
    kept = {name: getattr(module, name) for name in names}
    kept = {name: tensor.detach() for name, tensor in kept.items() if tensor is not None}
    yield
    for name, before in kept.items():
        after = getattr(module, name)
        if after.dtype == before.dtype:
            continue
        if name in module._parameters:
            after.data = before.to(after.device)
        else:
            module._buffers[name] = before.to(after.device)


class PackedWeight(nn.Module):
    """Mixin of a layer whose weight of shape (rows, columns) is kept as codes.

        W[r, c] = scale[r, c // column_group] · codebooks[row_codebook[r], code[r, c]]

    Attributes:
        weight: packed codes: int32 (rows, bits · ⌈columns / 32⌉), or for 1.58 bits uint8 (rows, ⌈columns / 5⌉).
        codebooks: fp16 (books, 2^bits); with 1.58 bits the last of four is never used.
        scales: uint8 or fp16 (rows, groups); `row_scales`: fp16 (rows,) or `None`.
        row_codebook: int16 or int32 (rows,), `None` with a single codebook, or where they take turns.
    """

    #: `weight` holds codes: nothing may be added to it.
    packs_weight: ClassVar[bool] = True
    #: For Transformers, which would draw initial values for codes that are offloaded.
    _is_hf_initialized: ClassVar[bool] = True
    format: CodebookFormat
    #: Whether it stands for a layer that was smaller than the dense model's.
    resized: int = 0
    columns: int
    codebooks: Tensor
    scales: Tensor
    row_scales: Tensor | None
    row_codebook: Tensor | None
    kernel_codes: Tensor

    def make_tensors(self, rows: int, columns: int, format: CodebookFormat, device: Any) -> None:
        """Register the tensors, uninitialised."""
        self.format, self.columns = format, columns
        codes = torch.empty((rows, words_per_row(columns, format.kernel_bits)), dtype=torch.int32, device=device)
        if format.bits == TERNARY:
            stored = torch.empty((rows, ternary_bytes(columns)), dtype=torch.uint8, device=device)
            self.register_buffer("weight", stored)
            # Stored in less than the kernel reads: it has a copy of its own, which is never saved.
            self.register_buffer("kernel_codes", codes, persistent=False)
            self.expanded = False
        else:
            self.register_buffer("weight", codes)
        for name, kind in format.tables(rows, columns).items():
            register_table(self, name, kind, device)

    @torch.no_grad()
    def fill(self, coded: Coded) -> None:
        """Take over a matrix whose codebooks and scales are rounded as the file holds them."""
        codes = coded.codes.to(torch.uint8)
        pack = pack_ternary(codes) if self.format.bits == TERNARY else pack_codes(codes, self.format.kernel_bits)
        self.get_buffer("weight").copy_(pack)
        self.expand_codes()
        fill_tables(self.as_matrix(), coded)

    def expand_codes(self) -> None:
        """Bring the kernel's copy of the codes up to date, where it has one."""
        if self.format.bits == TERNARY and not self.get_buffer("weight").is_meta:
            self.kernel_codes, self.expanded = self._expanded_codes(), True

    def forget_derived(self) -> None:
        """Let go of the kernel's copy; it is made again for a call."""
        if self.format.bits == TERNARY:
            self.kernel_codes, self.expanded = torch.empty(0, dtype=torch.int32), False

    def _expanded_codes(self) -> Tensor:
        weight, bits = self.get_buffer("weight"), self.format.kernel_bits
        rows = weight.shape[0]
        codes = torch.empty((rows, words_per_row(self.columns, bits)), dtype=torch.int32, device=weight.device)
        # Codes that are unpacked take a byte each, several times over: as few as are no burden.
        step = max(1, UNPACKED // self.columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            codes[part] = pack_codes(unpack_ternary(weight[part], self.columns), bits)
        return codes

    def _codes(self) -> Tensor:
        """As the kernel reads them."""
        if self.format.bits != TERNARY:
            return self.get_buffer("weight")
        # Offloaded codes come and go: then there is no copy to keep.
        if self.expanded or self.get_buffer("weight").is_meta:
            return self.kernel_codes
        return self._expanded_codes()

    def spec(self) -> dict[str, Any]:
        return {**self.format.spec(), **shape_spec(self)}

    @property
    def has_trainable_tables(self) -> bool:
        return self.format.trainable

    @property
    def dense_weights(self) -> int:
        """Weights of the dense layer that the codes stand for."""
        return int(self.scales.shape[0]) * self.columns

    def stored_bytes(self) -> int:
        """Bytes of everything that stands for the matrix, without the bias."""
        tensors = (self.get_buffer("weight"), self.codebooks, self.scales, self.row_scales, self.row_codebook)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def as_matrix(self) -> CodebookMatrix:
        """What the kernel takes."""
        return CodebookMatrix(
            self._codes(),
            self.codebooks,
            self.scales,
            self.format.kernel_bits,
            self.columns,
            self.format.column_group,
            self.row_scales,
            self.row_codebook,
        )

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """`Ŵ`, dense."""
        return kernel.dequantize(self.as_matrix(), dtype)

    def check_tensors(self) -> None:
        """After loading: shapes, finite numbers, codes and codebooks that exist. Raises `ValueError`."""
        try:
            self.expand_codes()
            matrix = self.as_matrix()
            if not any(isinstance(part, Tensor) and part.is_meta for part in matrix):  # or it is offloaded
                check_matrix(matrix)
        except ConfigurationError as error:
            raise ValueError(str(error)) from error

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.expand_codes()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves go to every tensor; casts leave the format's floats as they are."""
        with keeping_formats(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def reset_parameters(self) -> None:
        raise CompressionError(f"a {type(self).__name__} has no dense weight to initialise.")
