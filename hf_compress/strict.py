"""Base of every configuration: frozen, unknown fields refused, errors of our own type."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .checked import short
from .errors import ConfigurationError


class StrictModel(BaseModel):
    """An immutable set of validated fields. Raises `ConfigurationError`: the field, the value and the remedy."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigurationError(_explain(type(self), error)) from None


def _explain(recipe: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = list(recipe.model_fields)
            near = difflib.get_close_matches(where, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            lines.append(f"unknown field `{where}`.{hint} Known fields: {', '.join(known)}.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            subject = f"`{where}`: " if where else ""
            got = f" (got {short(item['input'])})" if where and item["type"] != "missing" else ""
            lines.append(f"{subject}{message}{got}")
    return f"{recipe.__name__}: " + " ".join(lines)
