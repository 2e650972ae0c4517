"""Zero-shot tasks through EleutherAI's lm-evaluation-harness, on a model that is already in memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .forward import evaluation_mode
from .measurement import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness, such as multiple choice by log-likelihood.

    Args:
        names: of the tasks.
        task_path: a folder of task files (YAML), whose data may be files of this machine; without it the harness's
            own tasks, which it fetches from the Hub.
        num_fewshot: worked examples before each question.
        limit: examples a task, the first ones.
        batch_size: requests a forward pass.

    Raises:
        ConfigurationError: where the package lm-eval is missing, the folder is not there or a task is unknown.
    """

    names: Sequence[str]
    task_path: str | os.PathLike[str] | None = None
    num_fewshot: int = 0
    limit: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        manager = self._manager()
        unknown = [name for name in self.names if name not in manager.all_tasks]
        if unknown or not self.names:
            known = ", ".join(manager.all_tasks[:10]) if self.task_path is not None else "lm-eval ls tasks shows them"
            raise ConfigurationError(f"no task {', '.join(unknown) or 'was named'}; known: {known}.")

    def _manager(self) -> Any:
        if self.task_path is not None and not Path(self.task_path).is_dir():
            raise ConfigurationError(f"{str(self.task_path)!r} is no folder of task files.")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigurationError(
                f"tasks need lm-evaluation-harness ({error}): pip install 'hf_compress[lm-eval]'."
            ) from error
        path = None if self.task_path is None else str(self.task_path)
        return TaskManager(include_path=path, include_defaults=path is None)

    def __call__(self, model: PreTrainedModel, processing_class: Any) -> list[Score]:
        if processing_class is None:
            raise ConfigurationError("tasks need `processing_class=` (the model's tokenizer).")
        manager = self._manager()
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # A copy: the harness gives a tokenizer without padding a padding token.
        tokenizer = copy.deepcopy(processing_class)
        with evaluation_mode(model):
            results = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=list(self.names),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=manager,
                log_samples=False,
                # Else it would seed the generators of the whole process.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                # Errors of accuracies have a formula; those of other metrics would be drawn ten thousand times.
                bootstrap_iters=0,
            )
        return _scores(results)


def _scores(results: dict[str, Any]) -> list[Score]:
    """Every metric of every task; the harness keys them as `"metric,filter"`."""
    scores = []
    for task, metrics in results["results"].items():
        directions = results["higher_is_better"].get(task, {})
        count = results["n-samples"].get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            name = f"{task} {metric}" + ("" if chosen == "none" else f" ({chosen})")
            error = metrics.get(f"{metric}_stderr,{chosen}")
            error = float(error) if isinstance(error, (int, float)) else None
            scores.append(Score(name, float(value), int(count), error, directions.get(metric) is not False))
    return scores
