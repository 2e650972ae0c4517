"""Running a candidate and measuring what it gives, once: everything that was measured is kept in a file."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..calibration.configuration import CalibrationConfig
from ..engine.compress import compress
from ..engine.freed import return_freed_memory
from ..engine.plan import CompressionPlan, plan
from ..errors import ConfigurationError, NumericalError, ResumeError
from ..evaluation import measure_speed, perplexity
from ..output import write_text
from .budget import Budget
from .result import TrialRecord
from .space import Candidate, describe

# Beside the tensors a folder holds their names and shapes, the config with the layout, and the recipe.
BYTES_OF_NAMES, BYTES_OF_FOLDER = 1024, 128 * 1024
GENERATED = 32


@dataclass
class Laboratory:
    """A model, data, a budget, and the records so far.

    Args:
        model: id or path of the dense model.
        calibration: data of the thorough runs; quick ones take fewer of its sequences.
        quick_samples: that many.
        token_ids: of the evaluation text, (tokens,).
        context: of the perplexity's windows.
        records_path: where records are appended, a JSON line each; `None` keeps them in memory.
    """

    model: str
    processing_class: Any
    calibration: CalibrationConfig
    quick_samples: int
    token_ids: Int[Tensor, "tokens"]
    context: int
    budget: Budget
    loading: dict[str, Any]
    records_path: Path | None = None
    records: dict[str, TrialRecord] = field(default_factory=dict)
    _plans: dict[Any, CompressionPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `ResumeError` for records that cannot be read."""
        if self.records_path is None or not self.records_path.exists():
            return
        lines = self.records_path.read_bytes().split(b"\n")
        # What follows the last line's end was being written when the run was killed.
        for number, line in enumerate(lines[:-1], 1):
            try:
                kept = json.loads(line)
                self.records[kept["key"]] = TrialRecord.from_dict(kept["record"])
            except (ValueError, KeyError, TypeError) as error:
                raise ResumeError(
                    f"{self.records_path}, line {number} is no record of a trial ({error!r}): it is damaged, or of "
                    "another version. Remove the line, or name another working directory."
                ) from error
        if lines[-1]:
            write_text(self.records_path, b"\n".join([*lines[:-1], b""]).decode())

    def load(self) -> PreTrainedModel:
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.model, **self.loading)
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            raise ConfigurationError(f"{self.model!r} cannot be loaded as a causal language model: {error}") from error
        return model.eval()

    def dense(self) -> TrialRecord:
        """The model as it is."""
        if "dense" not in self.records:
            model = self.load()
            with tempfile.TemporaryDirectory() as folder:
                record = self._measured(model, None, "dense", "", 0, 0.0, Path(folder))
            if not math.isfinite(record.perplexity):
                raise NumericalError(
                    f"the dense model {self.model!r} has no finite perplexity on the evaluation text."
                )
            self._keep("dense", replace(record, number=-1))
        return self.records["dense"]

    def plan(self, candidate: Candidate) -> CompressionPlan:
        """Sizes of a candidate, without running it."""
        recipe = candidate.recipe()
        assert recipe is not None
        if candidate.key() not in self._plans:
            self._plans[candidate.key()] = plan(
                self.model,
                recipe,
                calibration=self.calibration,
                measure_time=False,
                **{name: value for name, value in self.loading.items() if name != "device_map"},
            )
        return self._plans[candidate.key()]

    def room(self, candidate: Candidate) -> float:
        """Bytes that a candidate leaves of the budget, negative if it is over; infinite without a limit."""
        if self.budget.bytes is None:
            return math.inf
        planned = self.plan(candidate)
        return self.budget.bytes - planned.bytes_at_most - BYTES_OF_NAMES * len(planned.rows) - BYTES_OF_FOLDER

    def run(
        self, candidate: Candidate, *, thorough: bool, output: Path | None = None, anew: bool = False
    ) -> TrialRecord:
        """Compress, write, and measure a candidate, or look up what an earlier run measured.

        Args:
            output: where a candidate that is run is written.
            anew: run it even if it was measured.

        Raises:
            CompressionError: as `compress` does.
        """
        recipe = candidate.recipe("joint" if thorough else "feedback")
        assert recipe is not None
        samples = self.calibration.num_samples
        calibration = self.calibration
        if not thorough:
            samples = min(samples, self.quick_samples)
            calibration = calibration.model_copy(update={"num_samples": samples})
        key = json.dumps([recipe.to_dict(), samples])
        known = self.records.get(key)
        if known is not None and not anew:
            return known
        model = self.load()
        began = time.perf_counter()
        compress(model, recipe, processing_class=self.processing_class, calibration=calibration)
        seconds = time.perf_counter() - began
        learning = "joint" if thorough else "feedback"
        with _folder(output) as folder:
            record = self._measured(model, recipe.to_dict(), describe(candidate), learning, samples, seconds, folder)
        del model
        return_freed_memory()
        record = replace(record, candidate=candidate.to_dict())
        if known is not None:
            record = replace(record, number=known.number)
        self._keep(key, record)
        return record

    def _measured(
        self,
        model: PreTrainedModel,
        recipe: dict[str, Any] | None,
        description: str,
        learning: str,
        samples: int,
        seconds: float,
        folder: Path,
    ) -> TrialRecord:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        memory = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
        try:
            found = perplexity(model, self.token_ids, context=self.context).perplexity
        except NumericalError:
            found = math.inf  # a model that has gone to pieces; no reason to stop looking
        speed = None
        if self.budget.min_tokens_per_second is not None:
            speed = measure_speed({"model": model}, prompt_length=32, new_tokens=GENERATED, repeats=3)[
                "model"
            ].generated_tokens_per_second
        record = TrialRecord(
            number=sum(record.number >= 0 for record in self.records.values()),
            recipe=recipe,
            description=description,
            learning=learning,
            num_samples=samples,
            bytes=size,
            memory=memory,
            perplexity=found,
            tokens_per_second=speed,
            seconds=round(seconds, 1),
            feasible=False,
        )
        return replace(record, feasible=self.violation(record) == 0)

    def violation(self, record: TrialRecord) -> float:
        """How far a record is over the budget: the relative excesses, added up."""
        budget, over = self.budget, 0.0
        if budget.bytes is not None:
            over += max(record.bytes / budget.bytes - 1, 0)
        if budget.memory is not None:
            over += max(record.memory / budget.memory - 1, 0)
        if budget.max_perplexity_increase is not None and "dense" in self.records:
            allowed = self.records["dense"].perplexity * (1 + budget.max_perplexity_increase)
            over += max(min(record.perplexity / allowed, 1e6) - 1, 0)
        if budget.min_tokens_per_second is not None and record.tokens_per_second is not None:
            over += max(budget.min_tokens_per_second / max(record.tokens_per_second, 1e-9) - 1, 0)
        return over

    def score(self, record: TrialRecord) -> float:
        """What the search makes small: the loss, or without a limit on size and speed the size; over the budget, more
        than any that keeps it."""
        budget = self.budget
        limited = (budget.bytes, budget.memory, budget.min_tokens_per_second) != (None, None, None)
        dense = self.records["dense"]
        own = math.log(record.perplexity / dense.perplexity) if limited else record.bytes / dense.bytes
        over = self.violation(record)
        return min(own, 50.0) + (100.0 * (1 + over) if over else 0.0)

    def _keep(self, key: str, record: TrialRecord) -> None:
        self.records[key] = record
        if self.records_path is not None:
            with self.records_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "record": record.to_dict()}) + "\n")
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """A temporary folder, or `output`."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def overlap(first: Int[Tensor, "tokens"], second: Int[Tensor, "tokens"], length: int = 64) -> bool:
    """Whether a stretch of tokens, of 64 or of all there are, stands in both."""
    length = min(length, len(first), len(second))

    def stretches(ids: Tensor, step: int) -> set[bytes]:
        windows = ids.to(torch.int64).unfold(0, length, step) if len(ids) >= length else ids[:0].reshape(0, length)
        return {window.numpy().tobytes() for window in windows.contiguous()}

    return not stretches(first.cpu(), length).isdisjoint(stretches(second.cpu(), 1))
