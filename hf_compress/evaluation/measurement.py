"""What was measured of one model, and the rows that the table, the JSON and the figures have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..engine.report import CompressionReport
from .agreement import AgreementResult
from .layers import LayerLatency
from .memory import MemoryResult
from .perplexity import PerplexityResult
from .size import SizeOnDisk
from .speed import SpeedResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Score:
    """One figure of a task.

    Attributes:
        name: the task and its metric, as in `"LAMBADA accuracy"`.
        value: the figure.
        count: examples that it was measured on.
        standard_error: of `value` as an estimate from so many examples, where it is known.
        higher_is_better: which way is up.
        note: how it was measured, where that can differ.
    """

    name: str
    value: float
    count: int
    standard_error: float | None = None
    higher_is_better: bool = True
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


class Task(Protocol):
    """Anything that gives scores of a model, such as [`Lambada`] or a function of one's own."""

    def __call__(self, model: PreTrainedModel, processing_class: Any) -> list[Score]: ...


def accuracy_score(name: str, hits: int, count: int) -> Score:
    """A share of hits with its standard error."""
    share = hits / count
    error = (share * (1 - share) / (count - 1)) ** 0.5 if count > 1 else None
    return Score(name, share, count, error)


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model; None stands for what was not.

    Attributes:
        name: what the model is called in tables and figures.
        parameters: in memory, tied ones once.
        size: bytes on disk.
        perplexity, speed, memory: see the functions that measure them.
        agreement: with the first model of the comparison, which has none itself.
        scores: of tasks, in order.
        layers: times of the compressed linear layers beside dense ones, kind by kind.
        compression: the model's own report, if it was compressed.
    """

    name: str
    parameters: int
    size: SizeOnDisk | None = None
    perplexity: PerplexityResult | None = None
    speed: SpeedResult | None = None
    memory: MemoryResult | None = None
    agreement: AgreementResult | None = None
    scores: tuple[Score, ...] = ()
    layers: tuple[LayerLatency, ...] = ()
    compression: CompressionReport | None = None

    def score(self, name: str) -> Score | None:
        """The score of this name, if it was measured."""
        return next((score for score in self.scores if score.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "size": self.size and self.size.to_dict(),
            "perplexity": self.perplexity and self.perplexity.to_dict(),
            "speed": self.speed and self.speed.to_dict(),
            "memory": self.memory and self.memory.to_dict(),
            "agreement": self.agreement and self.agreement.to_dict(),
            "scores": {score.name: score.to_dict() for score in self.scores},
            "layers": [layer.to_dict() for layer in self.layers],
            "compression": self.compression and self.compression.to_dict(),
        }


_Value = Callable[[Measurement], float | None]


@dataclass(frozen=True)
class Row:
    """One figure of every model.

    Attributes:
        title: with the unit.
        value: the figure, None where it was not measured.
        form: how it is printed.
        role: which figure of the report it belongs to.
        higher_is_better: which way is up.
        change: how it is compared with the first model.
        ratio: of the first model's figure, where dividing the two values is not the best estimate.
    """

    title: str
    value: _Value
    form: str
    role: Literal["size", "quality", "cost"]
    higher_is_better: bool = False
    change: Literal["ratio", "difference"] = "ratio"
    ratio: _Value | None = None

    def cell(self, own: Measurement, first: Measurement) -> str:
        """The figure of `own`, compared with that of `first` in brackets."""
        item, base = self.value(own), self.value(first)
        if item is None:
            return "-"
        text = format(item, self.form)
        if own is first or base is None:
            return text
        if self.change == "difference":
            return f"{text} ({item - base:+{self.form}})"
        ratio = self.ratio(own) if self.ratio is not None else item / base if base else None
        return text if ratio is None else f"{text} ({ratio:.2f}x)"


def _part(measured: str, figure: str) -> _Value:
    def value(measurement: Measurement) -> float | None:
        found = getattr(measurement, measured)
        return None if found is None else float(getattr(found, figure))

    return value


def _speed(title: str, figure: str, ratio: str, higher_is_better: bool) -> Row:
    # Rates drift with the machine, so their ratio is the paired one, not that of the two medians.
    return Row(title, _part("speed", figure), ",.1f", "cost", higher_is_better, ratio=_part("speed", ratio))


_ROWS = (
    Row("parameters", lambda m: m.parameters, ",.0f", "size"),
    Row("bytes on disk (weights)", _part("size", "weights"), ",.0f", "size"),
    Row("peak memory (bytes)", _part("memory", "peak"), ",.0f", "cost"),
    Row("perplexity", _part("perplexity", "perplexity"), ".2f", "quality"),
    Row("KL from the first (nats/token)", _part("agreement", "kl"), ".4f", "quality"),
    Row("top-1 agreement with the first", _part("agreement", "top1"), ".4f", "quality", True),
)
_SPEED = (
    _speed("prompt tokens/s", "prompt_tokens_per_second", "prompt_ratio", True),
    _speed("generated tokens/s", "generated_tokens_per_second", "generated_ratio", True),
    _speed("first token (ms)", "first_token_milliseconds", "first_token_ratio", False),
)


def rows_of(measurements: Sequence[Measurement]) -> list[Row]:
    """The rows that at least one model has a figure for, in the order of the table."""
    names = dict.fromkeys(score.name for measurement in measurements for score in measurement.scores)
    rows = [*_ROWS, *(_score_row(name, measurements) for name in names), *_SPEED]
    return [row for row in rows if any(row.value(measurement) is not None for measurement in measurements)]


def _score_row(name: str, measurements: Sequence[Measurement]) -> Row:
    found = [score for measurement in measurements if (score := measurement.score(name)) is not None]

    def value(measurement: Measurement) -> float | None:
        score = measurement.score(name)
        return None if score is None else score.value

    # Shares and correlations are compared by their difference, losses and perplexities by their ratio.
    better = found[0].higher_is_better
    row = Row(name, value, ".4f", "quality", better, "difference" if better else "ratio")
    return replace(row, form=".2f") if max(abs(score.value) for score in found) >= 10 else row


def notes_of(measurements: Sequence[Measurement]) -> list[str]:
    """How the figures were measured, one line each."""
    notes = []
    if any(measurement.compression and measurement.compression.bits_per_weight for measurement in measurements):
        notes.append("parameters: weights that are kept as codes or sparse are no parameters and not counted")
    results = [measurement.perplexity for measurement in measurements if measurement.perplexity]
    if results:
        first = results[0]
        notes.append(f"perplexity: {first.num_tokens:,} tokens scored, context {first.context}, stride {first.stride}")
    agreements = [measurement.agreement for measurement in measurements if measurement.agreement]
    if agreements:
        notes.append(f"agreement: {agreements[0].num_tokens:,} tokens, context {agreements[0].context}")
    memories = [measurement.memory for measurement in measurements if measurement.memory]
    if memories:
        notes.append(f"peak memory: weights and what {memories[0].workload} took on top, on {memories[0].device}")
    speeds = [measurement.speed for measurement in measurements if measurement.speed]
    if speeds:
        run = speeds[0]
        notes.append(
            f"speed: a prompt of {run.batch_size}×{run.prompt_length} tokens, {run.new_tokens} generated ones, "
            f"medians of {run.repeats} repeats, in which the models took turns"
        )
    for name in dict.fromkeys(score.name for measurement in measurements for score in measurement.scores):
        score = next(found for measurement in measurements if (found := measurement.score(name)) is not None)
        error = "" if score.standard_error is None else f", standard error about {score.standard_error:.4f}"
        notes.append(f"{name}: {score.count:,} examples{error}" + (f", {score.note}" if score.note else ""))
    return notes
