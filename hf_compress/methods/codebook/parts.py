"""Which matrices of a model are coded, and with how many bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...anatomy import Experts, ModelAnatomy, dense_rows
from ...engine.exclusion import is_excluded
from ...errors import ConfigurationError
from ...kernels.matrix import rows_in_turn
from .configuration import CODED_KINDS, OUTSIDE, TERNARY, Bits, CodebookConfig, CodedKind
from .experts import CodebookExperts
from .modules import coded_layer
from .order import Channels, channels_of_block
from .weight import CodebookFormat


@dataclass(frozen=True)
class Part:
    """One matrix to be coded.

    Args:
        path: of its module.
        kind: decides on its bits.
        bits: a weight.
        tied_head: path of the head that multiplies with this table of token vectors.
        channels: in whose order its rows or columns are brought.
    """

    path: str
    kind: CodedKind
    bits: Bits
    tied_head: str | None = None
    channels: Channels | None = None

    @property
    def reads(self) -> bool:
        """Whether the channels are its columns."""
        return self.channels is not None and self.path == self.channels.reader

    def in_order(
        self, weight: Float[Tensor, "rows columns"], order: Int[Tensor, " n"] | None
    ) -> Float[Tensor, "rows columns"]:
        """The matrix with its channels in that order."""
        if order is None:
            return weight
        return weight[:, order] if self.reads else weight[order]

    def in_turn(self, config: CodebookConfig, rows: int) -> bool:
        """Whether its codebooks serve rows that follow each other. Large matrices are coded in pieces of full
        codebooks, and then the last one may be too small for all to be equal."""
        size = config.rows_per_codebook
        return self.channels is not None and not self.reads and rows_in_turn(rows, -(-rows // size)) == size


def format_of(config: CodebookConfig, dense: nn.Module, part: Part, books: int | None = None) -> CodebookFormat:
    """How a matrix is kept; `books` as the recipe expects it unless it is given."""
    rows, columns = dense_rows(dense).shape
    return format_of_size(config, rows, columns, part.bits, books, part.in_turn(config, rows))


def format_of_size(
    config: CodebookConfig, rows: int, columns: int, bits: Bits, books: int | None = None, in_turn: bool = False
) -> CodebookFormat:
    return CodebookFormat(
        bits=bits,
        books=-(-rows // config.rows_per_codebook) if books is None else books,
        in_turn=in_turn,
        column_group=min(config.column_group or columns, columns),
        integer_scales=config.integer_scales,
        trainable=config.trainable_codebooks,
    )


def coded_experts(config: CodebookConfig, experts: Experts, bits: Bits, device: Any = None) -> CodebookExperts:
    """Experts to be filled, on the dense ones' device or another. Raises `ValueError` for what has no packed form."""
    up, down = (
        format_of_size(config, weight.shape[1], weight.shape[2], bits) for weight in (experts.up, experts.down)
    )
    return CodebookExperts(experts.module, up, down, device=device)


def planned_layer(config: CodebookConfig, dense: nn.Module, part: Part) -> Any:
    """The packed layer or the packed experts without memory. Raises `ValueError` for what has no packed form."""
    experts = Experts.of(dense)
    if experts is not None:
        return coded_experts(config, experts, part.bits, device="meta")
    return coded_layer(dense, None, format_of(config, dense, part), device="meta")


def parts_of_block(config: CodebookConfig, anatomy: ModelAnatomy, block: int) -> tuple[list[Part], list[str]]:
    """The matrices of a block, and those left alone with the reason. Raises `ConfigurationError` for one that is too
    small."""
    parts, left_alone = [], []
    for path, kind in anatomy.block_weights(block):
        assert kind in CODED_KINDS
        if getattr(anatomy.model.get_submodule(path), "source_path", None) is not None:
            continue  # its matrix is another block's, where it is coded
        part = _part(config, anatomy, path, kind)
        if isinstance(part, str):
            left_alone.append(part)
        else:
            parts.append(part)
    return _with_channels(config, anatomy, block, parts), left_alone


def _with_channels(config: CodebookConfig, anatomy: ModelAnatomy, block: int, parts: list[Part]) -> list[Part]:
    if not config.reorder_channels:
        return parts
    found = channels_of_block(anatomy, block, {part.path for part in parts})
    known = {path: channels for channels in found for path in (*channels.writers, channels.reader)}
    return [replace(part, channels=known.get(part.path)) for part in parts]


def parts_outside(config: CodebookConfig, anatomy: ModelAnatomy) -> tuple[list[Part], list[str]]:
    """Embedding and head, if they have bits; one table if they are tied.

    Raises:
        ConfigurationError: bits for what the model does not have, or two different numbers for one table.
    """
    table, head = anatomy.outside("embedding"), anatomy.outside("head")
    wanted = [kind for kind in OUTSIDE if config.bits_of(kind) is not None]
    if config.table_bits is not None:
        # Of what there is: a model without its head has a table alone.
        wanted = [kind for kind in wanted if (table if kind == "embedding" else head) is not None]
        if not wanted:
            raise ConfigurationError(
                f"`table_bits` is for embedding and head; {type(anatomy.model).__name__} has neither. Leave it out."
            )
    for kind in wanted:
        if (table if kind == "embedding" else head) is None:
            raise ConfigurationError(
                f"`bits` names {kind!r}, and {type(anatomy.model).__name__} has no "
                f"{'table of token vectors' if kind == 'embedding' else 'linear head'}. Leave it out."
            )
    if not wanted:
        return [], []
    if config.trainable_codebooks and anatomy.model.dtype != torch.float32:
        # Transformers reads a model's dtype off its first parameter, which would be a table in float32.
        raise ConfigurationError(
            f"trainable_codebooks=True with bits for {wanted[0]!r} needs a model in float32, this one is in "
            f"{anatomy.model.dtype}. Load it with dtype=torch.float32, or leave embedding and head dense."
        )
    if anatomy.head_is_tied():
        bits = {config.bits_of(kind) for kind in wanted}
        if len(bits) > 1:
            raise ConfigurationError(
                "`bits` gives embedding and head different numbers, and in this model they are one table. Give one."
            )
        assert table is not None
        part = _part(config, anatomy, table, wanted[0], head)
        return ([], [part]) if isinstance(part, str) else ([part], [])
    found = [_part(config, anatomy, table if kind == "embedding" else head, kind) for kind in wanted]  # type: ignore[arg-type]
    return [part for part in found if isinstance(part, Part)], [part for part in found if isinstance(part, str)]


def _part(
    config: CodebookConfig, anatomy: ModelAnatomy, path: str, kind: CodedKind, tied_head: str | None = None
) -> Part | str:
    bits = config.bits_of(kind)
    if bits is None:
        return f"{path}: no bits for its kind"
    excluded = config.modules_to_not_convert
    if is_excluded(path, excluded) or (tied_head is not None and is_excluded(tied_head, excluded)):
        return f"{path}: excluded"
    dense, part = anatomy.model.get_submodule(path), Part(path, kind, bits, tied_head)
    try:
        planned_layer(config, dense, part)
    except ValueError as error:
        raise ConfigurationError(f"{path!r} {error}. Add it to modules_to_not_convert.") from error
    experts = Experts.of(dense)
    if experts is not None and config.average_bits is not None:
        raise ConfigurationError(
            f"{path!r} has experts, and `average_bits` cannot choose bits for them yet. Give `bits`, a number or one "
            "for each kind, or add it to modules_to_not_convert."
        )
    columns = dense_rows(dense).shape[1] if experts is None else min(experts.width, experts.hidden)
    codes = 3 if bits == TERNARY else 2 ** int(bits)
    if columns < codes:
        raise ConfigurationError(
            f"{path!r} has rows of {columns} weights, shorter than a codebook of {codes} codes. "
            "Add it to modules_to_not_convert, or take fewer bits."
        )
    return part
