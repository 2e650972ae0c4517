"""The recipe of learned codebooks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import Field, field_validator, model_validator

from ...configuration import MethodConfig, register_method_config

TERNARY = 1.58
BITS: tuple[float, ...] = (TERNARY, 2, 3, 4)
Bits: TypeAlias = int | float
# What a number of bits can be given for. A matrix that no anatomy record names is of kind "other".
CodedKind = Literal["mlp", "query_key", "value_output", "other", "embedding", "head"]
CODED_KINDS: tuple[CodedKind, ...] = get_args(CodedKind)
OUTSIDE: tuple[CodedKind, ...] = ("embedding", "head")
Learning = Literal["none", "feedback", "joint", "proximal", "distance", "latent"]


@register_method_config
class CodebookConfig(MethodConfig):
    """Weights as indices into small codebooks (after JLCM, arXiv 2309.17361; our re-implementation).

    A weight is its row's scale for its column group times a code of its row's codebook. Codes are stored in true 2, 3
    or 4 bits, or five codes of three values in a byte.

    Args:
        bits (`float`, `dict[str, float]` or `"auto"`): 2, 3, 4 or 1.58 (three codes) a weight of the blocks' matrices.
            A dictionary gives every kind its own, `{"mlp": 2, "query_key": 3, "embedding": 4}`; kinds that it does not
            name stay dense, as do embedding and head without a dictionary. One number serves both where they are tied.
            Query, key and value in one matrix are of kind `"query_key"`. `"auto"` chooses 2, 3 or 4 for every matrix
            of the blocks by the loss that its errors are estimated to cause.
        average_bits (`float`, *optional*): with `bits="auto"`, the bits a weight on average, from 2 to 4.
        table_bits (`float`, *optional*): bits of embedding and head, where `bits` is no dictionary.
        learning (`str`, defaults to `"joint"`): `"none"` is a weighted k-means and needs no data; `"feedback"` then
            assigns column by column, each rounding error made up for by later columns; `"joint"` also learns
            codebooks, scales and codes together, each at its optimum given the others. For comparison, codebooks and
            mapping by gradient descent instead: `"proximal"` (the paper's, a code's gradient decreases with its
            distance), `"distance"` (increases with it) and `"latent"` (a dense weight behind a straight-through
            estimate).
        rounds (`int`, defaults to 4): rounds of joint learning a matrix.
        block_epochs (`int`, defaults to 0): passes over the calibration data in which codebooks, scales, codes and
            norms of a whole block are tuned towards the dense block's output. Worth its time at 2 bits or fewer.
        column_group (`int`, *optional*, defaults to 32): columns that share a scale; a multiple of 32. `None`: one
            scale a row.
        rows_per_codebook (`int`, defaults to 16): rows of alike distribution that share a codebook, on average.
        integer_scales (`bool`, defaults to `True`): scales in 8 bits with one fp16 unit a row, instead of fp16 each.
        reorder_channels (`bool`, defaults to `False`): channels between the matrices of an MLP, and between values and
            output projection within a head, are sorted by the size of the columns that read them: those share scales
            with their like, and where codebooks divide them evenly the rows that write them need no index. The model
            is the same function; adapters and deltas of the dense one do not fit it any more. Experts, attention
            whose query, key and value are one matrix and shared layers keep their order.
        trainable_codebooks (`bool`, defaults to `False`): codebooks and the float scales are float32 parameters that
            the Trainer tunes, rather than fp16 buffers.
        order (`"sequential"` or `"dense"`): inputs of every block from the blocks compressed before it, or from the
            dense model.
        damping (`float`, defaults to 0.01): added to the diagonal of the inputs' Gram matrix, relative to its mean.
    """

    method: ClassVar[str] = "codebook"

    bits: Bits | dict[CodedKind, Bits] | Literal["auto"]
    average_bits: float | None = Field(default=None, ge=2, le=4)
    table_bits: Bits | None = None
    learning: Learning = "joint"
    rounds: int = Field(default=4, ge=1)
    block_epochs: int = Field(default=0, ge=0)
    column_group: int | None = Field(default=32, ge=32, multiple_of=32)
    rows_per_codebook: int = Field(default=16, ge=1)
    integer_scales: bool = True
    reorder_channels: bool = False
    trainable_codebooks: bool = False
    order: Literal["sequential", "dense"] = "sequential"
    damping: float = Field(default=0.01, gt=0, lt=1)

    @field_validator("bits", mode="before")
    @classmethod
    def _supported_bits(cls, value: Any) -> Any:
        if value == "auto":
            return value
        values = value.values() if isinstance(value, dict) else (value,)
        if isinstance(value, dict) and not value:
            raise ValueError('expected bits for at least one kind, e.g. {"mlp": 3}')
        unknown = [kind for kind in value if kind not in CODED_KINDS] if isinstance(value, dict) else []
        if unknown:
            raise ValueError(f"there is no kind {unknown[0]!r} to give bits; known: {', '.join(CODED_KINDS)}")
        for bits in values:
            if isinstance(bits, bool) or bits not in BITS:
                raise ValueError(f'{bits!r} bits are not supported; choose 1.58, 2, 3 or 4, or "auto"')
        return value

    @field_validator("table_bits")
    @classmethod
    def _supported_table_bits(cls, value: Any) -> Any:
        if value is not None and value not in BITS:
            raise ValueError(f"{value!r} bits are not supported; choose 1.58, 2, 3 or 4")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> CodebookConfig:
        if (self.bits == "auto") != (self.average_bits is not None):
            raise ValueError('`bits="auto"` and `average_bits` belong together, e.g. bits="auto", average_bits=2.5')
        if isinstance(self.bits, dict) and self.table_bits is not None:
            raise ValueError(
                '`table_bits` has no effect where `bits` is a dictionary; name "embedding" or "head" in it'
            )
        if self.block_epochs and (self.learning == "none" or self.order == "dense"):
            raise ValueError('`block_epochs` needs data and order="sequential": choose another `learning` or `order`')
        return self

    @property
    def needs_data(self) -> bool:
        return self.learning != "none" or self.bits == "auto"

    def bits_of(self, kind: CodedKind) -> Bits | None:
        """Bits of a kind; `None` if it stays dense. With `bits="auto"` the least that a matrix of the blocks gets."""
        if isinstance(self.bits, dict):
            return self.bits.get(kind)
        if kind in OUTSIDE:
            return self.table_bits
        return 2 if self.bits == "auto" else self.bits
