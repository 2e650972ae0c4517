"""Accuracy after pruning and tuning: sparsities × criteria × schedules × seeds, the same tuning for all.

    python tests/benchmarks/pruning_accuracy.py --task sst2 --model MINILM --data SST2 \
        --sparsity 0.9 --criterion magnitude sensitivity --schedule cubic --seeds 0 1 2

One JSON line a cell. `--schedule single_shot` prunes once: after the head's warm-up, or, for criteria that watch the
tuning, after a third of it. `cubic` prunes from 5 % to 65 % of the tuning. `dense` tunes without pruning.
`--distill` adds the dense tuned model as a teacher. `--seconds` leaves out cells that would start after that time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from pruning_tasks import TASKS, Task
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_compress import PruningCallback, PruningConfig

WATCHING = ("sensitivity", "delta", "movement")


class Distilling(Trainer):
    """Half of the loss from the teacher's probabilities at temperature 2, where there is a teacher."""

    teacher: nn.Module | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.teacher is not None and model.training:
            with torch.no_grad():
                wanted = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits / 2
            own = F.log_softmax(outputs.logits.float() / 2, dim=-1)
            loss = 0.5 * loss + 2 * F.kl_div(own, F.softmax(wanted.float(), dim=-1), reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


def tune(task: Task, arguments: argparse.Namespace, seed: int, callbacks: list[Any], teacher: Any = None) -> Any:
    set_seed(seed)
    model = task.load()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Distilling(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                weight_decay=0.01,
                bf16=arguments.bf16,
                use_cpu=not torch.accelerator.is_available(),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                remove_unused_columns=False,
                seed=seed,
            ),
            train_dataset=task.train,
            data_collator=task.collate,
            callbacks=callbacks,
        )
        trainer.teacher = teacher
        trainer.train()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    model.eval()
    right = 0
    for start in range(0, len(task.test), 128):
        batch = task.collate(task.test[start : start + 128])
        labels = batch.pop("labels")
        device = next(model.parameters()).device
        found = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits.argmax(dim=-1)
        right += int((found.cpu() == labels).sum())
    return right / len(task.test)


def recipe(criterion: str, schedule: str, sparsity: float, arguments: argparse.Namespace) -> PruningConfig:
    fields: dict[str, Any] = {"sparsity": sparsity, "criterion": criterion, "scope": arguments.scope}
    if schedule == "cubic":
        return PruningConfig(schedule="cubic", start_step=0.05, end_step=0.65, **fields)
    if criterion in WATCHING:
        return PruningConfig(start_step=0.33, **fields)
    return PruningConfig(warmup_steps=arguments.warmup_steps, **fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.98])
    parser.add_argument("--criterion", nargs="+", default=["magnitude", "snip_magnitude", "sensitivity"])
    parser.add_argument("--schedule", nargs="+", default=["cubic"], choices=["dense", "single_shot", "cubic"])
    parser.add_argument("--scope", default="global", choices=["global", "layer"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--train-examples", type=int, default=5000)
    parser.add_argument("--test-examples", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=56)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    task, began = TASKS[arguments.task](arguments), time.monotonic()
    teachers: dict[int, Any] = {}

    def dense(seed: int) -> Any:
        if seed not in teachers:
            teachers[seed] = tune(task, arguments, seed, []).eval()
        return teachers[seed]

    cells = [("dense", "", 0.0)] if "dense" in arguments.schedule else []
    schedules = [schedule for schedule in arguments.schedule if schedule != "dense"]
    cells += [(s, c, z) for z in arguments.sparsity for c in arguments.criterion for s in schedules]
    for schedule, criterion, sparsity in cells:
        for seed in arguments.seeds:
            start = time.monotonic()
            if start - began > arguments.seconds:
                return
            if schedule == "dense":
                model = dense(seed)
            else:
                callback = PruningCallback(recipe(criterion, schedule, sparsity, arguments))
                teacher = dense(seed) if arguments.distill else None
                model = tune(task, arguments, seed, [callback], teacher)
            line = {
                "task": arguments.task,
                "schedule": schedule,
                "criterion": criterion,
                "sparsity": sparsity,
                "seed": seed,
                "distilled": arguments.distill,
                "accuracy": round(100 * accuracy(model, task), 2),
                "seconds": round(time.monotonic() - start, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
