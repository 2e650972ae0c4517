"""What a compressed model may take and must keep."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from ..strict import StrictModel

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: Any) -> Any:
    """`"300MB"` (10⁶) or `"300MiB"` (2²⁰) as bytes; numbers as they are. Raises `ValueError` for anything else."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is no size such as 300MB")
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{value!r} is no size such as 300MB, 1.5GB or 280MiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class Budget(StrictModel):
    """
    Limits of an automatic compression; at least one. Where several recipes keep them, the best perplexity wins, and
    without a limit on size the smallest model.

    Args:
        bytes (`int` or `str`, *optional*):
            All files of the model on disk without the tokenizer's, such as `"300MB"`.
        memory (`int` or `str`, *optional*):
            The model in memory once it is loaded, activations and cache left out.
        max_perplexity_increase (`float`, *optional*):
            On the evaluation text, relative to the dense model: 0.1 allows ten per cent.
        min_tokens_per_second (`float`, *optional*):
            Of generation on this machine, one sequence.
    """

    bytes: int | None = Field(default=None, gt=0)
    memory: int | None = Field(default=None, gt=0)
    max_perplexity_increase: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    min_tokens_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @field_validator("bytes", "memory", mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        return parse_bytes(value)

    @model_validator(mode="after")
    def _some_limit(self) -> Budget:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return self.model_dump(mode="json")
