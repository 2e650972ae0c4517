"""What a search tried and what it found."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..configuration import CompressionConfig
from ..errors import ConfigurationError


@dataclass(frozen=True)
class TrialRecord:
    """One recipe that was run and measured.

    Args:
        number: in the order of the runs; -1 for the dense model.
        recipe: as plain JSON; `None` for the dense model.
        description: in a few words.
        learning, num_samples: how thoroughly it was run: the search looks at many recipes quickly.
        bytes: of all files of the model as written.
        memory: bytes of its tensors in memory.
        perplexity: on the evaluation text.
        tokens_per_second: of generation; `None` if it was not asked for.
        seconds: of the compression.
        feasible: whether it keeps the budget.
        candidate: what the search calls it.
        path: where the model is, if it was kept.
    """

    number: int
    recipe: dict[str, Any] | None
    description: str
    learning: str
    num_samples: int
    bytes: int
    memory: int
    perplexity: float
    tokens_per_second: float | None
    seconds: float
    feasible: bool
    candidate: dict[str, Any] = field(default_factory=dict)
    path: str | None = None

    @property
    def config(self) -> CompressionConfig | None:
        """The recipe to compress with; `None` for the dense model."""
        return None if self.recipe is None else CompressionConfig(**self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; a perplexity that is not finite is `None`."""
        return {**asdict(self), "perplexity": self.perplexity if math.isfinite(self.perplexity) else None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrialRecord:
        """Of what `to_dict` gave. Raises `TypeError` or `KeyError` for anything else."""
        return cls(**{**data, "perplexity": math.inf if data["perplexity"] is None else data["perplexity"]})


@dataclass(frozen=True)
class AutoResult:
    """
    Result of [`auto`].

    Args:
        best: the recipe that won, run thoroughly; its `config`, and its `path` where an output folder was given.
        dense: the model as it was.
        trials: everything that was run, in order.
        refused: recipes whose plan was over the budget, with the reason; they were not run.
    """

    best: TrialRecord
    dense: TrialRecord
    trials: tuple[TrialRecord, ...]
    refused: tuple[str, ...] = ()

    @property
    def pareto(self) -> list[TrialRecord]:
        """Trials than which none is smaller and better at once, by size."""
        return pareto_front(self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "best": self.best.to_dict(),
            "dense": self.dense.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "refused": list(self.refused),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was tried as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """All trials, best first."""
        table = Table(caption="* keeps the budget; P on the Pareto front")
        for title, justify in (("", "left"), ("recipe", "left"), ("bytes", "right"), ("perplexity", "right")):
            table.add_column(title, justify=justify)  # type: ignore[arg-type]
        table.add_column("tokens/s", justify="right")
        table.add_column("run", justify="right")
        front = {trial.number for trial in self.pareto}
        for trial in [self.dense, *sorted(self.trials, key=lambda trial: trial.perplexity)]:
            mark = ("*" if trial.feasible else "") + ("P" if trial.number in front else "")
            speed = "-" if trial.tokens_per_second is None else f"{trial.tokens_per_second:.1f}"
            run = "-" if trial.recipe is None else f"{trial.learning}, {trial.num_samples} samples"
            table.add_row(mark, trial.description, f"{trial.bytes:,}", f"{trial.perplexity:.2f}", speed, run)
        return table

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Draw size against perplexity with the Pareto front, as PNG, SVG or PDF by the name.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigurationError(
                "the figure needs matplotlib: pip install 'hf_compress[auto]' or matplotlib."
            ) from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        front = self.pareto
        numbers = {trial.number for trial in front}
        others = [trial for trial in self.trials if trial.number not in numbers]
        axes.scatter([t.bytes / 1e6 for t in others], [t.perplexity for t in others], marker="x", label="tried")
        axes.plot([t.bytes / 1e6 for t in front], [t.perplexity for t in front], marker="o", label="Pareto front")
        axes.scatter(self.best.bytes / 1e6, self.best.perplexity, marker="*", s=220, zorder=3, label="chosen")
        axes.axhline(self.dense.perplexity, linestyle=":", label=f"dense, {self.dense.bytes / 1e6:.0f} MB")
        for trial in front:
            axes.annotate(
                trial.description, (trial.bytes / 1e6, trial.perplexity), fontsize=7, rotation=20, va="bottom"
            )
        axes.set_xlabel("files of the model (MB)")
        axes.set_ylabel("perplexity")
        axes.set_yscale("log")
        axes.legend()
        figure.savefig(path, dpi=150)


def pareto_front(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials that no other beats in size and perplexity both, by size."""
    front: list[TrialRecord] = []
    lowest = math.inf
    for trial in sorted(trials, key=lambda trial: (trial.bytes, trial.perplexity)):
        if trial.perplexity < lowest:
            front.append(trial)
            lowest = trial.perplexity
    return front
