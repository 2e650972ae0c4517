"""Figures that were measured of base and compressed model, as the card shows them and as the repository keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult

from ..checked import is_nested_deeper, is_number
from ..errors import ConfigurationError
from ..provenance import cleaned

if TYPE_CHECKING:
    from ..evaluation import Comparison

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class _Figure:
    title: str
    path: tuple[str, str]
    form: str
    metric: str | None = None  # as the Hub calls it; None for what depends on the machine
    relative: bool = False  # to the base, which has no such figure itself
    language: bool = True  # only language models have one


_FIGURES = (
    _Figure("bytes on disk (weights)", ("size", "weights"), ",.0f", language=False),
    _Figure("perplexity", ("perplexity", "perplexity"), ".2f", "perplexity"),
    _Figure("KL divergence from the base (nats a token)", ("agreement", "kl"), ".4f", "kl_divergence", True),
    _Figure("same next token as the base", ("agreement", "top1"), ".2%", "agreement", True),
    _Figure("peak memory (bytes)", ("memory", "peak"), ",.0f", language=False),
    _Figure("prompt tokens/s", ("speed", "prompt_tokens_per_second"), ",.1f"),
    _Figure("generated tokens/s", ("speed", "generated_tokens_per_second"), ",.1f"),
)


@dataclass(frozen=True)
class Evaluation:
    """
    Args:
        compressed: one measurement as `Measurement.to_dict` gives it, without the model's name.
        base: the same of the base, measured in the same way; None if it was not.
        data: the name of the text that perplexity and agreement were measured on; None where nobody said.
    """

    compressed: dict[str, Any]
    base: dict[str, Any] | None = None
    data: str | None = None

    @classmethod
    def load(cls, source: Comparison | dict[str, Any] | str | Path, data: str | None = None) -> Evaluation:
        """From a `Comparison`, its dictionary, the JSON of `hf-compress eval --json`, or the file of a repository.

        Names of models are dropped: they may be folders of the machine that measured.

        Raises:
            ConfigurationError: a file that cannot be read, or figures of other than one or two models.
        """
        if isinstance(source, (str, Path)):
            try:
                source = json.loads(Path(source).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise ConfigurationError(f"the evaluation cannot be read: {error}.") from error
        content: Any = source if isinstance(source, dict) else getattr(source, "to_dict", dict)()
        if not isinstance(content, dict) or not content:
            raise ConfigurationError("an evaluation is what `hf-compress eval BASE COMPRESSED --json` prints.")
        if "compressed" in content and set(content) <= {"base", "compressed", "data"}:
            data = data or content.get("data")
            models = [content[name] for name in ("base", "compressed") if content.get(name) is not None]
        else:
            models = list(content.values())
        if len(models) > 2 or not all(isinstance(model, dict) and "parameters" in model for model in models):
            raise ConfigurationError(
                "an evaluation compares the base with the compressed model: `hf-compress eval BASE COMPRESSED --json`."
            )
        if is_nested_deeper(models) or not (data is None or isinstance(data, str)):
            raise ConfigurationError("the evaluation's figures or the name of its data are of the wrong kind.")
        models = cleaned(models)
        kept = [{key: value for key, value in model.items() if key not in ("name", "compression")} for model in models]
        return cls(kept[-1], kept[0] if len(kept) == 2 else None, data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, which `load` reads."""
        return {"data": self.data, "base": self.base, "compressed": self.compressed}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Title, before, after and change of every figure of the compressed model."""
        found = []
        for title, form, value in self._figures():
            after = value(self.compressed)
            if after is None:
                continue
            before = None if self.base is None else value(self.base)
            change = f"{after / before - 1:+.1%}" if before and math.isfinite(after / before) else ""
            if title in _RELATIVE:
                found.append((title, "", format(after, form), ""))
                continue
            found.append(
                (title, "not measured" if before is None else format(before, form), format(after, form), change)
            )
        return found

    def _figures(self) -> list[tuple[str, str, Callable[[dict[str, Any]], float | None]]]:
        figures = [(figure.title, figure.form, _at(*figure.path)) for figure in _FIGURES]
        return figures + [(name, ".4f", _at("scores", name, "value")) for name in self._scores]

    @property
    def _scores(self) -> dict[str, Any]:
        found = self.compressed.get("scores")
        return found if isinstance(found, dict) else {}

    def results(self, pipeline_tag: str | None) -> list[EvalResult]:
        """For the card's `model-index`: measures of quality, none of the machine's."""
        task = pipeline_tag or "other"
        text = self.data or "a text whose name was not recorded"
        found = [
            EvalResult(task, _dataset_type(self.data), text, figure.metric, value, metric_name=figure.title)
            for figure in _FIGURES
            if figure.metric is not None and (value := _at(*figure.path)(self.compressed)) is not None
        ]
        for name in self._scores:
            value = _at("scores", name, "value")(self.compressed)
            if value is not None:
                dataset, _, metric = name.rpartition(" ")
                found.append(EvalResult(task, dataset or name, dataset or name, metric, value, metric_name=name))
        return found

    def notes(self) -> list[str]:
        """How it was measured."""
        lines = []
        perplexity: Any = self.compressed.get("perplexity")
        speed: Any = self.compressed.get("speed")
        if _has(perplexity, "num_tokens", "context", "stride"):
            on = f"on {self.data}" if self.data else "on a text whose name was not recorded"
            lines.append(
                f"Perplexity: {on}, {perplexity['num_tokens']:,} tokens scored, context {perplexity['context']}, "
                f"stride {perplexity['stride']}."
            )
        if _has(speed, "batch_size", "prompt_length", "new_tokens"):
            lines.append(
                f"Speed: a prompt of {speed['batch_size']}×{speed['prompt_length']} tokens and {speed['new_tokens']} "
                "generated ones, base and compressed model in turn on one machine; on another it will differ."
            )
        for name, score in self._scores.items():
            if _at("count")(score) is not None:
                error = _at("standard_error")(score)
                spread = "" if error is None else f", standard error about {error:.4f}"
                note = f", {score['note']}" if score.get("note") else ""
                lines.append(f"{name}: {score['count']:,} examples{spread}{note}.")
        return lines


_RELATIVE = {figure.title for figure in _FIGURES if figure.relative}


def missing_figures(evaluation: Evaluation | None, *, language: bool) -> list[str]:
    """Titles of what the card would show of such a model and nobody measured."""
    wanted = [figure for figure in _FIGURES if language or not figure.language]
    found = {} if evaluation is None else evaluation.compressed
    return [figure.title for figure in wanted if _at(*figure.path)(found) is None]


def _dataset_type(data: str | None) -> str:
    """The id of a dataset on the Hub, in front of whatever else the name says."""
    first = data.split()[0].rstrip(",;:") if data and data.split() else ""
    return first if first.count("/") == 1 else "text"


def _has(found: Any, *names: str) -> bool:
    """Whether an object has all these numbers."""
    return all(_at(name)(found) is not None for name in names)


def _at(*path: str) -> Callable[[dict[str, Any]], float | None]:
    def value(measurement: dict[str, Any]) -> float | None:
        found: Any = measurement
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if is_number(found) else None

    return value
