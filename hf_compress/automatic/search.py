"""`auto`: first what every option costs alone, then what these costs say about stacks, then a search."""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..anatomy import resolve_anatomy
from ..calibration.configuration import CalibrationConfig
from ..calibration.data import load_calibration_data
from ..engine.session import Session
from ..errors import CompressionError, ConfigurationError
from ..methods.codebook import CodebookConfig
from ..methods.codebook.allocation import CHOICES, estimate_losses
from ..output import check_output
from .additive import AdditiveModel
from .budget import Budget
from .inputs import (
    FEWEST,
    calibration_data,
    check_directory,
    digest,
    evaluation_ids,
    require_one_process,
    sources_of,
    weights_digest,
)
from .laboratory import Laboratory
from .result import AutoResult, TrialRecord
from .space import AVERAGE_BITS, REDUCTIONS, SPARSITIES, TABLE_BITS, Candidate, all_candidates, coders, describe

# Recipes that the additive model proposes, and best ones that are run again thoroughly.
PROPOSED, FINALISTS = 6, 2


def auto(
    model: str | os.PathLike[str],
    budget: Budget | dict[str, Any],
    *,
    calibration: CalibrationConfig | Any,
    evaluation: Any,
    processing_class: Any = None,
    output: str | os.PathLike[str] | None = None,
    working_directory: str | os.PathLike[str] | None = None,
    max_minutes: float = 120.0,
    max_trials: int = 40,
    quick_samples: int = 16,
    evaluation_tokens: int = 12288,
    context: int = 2048,
    seed: int = 0,
    **load_arguments: Any,
) -> AutoResult:
    """Find the recipe that loses least under a budget: method, ratio, bits, and what stays dense.

    Every option is run alone first, quickly; their losses, taken to add up, propose stacks; Optuna goes on from there.
    Room that a recipe leaves in the budget goes to the matrices whose rounding is estimated to cost most, which stay
    dense. The best are run again with the calibration as given, and the winner's files are measured.

    Args:
        model: id or path of a dense causal language model.
        budget: a [`Budget`], or its fields.
        calibration: what recipes are calibrated on.
        evaluation: a text, a list of texts, token ids of shape (tokens,), the path of a text file, or a
            `CalibrationConfig` whose texts are read in order: what the perplexity is measured on. It must not contain
            the calibration text.
        processing_class: the tokenizer; by default the model's.
        output: where the winner is written, with its tokenizer.
        working_directory: keeps everything that was measured; the same call goes on from there.
        max_minutes: of wall time; the best that was found by then is run thoroughly after it.
        max_trials: recipes that are run quickly.
        quick_samples: calibration sequences of a quick run.
        evaluation_tokens, context: how many tokens of the evaluation text are scored, in windows of this many.
        seed: of the sampler.
        load_arguments: `dtype`, `device_map`, `revision`, `token`, … for loading the model.

    Raises:
        ConfigurationError: optuna is not installed, a bad argument, or no recipe that keeps the budget was found.
        NumericalError: the dense model's perplexity is not finite.
        CalibrationError: data that is missing or too short, or an evaluation text with calibration text in it.
        ResumeError: a working directory of another search.
    """
    optuna = _optuna()
    budget = _budget(budget)
    for field_name, value in (
        ("max_trials", max_trials),
        ("max_minutes", max_minutes),
        ("quick_samples", quick_samples),
    ):
        if value <= 0:
            raise ConfigurationError(f"`{field_name}` must be above 0, got {value}.")
    if evaluation_tokens < FEWEST:
        raise ConfigurationError(f"`evaluation_tokens` must be {FEWEST} or more, got {evaluation_tokens}.")
    require_one_process()
    calibration = calibration if isinstance(calibration, CalibrationConfig) else CalibrationConfig(calibration)
    if not isinstance(model, (str, os.PathLike)):
        raise ConfigurationError(
            f"auto() loads the model once for every recipe: give its id or path, not a {type(model).__name__}."
        )
    name = os.fspath(model)
    own = {key: value for key, value in load_arguments.items() if key not in ("dtype", "device_map")}
    config, processing_class = sources_of(name, own, processing_class)
    destination = None if output is None else Path(output)
    if destination is not None:
        check_output(destination)
    token_ids = evaluation_ids(evaluation, processing_class)[:evaluation_tokens]
    data = calibration_data(calibration, token_ids, processing_class)
    directory = None if working_directory is None else Path(working_directory)
    if directory is not None:
        check_directory(
            directory,
            {
                "model": digest([config.to_dict(), weights_digest(name, own.get("revision"))]),
                "loading": digest(load_arguments),
                "budget": digest(budget.to_dict()),
                "calibration": data.fingerprint,
                "evaluation": digest([token_ids.tolist(), context]),
                "quick_samples": str(quick_samples),
            },
        )
    laboratory = Laboratory(
        model=name,
        processing_class=processing_class,
        calibration=calibration,
        quick_samples=quick_samples,
        token_ids=token_ids,
        context=context,
        budget=budget,
        loading={"dtype": "auto", **load_arguments},
        records_path=None if directory is None else directory / "trials.jsonl",
    )
    search = _Search(laboratory, max_trials, time.monotonic() + 60 * max_minutes)
    search.alone()
    search.proposed()
    search.sampled(optuna, seed)
    best = search.thoroughly(destination, processing_class)
    result = AutoResult(best, laboratory.dense(), tuple(search.records()), tuple(search.refused))
    if directory is not None:
        result.save(directory / "result.json")
    return result


def _budget(given: Any) -> Budget:
    if isinstance(given, Budget):
        return given
    if isinstance(given, dict):
        return Budget(**given)
    return Budget(bytes=given)


@dataclass
class _Search:
    """The course of a search.

    Args:
        deadline: by the monotonic clock.
        refused: what was not run, with the reason.
    """

    laboratory: Laboratory
    max_trials: int
    deadline: float
    refused: list[str] = field(default_factory=list)
    quick: dict[Any, tuple[Candidate, TrialRecord]] = field(default_factory=dict)
    slowest: float = 0.0
    _losses: dict[str, dict[int, float]] | None = None

    def __post_init__(self) -> None:
        self.bar = tqdm(total=self.max_trials, desc="search", unit="recipe", disable=None)
        self.laboratory.dense()

    def records(self) -> list[TrialRecord]:
        return [record for record in self.laboratory.records.values() if record.number >= 0]

    def alone(self) -> None:
        """Every option alone: what it costs, and what stacks have to beat."""
        axes = [Candidate(bits=bits) for bits in (3.0, 4.0, 2.0)]
        axes += [Candidate(bits=4.0, table_bits=bits) for bits in (4, 3)]
        axes += [Candidate(reduction=reduction, coder="none") for reduction in (0.1, 0.3)]
        axes += [Candidate(coder="nf4")] if "nf4" in coders() else []
        axes += [Candidate(coder="wanda", sparsity=0.5)]
        for candidate in axes:
            self.measure(candidate)
        room = self.laboratory.budget.bytes
        if room is not None:
            # The codebooks alone that just keep the budget.
            fitting = [bits for bits in AVERAGE_BITS if self.room(Candidate(bits=bits)) >= 0]
            for bits in fitting[-1:]:
                self.measure(Candidate(bits=bits))

    def proposed(self) -> None:
        """The stacks that the losses of their parts, added up, say are best."""
        measured = [(candidate, record.perplexity) for candidate, record in self.quick.values()]
        model = AdditiveModel.of(measured, self.laboratory.dense().perplexity)
        ranked = []
        for candidate in all_candidates():
            loss = model.loss(candidate)
            if loss is not None:
                ranked.append((loss, candidate))
        ranked.sort(key=lambda pair: pair[0])
        count = 0
        for _, candidate in ranked:
            if count == PROPOSED or not self.in_time():
                return
            if self.room(candidate) < 0:
                continue
            # What was measured alone may have room for dense matrices.
            filled = self.filled(candidate)
            if filled.key() not in self.quick:
                count += self.measure(filled) is not None

    def sampled(self, optuna: Any, seed: int) -> None:
        """Optuna's sampler, told of all that was measured."""
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=1)
        study = optuna.create_study(sampler=sampler, direction="minimize")
        distributions = _distributions(optuna.distributions)
        for candidate, record in self.quick.values():
            study.add_trial(
                optuna.trial.create_trial(
                    params=_parameters(candidate), distributions=distributions, value=self.laboratory.score(record)
                )
            )
        repeated = 0
        while len(self.quick) < self.max_trials and self.in_time() and repeated < 20:
            trial = study.ask(distributions)
            candidate = Candidate(**{name: _plain(value) for name, value in trial.params.items()})
            before = len(self.quick)
            score = 1e4
            if candidate.coder != "none" or candidate.reduction:
                room = self.room(candidate)
                if room >= 0:
                    found = self.measure(self.filled(candidate))
                    score = score if found is None else self.laboratory.score(found)
                elif math.isfinite(room) and self.laboratory.budget.bytes is not None:
                    score = 1000.0 * (1 - room / self.laboratory.budget.bytes)
            study.tell(trial, score)
            repeated = 0 if len(self.quick) > before else repeated + 1

    def thoroughly(self, output: Path | None, processing_class: Any) -> TrialRecord:
        """The best quick recipes again, with all calibration data and joint learning; the winner, written.

        Raises:
            ConfigurationError: none keeps the budget.
        """
        laboratory = self.laboratory
        feasible = [(c, r) for c, r in self.quick.values() if r.feasible]
        feasible.sort(key=lambda pair: laboratory.score(pair[1]))
        if not feasible:
            raise ConfigurationError(self._nothing_found())
        scratch: Any = nullcontext(None)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-")
        finals: list[tuple[Candidate, TrialRecord, Path | None]] = []
        with scratch as place:
            for candidate, record in feasible:
                # More than the planned ones only where those no longer keep the budget.
                if len(finals) >= FINALISTS and any(record.feasible for _, record, _ in finals):
                    break
                if any(record.feasible for _, record, _ in finals) and time.monotonic() > self.deadline:
                    break
                self.bar.set_postfix_str(f"thoroughly: {record.description}")
                folder = None if place is None else Path(place) / str(len(finals))
                finals.append((candidate, laboratory.run(candidate, thorough=True, output=folder), folder))
            self.bar.close()
            candidate, best, folder = min(finals, key=lambda final: laboratory.score(final[1]))
            if not best.feasible:
                raise ConfigurationError(
                    f"run with all calibration data no recipe keeps the budget any longer. The nearest is "
                    f"{best.description}: {best.bytes:,} bytes, perplexity {best.perplexity:.2f}. Widen the budget a "
                    "little."
                )
            if output is None or folder is None:
                return best
            if not folder.exists():  # it was measured before this search was interrupted
                best = laboratory.run(candidate, thorough=True, output=folder, anew=True)
            processing_class.save_pretrained(folder)
            if output.exists():
                output.rmdir()  # it was empty when the search began, and still has to be
            folder.rename(output)
        return replace(best, path=str(output))

    def _nothing_found(self) -> str:
        laboratory = self.laboratory
        message = f"no recipe that was tried keeps the budget {laboratory.budget!r}."
        nearest = min((record for _, record in self.quick.values()), key=laboratory.violation, default=None)
        if nearest is not None:
            message += (
                f" The nearest is {nearest.description}: {nearest.bytes:,} bytes, perplexity {nearest.perplexity:.2f} "
                f"(dense {laboratory.dense().perplexity:.2f})."
            )
        if self.refused:
            message += f" {len(self.refused)} were not run, among them {'; '.join(self.refused[:3])}."
        return message

    def room(self, candidate: Candidate) -> float:
        """Bytes that a candidate leaves of the budget; negative for one that is refused, and then it is noted."""
        try:
            room = self.laboratory.room(candidate)
        except CompressionError as error:
            self.refuse(candidate, str(error))
            return -math.inf
        if room < 0:
            self.refuse(candidate, f"{-room:,.0f} bytes over the budget")
        return room

    def in_time(self) -> bool:
        return time.monotonic() + self.slowest < self.deadline

    def measure(self, candidate: Candidate) -> TrialRecord | None:
        """Run a candidate quickly; `None` where there is no time left or the model does not allow it."""
        if candidate.key() in self.quick:
            return self.quick[candidate.key()][1]
        if not self.in_time() or len(self.quick) >= self.max_trials:
            return None
        began = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # every recipe would warn of the same few tokens
                record = self.laboratory.run(candidate, thorough=False)
        except CompressionError as error:
            self.refuse(candidate, str(error))
            return None
        except (RuntimeError, MemoryError) as error:  # too large for this machine: others may not be
            self.refuse(candidate, f"{type(error).__name__}: {error}")
            return None
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.quick[candidate.key()] = (candidate, record)
        self.bar.update()
        self.bar.set_postfix_str(f"{record.description}: {record.perplexity:.2f} at {record.bytes:,} bytes")
        return record

    def refuse(self, candidate: Candidate, reason: str) -> None:
        line = f"{describe(candidate)}: {reason}"
        if line not in self.refused:
            self.refused.append(line)

    def filled(self, candidate: Candidate) -> Candidate:
        """The candidate with matrices left dense as far as the budget allows, the most worthwhile first."""
        room = self.room(candidate)
        if candidate.coder != "codebook" or not math.isfinite(room):
            return candidate
        rows = {row.path: row for row in self.laboratory.plan(candidate).rows if row.block >= 0}
        losses = self.losses(list(rows))
        bits = min(max(CHOICES), max(min(CHOICES), round(candidate.bits)))

        def price(path: str) -> int:
            # What it takes dense, at the size that the stages before leave it.
            width = rows[path].bytes_before / rows[path].weights_before
            return int(rows[path].weights_after * width) - rows[path].bytes_after

        chosen: list[str] = []
        for path in sorted(rows, key=lambda path: -losses[path][bits] / max(price(path), 1)):
            if price(path) <= room and losses[path][bits] > 0:
                room -= price(path)
                chosen.append(path)
        # With bits by data the average is over what is left: the plan has the last word.
        while chosen and not self._fits(replace(candidate, dense=tuple(sorted(chosen)))):
            chosen = chosen[:-1]
        return replace(candidate, dense=tuple(sorted(chosen)))

    def _fits(self, candidate: Candidate) -> bool:
        try:
            return self.laboratory.room(candidate) >= 0
        except CompressionError:
            return False  # nothing is left to code

    def losses(self, paths: Sequence[str]) -> dict[str, dict[int, float]]:
        """What rounding every matrix alone is estimated to cost, by bits."""
        if self._losses is None:
            model = self.laboratory.load()
            data = load_calibration_data(self.laboratory.calibration, self.laboratory.processing_class)
            session = Session(resolve_anatomy(model), data.batches, [])
            found = estimate_losses(session, CodebookConfig(bits=3), list(paths))
            self._losses = dict(zip(paths, found, strict=True))
        return self._losses


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigurationError("auto() needs optuna: pip install 'hf_compress[auto]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distributions(kinds: Any) -> dict[str, Any]:
    return {
        "reduction": kinds.CategoricalDistribution(REDUCTIONS),
        "coder": kinds.CategoricalDistribution(coders()),
        "bits": kinds.FloatDistribution(AVERAGE_BITS[0], AVERAGE_BITS[-1], step=AVERAGE_BITS[1] - AVERAGE_BITS[0]),
        "table_bits": kinds.CategoricalDistribution(TABLE_BITS),
        "sparsity": kinds.CategoricalDistribution(SPARSITIES),
    }


def _parameters(candidate: Candidate) -> dict[str, Any]:
    return {name: getattr(candidate, name) for name in ("reduction", "coder", "bits", "table_bits", "sparsity")}


def _plain(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
