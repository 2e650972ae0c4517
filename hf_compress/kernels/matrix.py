"""A compressed matrix as its tensors, the checks on them, and the C structure that the kernel reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from ctypes import addressof
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from ..errors import ConfigurationError
from .library import TYPES, Matrix
from .packing import UNIT, check_bits, words_per_row

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class CodebookMatrix(NamedTuple):
    """`W[r, c] = scale[r, c // column_group] * codebooks[row_codebook[r], code[r, c]]`, shape (rows, columns).

    Attributes:
        packed: the codes, shape (rows, words), see `pack_codes`; contiguous like all the others.
        codebooks: shape (codebooks, 2^bits), float16 (another float type works too).
        scales: shape (rows, groups), a float type, or uint8 together with `row_scales`.
        bits: 2, 3 or 4.
        columns: columns of W.
        column_group: columns that share a scale: a multiple of 32, or all of them.
        row_scales: shape (rows,); the scale of a group is then its uint8 times this.
        row_codebook: shape (rows,), int16 or int32, the codebook of each row; `None` where there is one codebook, or
            each serves `codebook_rows` rows that follow each other.
    """

    packed: Int32[Tensor, "rows words"]
    codebooks: Float[Tensor, "codebooks codes"]
    scales: Tensor
    bits: int
    columns: int
    column_group: int
    row_scales: Tensor | None = None
    row_codebook: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    @property
    def codebook_rows(self) -> int:
        """Rows that follow each other and share a codebook, where no `row_codebook` chooses."""
        return rows_in_turn(self.rows, self.codebooks.shape[0])

    def books_of(self, rows: Int[Tensor, " some"]) -> Tensor | None:
        """The codebooks of some rows, int16 or int32; `None` where there is one for all."""
        if self.row_codebook is not None:
            return self.row_codebook.index_select(0, rows)
        return None if self.codebooks.shape[0] == 1 else (rows // self.codebook_rows).int()


def rows_in_turn(rows: int, books: int) -> int:
    """How many rows each of some codebooks serves, where they take turns."""
    return max(-(-rows // books), 1)


def check_structure(matrix: CodebookMatrix) -> None:
    """Shapes, dtypes and devices. Raises `ConfigurationError` with what was found and expected."""
    packed, codebooks, scales, bits, columns, column_group, row_scales, row_codebook = matrix
    check_bits(bits)
    if columns < 1 or column_group < 1 or (column_group % UNIT and column_group < columns):
        raise ConfigurationError(
            f"`column_group` must be a multiple of {UNIT} or cover all columns, got {column_group} of {columns}."
        )
    rows, groups = packed.shape[0], -(-columns // column_group)
    _check("packed", packed, (rows, words_per_row(columns, bits)), (torch.int32,), packed)
    _check("codebooks", codebooks, (codebooks.shape[0], 1 << bits), _FLOATS, packed)
    _check("scales", scales, (rows, groups), (torch.uint8,) if row_scales is not None else _FLOATS, packed)
    if row_scales is not None:
        _check("row_scales", row_scales, (rows,), _FLOATS, packed)
    if row_codebook is not None:
        _check("row_codebook", row_codebook, (rows,), (torch.int16, torch.int32), packed)
    if codebooks.shape[0] == 0:
        raise ConfigurationError("there is no codebook.")
    if row_codebook is None and codebooks.shape[0] > max(rows, 1):
        raise ConfigurationError(
            f"there are {codebooks.shape[0]} codebooks for {rows} rows, and no `row_codebook` that chooses."
        )


def check_matrix(matrix: CodebookMatrix) -> None:
    """What a loaded matrix must fulfil, values included: finite numbers, and codebooks that exist.

    Codes need no check: each of their bit patterns is in the codebook. The kernel looks at `row_codebook` again.

    Raises:
        ConfigurationError: with what was found and expected.
    """
    check_structure(matrix)
    for name in ("codebooks", "scales", "row_scales"):
        values = getattr(matrix, name)
        if values is not None and values.is_floating_point() and not bool(values.isfinite().all()):
            raise ConfigurationError(f"`{name}` has values that are not finite.")
    rows = matrix.row_codebook
    if rows is not None and rows.numel():
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= matrix.codebooks.shape[0]:
            raise ConfigurationError(
                f"`row_codebook` goes from {low} to {high}; there are {matrix.codebooks.shape[0]} codebooks."
            )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], packed: Tensor) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConfigurationError(
            f"`{name}` must have shape {shape} and dtype {kinds}, got {tuple(tensor.shape)} and {tensor.dtype}."
        )
    if tensor.device != packed.device:
        raise ConfigurationError(f"`{name}` is on {tensor.device}, the codes are on {packed.device}.")
    if not tensor.is_contiguous():
        raise ConfigurationError(f"`{name}` must be contiguous.")


class Prepared:
    """The kernel's view of a matrix on the CPU: checked once, valid as long as the same tensors keep their memory."""

    __slots__ = ("address", "numbers", "others", "packed", "pointers", "structure", "tensors")

    def __init__(self, matrix: CodebookMatrix) -> None:
        packed, codebooks, scales, bits, columns, column_group, row_scales, row_codebook = matrix
        tensors = (packed, codebooks, scales, row_scales, row_codebook)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.structure = Matrix(
            *pointers,
            packed.shape[0],
            columns,
            packed.shape[1] // bits,
            scales.shape[1],
            -(-min(column_group, columns) // UNIT),
            codebooks.shape[0],
            matrix.codebook_rows,
            bits,
            TYPES[codebooks.dtype],
            TYPES[scales.dtype],
            0 if row_scales is None else TYPES[row_scales.dtype],
            0 if row_codebook is None else row_codebook.element_size(),
        )
        self.address = addressof(self.structure)
        # The entry lives as long as the codes: it may hold the other tensors, not these.
        self.packed = weakref.ref(packed, _forget(id(packed), _prepared))
        self.others = tensors[1:]
        self.numbers = matrix[3:6]
        self.tensors = [tensor for tensor in self.others if tensor is not None]
        self.pointers = [pointer for pointer in pointers if pointer is not None]


_prepared: dict[int, Prepared] = {}


def prepare(matrix: CodebookMatrix) -> Prepared:
    """The C structure of a matrix on the CPU, from the last call if that was with the same tensors.

    Keep the result while the kernel runs. Raises `ConfigurationError` as `check_structure`.
    """
    packed, codebooks, scales, _, _, _, row_scales, row_codebook = matrix
    known = _prepared.get(id(packed))
    if known is not None and known.packed() is packed and known.numbers == matrix[3:6]:
        others = known.others
        # By identity: comparing tensors would compare their elements. Their memory may have been exchanged since.
        if (
            others[0] is codebooks
            and others[1] is scales
            and others[2] is row_scales
            and others[3] is row_codebook
            and known.pointers == [packed.data_ptr(), *[tensor.data_ptr() for tensor in known.tensors]]
        ):
            return known
    check_structure(matrix)
    known = _prepared[id(packed)] = Prepared(matrix)
    return known


def _forget(key: int, prepared: dict[int, Prepared]) -> Callable[[object], None]:
    def forget(reference: object) -> None:
        entry = prepared.get(key)
        if entry is not None and entry.packed is reference:
            del prepared[key]

    return forget
