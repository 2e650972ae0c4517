"""Winning quality back after a compression, in one call."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..calibration.configuration import CalibrationConfig
from ..calibration.data import load_calibration_data
from ..errors import ConfigurationError
from .configuration import DistillationConfig
from .distillation import DistillationTrainer


def recover(
    model: PreTrainedModel,
    teacher_model: Any,
    dataset: Any,
    *,
    method: Literal["lora", "full"] = "lora",
    processing_class: Any = None,
    eval_dataset: Any = None,
    lora_rank: int = 32,
    merge: bool = True,
    callbacks: list[Any] | None = None,
    **arguments: Any,
) -> Any:
    """
    Distil the original into its compressed model for a while.

    Args:
        model (`PreTrainedModel`): compressed by any method, in memory.
        teacher_model (`PreTrainedModel` or `str`): the original.
        dataset: what a `Trainer` takes, or a `CalibrationConfig`, whose texts are packed.
        method (`"lora"` or `"full"`): train an adapter on all linear layers, or every parameter.
        processing_class (*optional*): tokenizer for texts.
        eval_dataset (*optional*): as `dataset`.
        lora_rank (`int`, defaults to 32): rank of the adapter.
        merge (`bool`, defaults to `True`): merge the adapter where the weights are dense matrices. Where they are
            codes, positions or shared it stays an adapter.
        callbacks (`list`, *optional*): for the Trainer.
        arguments: fields of [`DistillationConfig`], such as `max_steps`, `learning_rate`, `output_dir`. Without
            `output_dir` nothing is kept but the result. Where there is none, the learning rate is 2e-4.

    Returns:
        The same model, or a `PeftModel` round it.

    Raises:
        `ConfigurationError`: an unknown method, or a teacher that does not fit.
    """
    if method not in ("lora", "full"):
        raise ConfigurationError(f'recover: `method` is {method!r}, expected "lora" or "full".')
    peft_config = None
    if method == "lora":
        from peft import LoraConfig

        task = "CAUSAL_LM" if "ForCausalLM" in type(model).__name__ else None
        peft_config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules="all-linear", task_type=task)
    given = {"learning_rate": 2e-4, "report_to": [], **arguments}
    with tempfile.TemporaryDirectory() as scratch:
        if "output_dir" not in given:
            given = {"output_dir": scratch, "save_strategy": "no", **given}
        with warnings.catch_warnings():
            # The adapter is merged or handed back with the model: it need not name it.
            warnings.filterwarnings("ignore", message="the adapter is attached to a compressed model")
            trainer = DistillationTrainer(
                model,
                teacher_model,
                DistillationConfig(**given),
                train_dataset=_examples(dataset, processing_class),
                eval_dataset=None if eval_dataset is None else _examples(eval_dataset, processing_class),
                processing_class=processing_class,
                peft_config=peft_config,
                callbacks=callbacks,
            )
        trainer.train()
    trained = trainer.model
    if method == "full":
        return trained.eval()
    packed = any(getattr(module, "packs_weight", False) for module in model.modules())
    return trained.merge_and_unload().eval() if merge and not packed else trained.eval()


def _examples(dataset: Any, processing_class: Any) -> Any:
    """What a Trainer takes."""
    if not isinstance(dataset, CalibrationConfig):
        return dataset
    batches = load_calibration_data(dataset, processing_class).batches
    rows: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        for index in range(len(next(iter(batch.values())))):
            row = {name: tensor[index] for name, tensor in batch.items()}
            rows.append(row if "labels" in row else {**row, "labels": row["input_ids"]})
    return rows
