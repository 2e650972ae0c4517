"""The recipe of learned codebooks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from ...configuration import MethodConfig, register_method_config

Bits = Literal[2, 3, 4]
BITS: tuple[Bits, ...] = get_args(Bits)
# What a number of bits can be given for. A matrix that no anatomy record names is of kind "other".
CodedKind = Literal["mlp", "query_key", "value_output", "other"]
CODED_KINDS: tuple[CodedKind, ...] = get_args(CodedKind)


@register_method_config
class CodebookConfig(MethodConfig):
    """Weights as indices into small codebooks (after JLCM, arXiv 2309.17361; our re-implementation).

    A weight is its row's scale for its column group times a code of its row's codebook. Codes are stored in true 2, 3
    or 4 bits.

    Args:
        bits (`int` or `dict[str, int]`): 2, 3 or 4 a weight. A dictionary gives every kind its own, `{"mlp": 2,
            "query_key": 3}`; kinds that it does not name stay dense.
        learning (`"none"`, `"feedback"` or `"joint"`, defaults to `"joint"`): `"none"` is a weighted k-means and needs
            no data; `"feedback"` then assigns column by column, each rounding error made up for by later columns;
            `"joint"` also learns codebooks, scales and codes together.
        rounds (`int`, defaults to 4): rounds of joint learning a matrix.
        column_group (`int`, *optional*, defaults to 32): columns that share a scale; a multiple of 32. `None`: one
            scale a row.
        rows_per_codebook (`int`, defaults to 16): rows of alike distribution that share a codebook, on average.
        integer_scales (`bool`, defaults to `True`): scales in 8 bits with one fp16 unit a row, instead of fp16 each.
        order (`"sequential"` or `"dense"`): inputs of every block from the blocks compressed before it, or from the
            dense model.
        damping (`float`, defaults to 0.01): added to the diagonal of the inputs' Gram matrix, relative to its mean.
    """

    method: ClassVar[str] = "codebook"

    bits: Bits | dict[CodedKind, Bits]
    learning: Literal["none", "feedback", "joint"] = "joint"
    rounds: int = Field(default=4, ge=1)
    column_group: int | None = Field(default=32, ge=32, multiple_of=32)
    rows_per_codebook: int = Field(default=16, ge=1)
    integer_scales: bool = True
    order: Literal["sequential", "dense"] = "sequential"
    damping: float = Field(default=0.01, gt=0, lt=1)

    @field_validator("bits", mode="before")
    @classmethod
    def _supported_bits(cls, value: Any) -> Any:
        values = value.values() if isinstance(value, dict) else (value,)
        if isinstance(value, dict) and not value:
            raise ValueError('expected bits for at least one kind, e.g. {"mlp": 3}')
        for bits in values:
            if isinstance(bits, bool) or bits not in BITS:
                raise ValueError(f"{bits!r} bits are not supported; choose 2, 3 or 4")
        return value

    def bits_of(self, kind: CodedKind) -> int | None:
        """Bits of a kind; `None` if it stays dense."""
        return self.bits.get(kind) if isinstance(self.bits, dict) else self.bits
