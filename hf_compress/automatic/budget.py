"""What a compressed model may take and must keep."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from ..sizes import parse_bytes
from ..strict import StrictModel


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
