"""What a recipe would do to a model, from its config alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..anatomy import resolve_anatomy, weight_count
from ..configuration import CompressionConfig, MethodConfig
from ..errors import ConfigurationError, UnsupportedModelError
from .registry import create_method


@dataclass(frozen=True)
class CompressionPlan:
    """Expected sizes. `print` shows a table.

    Args:
        block_linear_before, block_linear_after: elements of the blocks' weight matrices.
        parameters_before, parameters_after: of the whole model, tied ones once.
        bytes_before, bytes_on_disk: of the weight file in the checkpoint's dtype.
        working_memory: bytes of one block's statistics, the largest part of what compression adds to the model.
    """

    block_linear_before: int
    block_linear_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_on_disk: int
    working_memory: int

    def __str__(self) -> str:
        rows = [
            ("block matrices", self.block_linear_before, self.block_linear_after),
            ("all parameters", self.parameters_before, self.parameters_after),
            ("bytes on disk", self.bytes_before, self.bytes_on_disk),
        ]
        lines = [f"{name:<16} {a:>16,} → {b:>16,}  ({b / a - 1:+.1%})" for name, a, b in rows]
        return "\n".join([*lines, f"{'statistics':<16} {self.working_memory:>16,} bytes for one block at a time"])


def plan(
    model: PreTrainedModel | str | Path,
    config: CompressionConfig | MethodConfig | dict[str, Any],
    **load_arguments: Any,
) -> CompressionPlan:
    """Sizes before and after, without weights, data or a run. Where data decides the split between modules, the total
    is still known: it is met within half a step of the sizes.

    Args:
        model: a model, or an id or path whose `config.json` is read.
        config: the recipe.
        load_arguments: `revision`, `token`, `cache_dir`, … for reading the config.

    Raises:
        UnsupportedModelError: a family without an anatomy record, or no decoder-only language model.
        ConfigurationError: a recipe that the model cannot meet.
    """
    recipe = CompressionConfig.wrap(config)
    if not isinstance(model, PreTrainedModel):
        try:
            read = AutoConfig.from_pretrained(model, **load_arguments)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"no model config could be read from {str(model)!r}: {error}") from error
        if getattr(read, "quantization_config", None) is not None:
            raise ConfigurationError(
                f"{str(model)!r} is quantized or compressed already; plan for the dense original."
            )
        model = _skeleton(read).to(read.dtype or torch.float32)
        width = torch.empty(0, dtype=read.dtype or torch.float32).element_size()
    else:
        width = next(model.parameters()).element_size()
    anatomy = resolve_anatomy(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(weight_count(model.get_submodule(path)) for path in anatomy.linear_paths())
    removed = memory = saved = 0
    for stage in recipe.stages:
        expected = create_method(stage, anatomy).expect()
        # What a stage saves a weight it saves on those that the stages before have left.
        saved += round(expected.saved_bytes * (matrices - removed) / matrices) if removed else expected.saved_bytes
        removed, memory = removed + expected.removed_weights, max(memory, expected.statistics_bytes)
    on_disk = (before - removed) * width - saved
    return CompressionPlan(matrices, matrices - removed, before, before - removed, before * width, on_disk, memory)


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: a causal one, or whatever it is, for the error that says so."""
    reason = ""
    for auto_class in (AutoModelForCausalLM, AutoModel):
        try:
            with torch.device("meta"):
                return auto_class.from_config(config)
        except ValueError as error:
            reason = reason or str(error)
    raise UnsupportedModelError(
        f"Transformers has no causal language model for model type {config.model_type!r}: {reason}"
    )
