"""What compression cost and what it brought, dense beside compressed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from .agreement import agreement as measure_agreement
from .layers import compressed_layers, measure_layers
from .measurement import Measurement, Row, Task, notes_of, rows_of
from .memory import measure_memory
from .perplexity import as_token_ids, perplexity
from .size import count_parameters, size_on_disk
from .speed import measure_speed


@dataclass(frozen=True)
class Comparison:
    """Measurements of several models; the first is what the others are compared with."""

    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: measurements by model name, in order; None stands for what is not finite, too."""
        return {measurement.name: _finite(measurement.to_dict()) for measurement in self.measurements}

    @property
    def rows(self) -> list[Row]:
        """The figures that at least one model has."""
        return rows_of(self.measurements)

    @property
    def notes(self) -> list[str]:
        """How they were measured."""
        return notes_of(self.measurements)

    def __str__(self) -> str:
        console = Console(width=max(80, 24 + 28 * len(self.measurements)), no_color=True)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get().rstrip()

    def layer_table(self) -> Table | None:
        """Times of compressed linear layers beside dense ones; `None` where none were measured."""
        if not any(measurement.layers for measurement in self.measurements):
            return None
        table = Table(caption="one layer of every kind beside a dense one of its size, in turns; milliseconds")
        for title in ("model", "first of its kind", "layers", "dense", "compressed", "speed-up"):
            table.add_column(title, justify="left" if title in ("model", "first of its kind") else "right")
        for measurement in self.measurements:
            for layer in measurement.layers:
                times = (f"{layer.dense_milliseconds:.3f}", f"{layer.milliseconds:.3f}", f"{layer.speedup:.2f}x")
                table.add_row(Text(measurement.name), Text(layer.path), str(layer.count), *times)
        return table

    def table(self) -> Table:
        """One column a model, compared with the first model in brackets."""
        # As texts: a model's name or a task's is not to be read as rich's markup.
        table = Table(caption=Text("\n".join(self.notes)) if self.notes else None)
        table.add_column("")
        for measurement in self.measurements:
            table.add_column(Text(measurement.name), justify="right")
        for row in self.rows:
            cells = (row.cell(own, self.measurements[0]) for own in self.measurements)
            table.add_row(*(Text(text) for text in (row.title, *cells)))
        return table


def _finite(value: Any) -> Any:
    """JSON has no infinity, and a perplexity may be one."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    reference: PreTrainedModel | None = None,
    memory: bool = False,
    prompt_length: int = 512,
    new_tokens: int = 64,
    tasks: Sequence[Task] = (),
    layer_tokens: int | None = None,
) -> Measurement:
    """Everything but speed, which is measured of models in turn.

    Args:
        name: what the model is called in tables.
        model: in memory.
        data, processing_class, context, stride, batch_size: what the perplexity is measured on, see [`perplexity`];
            without `data` there is none.
        path: where the model is saved, for the bytes on disk.
        reference: the dense model, for the agreement with it on `data`.
        memory: also measure the peak memory, see [`measure_memory`] for `prompt_length` and `new_tokens`.
        tasks: what gives scores: [`Lambada`], [`SentenceSimilarity`], [`ImageClassification`], [`HarnessTasks`] or
            functions of the model and the `processing_class`.
        layer_tokens: also time the compressed linear layers on so many tokens, see [`measure_layers`].

    Raises:
        CompressionError: as what measures does.
    """
    # First of all: what a model keeps from its first run would be missing from its peak.
    peak = measure_memory(model, prompt_length=prompt_length, new_tokens=new_tokens) if memory else None
    result = shared = None
    if data is not None:
        token_ids = as_token_ids(data, processing_class)
        result = perplexity(model, token_ids, context=context, stride=stride, batch_size=batch_size)
        if reference is not None:
            shared = measure_agreement(reference, model, token_ids, context=context, batch_size=batch_size)
    return Measurement(
        name,
        count_parameters(model),
        size=None if path is None else size_on_disk(path),
        perplexity=result,
        memory=peak,
        agreement=shared,
        scores=tuple(score for task in tasks for score in task(model, processing_class)),
        layers=tuple(measure_layers(model, tokens=layer_tokens)) if layer_tokens and compressed_layers(model) else (),
        compression=getattr(model, "compression_report", None),
    )


def compare(
    models: Mapping[str, PreTrainedModel],
    data: Int[Tensor, "..."] | Sequence[int] | str | Sequence[str] | None = None,
    processing_class: Any = None,
    *,
    context: int = 2048,
    stride: int | None = None,
    batch_size: int = 1,
    paths: Mapping[str, str | os.PathLike[str]] | None = None,
    agreement: bool = False,
    memory: bool = False,
    tasks: Sequence[Task] = (),
    layer_tokens: int | None = None,
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
        agreement: also measure how far the others' predictions on `data` are from the first model's.
        memory, tasks, layer_tokens: see [`measure`].
        speed: also measure the speed, see [`measure_speed`] for `prompt_length`, `new_tokens`, `repeats`.

    Raises:
        CompressionError: as [`perplexity`], [`size_on_disk`] and [`measure_speed`] do.
    """
    token_ids = None if data is None else as_token_ids(data, processing_class)
    first = next(iter(models.values()), None)
    rows = [
        measure(
            name,
            model,
            token_ids,
            processing_class,
            context=context,
            stride=stride,
            batch_size=batch_size,
            path=(paths or {}).get(name),
            reference=first if agreement and model is not first else None,
            memory=memory,
            prompt_length=prompt_length,
            new_tokens=new_tokens,
            tasks=tasks,
            layer_tokens=layer_tokens,
        )
        for name, model in models.items()
    ]
    if speed:
        speeds = measure_speed(models, prompt_length=prompt_length, new_tokens=new_tokens, repeats=repeats)
        rows = [replace(row, speed=speeds[row.name]) for row in rows]
    return Comparison(tuple(rows))
