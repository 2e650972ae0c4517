"""A table of what compression cost and what it brought, dense beside compressed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from .perplexity import PerplexityResult, as_token_ids, perplexity
from .size import SizeOnDisk, count_parameters, size_on_disk
from .speed import SpeedResult, measure_speed


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model; None stands for what was not."""

    name: str
    parameters: int
    size: SizeOnDisk | None = None
    perplexity: PerplexityResult | None = None
    speed: SpeedResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "size": self.size and self.size.to_dict(),
            "perplexity": self.perplexity and self.perplexity.to_dict(),
            "speed": self.speed and self.speed.to_dict(),
        }


_Value = Callable[[Measurement], float | None]

# Title, value, how it is printed; a row that no model has a value for is left out.
_ROWS: tuple[tuple[str, _Value, str], ...] = (
    ("parameters", lambda m: m.parameters, ",.0f"),
    ("bytes on disk (weights)", lambda m: m.size.weights if m.size else None, ",.0f"),
    ("perplexity", lambda m: m.perplexity.perplexity if m.perplexity else None, ".2f"),
    ("prompt tokens/s", lambda m: m.speed.prompt_tokens_per_second if m.speed else None, ",.1f"),
    ("generated tokens/s", lambda m: m.speed.generated_tokens_per_second if m.speed else None, ",.1f"),
)


@dataclass(frozen=True)
class Comparison:
    """Measurements of several models; the first is what the others are compared with."""

    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: measurements by model name, in order."""
        return {measurement.name: measurement.to_dict() for measurement in self.measurements}

    def table(self) -> Table:
        """One column a model, with the ratio to the first model in brackets."""
        table = Table(caption=self._caption())
        table.add_column("")
        for measurement in self.measurements:
            table.add_column(measurement.name, justify="right")
        for title, value, form in _ROWS:
            if any(value(measurement) is not None for measurement in self.measurements):
                table.add_row(title, *(self._cell(title, value, form, own) for own in self.measurements))
        return table

    def _cell(self, title: str, value: _Value, form: str, own: Measurement) -> str:
        first, item = self.measurements[0], value(own)
        if item is None:
            return "-"
        if own is first:
            return format(item, form)
        # Rates drift with the machine, so their ratio is the paired one, not that of the two medians.
        if own.speed and title.endswith("tokens/s"):
            ratio = own.speed.prompt_ratio if title.startswith("prompt") else own.speed.generated_ratio
        else:
            base = value(first)
            if not base:
                return format(item, form)
            ratio = item / base
        return f"{item:{form}} ({ratio:.2f}x)"

    def _caption(self) -> str | None:
        results = [measurement.perplexity for measurement in self.measurements if measurement.perplexity]
        if not results:
            return None
        result = results[0]
        return f"perplexity: {result.num_tokens:,} tokens scored, context {result.context}, stride {result.stride}"


def measure(
    name: str,
    model: PreTrainedModel,
    data: Int[Tensor, "..."] | Sequence[int] | str | Sequence[str] | None = None,
    processing_class: Any = None,
    *,
    context: int = 2048,
    stride: int | None = None,
    batch_size: int = 1,
    path: str | os.PathLike[str] | None = None,
) -> Measurement:
    """Parameters, bytes on disk where `path` is given, perplexity where `data` is; see [`perplexity`] for the rest."""
    result = None
    if data is not None:
        result = perplexity(model, data, processing_class, context=context, stride=stride, batch_size=batch_size)
    return Measurement(name, count_parameters(model), None if path is None else size_on_disk(path), result)


def compare(
    models: Mapping[str, PreTrainedModel],
    data: Int[Tensor, "..."] | Sequence[int] | str | Sequence[str] | None = None,
    processing_class: Any = None,
    *,
    context: int = 2048,
    stride: int | None = None,
    batch_size: int = 1,
    paths: Mapping[str, str | os.PathLike[str]] | None = None,
    speed: bool = True,
    prompt_length: int = 512,
    new_tokens: int = 64,
    repeats: int = 5,
) -> Comparison:
    """Measure models side by side in one run; the dense model stands first.

    Args:
        models: names and models, all in memory and of one vocabulary.
        data, processing_class, context, stride, batch_size: what the perplexity is measured on, see [`perplexity`];
            without `data` there is none.
        paths: where the models are saved, by name; bytes on disk are given for those.
        speed: also measure the speed, see [`measure_speed`] for `prompt_length`, `new_tokens`, `repeats`.

    Raises:
        CompressionError: as [`perplexity`], [`size_on_disk`] and [`measure_speed`] do.
    """
    token_ids = None if data is None else as_token_ids(data, processing_class)
    settings: dict[str, Any] = {"context": context, "stride": stride, "batch_size": batch_size}
    rows = [
        measure(name, model, token_ids, path=(paths or {}).get(name), **settings) for name, model in models.items()
    ]
    if speed:
        speeds = measure_speed(models, prompt_length=prompt_length, new_tokens=new_tokens, repeats=repeats)
        rows = [replace(row, speed=speeds[row.name]) for row in rows]
    return Comparison(tuple(rows))
