"""What a recipe would do to a model, from its config alone: no weights are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..anatomy import ModelAnatomy, resolve_anatomy, weight_count
from ..calibration.configuration import CalibrationConfig
from ..configuration import CompressionConfig, MethodConfig
from ..errors import ConfigurationError, UnsupportedModelError
from ..layout import layout_of, replay
from .costs import StageCosts, count_costs
from .memory import StagePeak, Workload
from .order import check_order
from .registry import create_method, method_class
from .rehearsal import rehearse
from .scaling import Hardware, PaperPlan, on_paper
from .session import OUTSIDE
from .weights import count_weights, kept_weights, loaded_dtype, stored_bytes


@dataclass(frozen=True)
class PlannedModule:
    """One matrix of the model.

    Args:
        block: index of the block; -1 for what lies outside the blocks.
        path: module path.
        kind: "mlp", "query_key", "value_output", "other", "embedding" or "head".
        weights_before, weights_after: weights that are stored.
        bytes_before, bytes_after: of all tensors of the module.
    """

    block: int
    path: str
    kind: str
    weights_before: int
    weights_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class CompressionPlan:
    """Expected sizes, memory and time. `print` shows a table.

    Args:
        rows: one a matrix.
        block_linear_before, block_linear_after: elements of the blocks' weight matrices.
        parameters_before, parameters_after: of the whole model, tied ones once.
        bytes_before, bytes_on_disk: of the tensors in the checkpoint's dtype.
        bytes_at_most: `bytes_on_disk` where the recipe alone decides; where data decides on sizes, what is never
            passed.
        peak_memory: bytes at the highest point of the run, model included.
        streamed_memory: the same where the model is read block by block, as `compress_checkpoint` does;
            `None` for a recipe that needs all blocks at once.
        streamed_memory_at_least: the same with the hidden states of the calibration data in files.
        seconds: of the compression on this machine, loading and saving left out; `None` if it was not measured.
        workload: how much it is calibrated on.
        processes: that work together; memory is that of each.
        peak_for, streamed_for: the peak memory for another workload, with the whole model and block by block.
        count: the operations and bytes of the stages.
    """

    rows: tuple[PlannedModule, ...]
    block_linear_before: int
    block_linear_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_on_disk: int
    bytes_at_most: int
    peak_memory: int
    streamed_memory: int | None
    streamed_memory_at_least: int | None
    seconds: float | None
    workload: Workload
    processes: int
    peak_for: Callable[[Workload], int] = field(repr=False, compare=False)
    streamed_for: Callable[[Workload], int] | None = field(repr=False, compare=False)
    count: Callable[[], Sequence[StageCosts]] = field(repr=False, compare=False)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits for every dense weight of the matrices that change, everything counted; `None` if none does."""
        changed = [row for row in self.rows if row.bytes_after != row.bytes_before]
        weights = sum(row.weights_before for row in changed)
        return 8 * sum(row.bytes_after for row in changed) / weights if weights else None

    @property
    def model_bits_per_weight(self) -> float:
        """Bits on disk for every parameter of the dense model."""
        return 8 * self.bytes_on_disk / self.parameters_before

    def require_memory(self, available: int | None = None, processes: int = 1) -> None:
        """Raise `ConfigurationError` where each of some processes takes more than its share of `available` bytes, by
        default what this machine has free now; the message says what would fit."""
        free = (psutil.virtual_memory().available if available is None else available) // processes
        if self.peak_memory <= free:
            return
        raise ConfigurationError(
            f"the compression takes {self.peak_memory / 2**30:.2f} GiB at its peak, and {free / 2**30:.2f} GiB are "
            f"free: {self._what_fits(free)}"
        )

    def on_paper(self, devices: Sequence[int] = (1, 8, 64), hardware: Hardware | str = "h100") -> PaperPlan:
        """Time, memory and network traffic on several accelerators, without having any: counts of operations and bytes
        divided by rates, which are assumptions and are printed.

        Args:
            devices: numbers of devices, one process each.
            hardware: what a device does in a second: `Hardware`, a name in `engine.scaling.HARDWARE`, or `"this"` to
                measure this machine's CPU.

        Raises:
            ConfigurationError: an unknown name, no devices, or a method whose work cannot be told from shapes.
        """
        hardware = Hardware.named(hardware) if isinstance(hardware, str) else hardware
        return on_paper(self.count(), self.workload, hardware, devices, self.peak_for, self.streamed_for)

    def _what_fits(self, free: int) -> str:
        for workload in self.workload.smaller():
            peak = self.peak_for(workload.shared_by(self.processes))
            if peak <= free:
                return (
                    f"num_samples={workload.num_samples} and batch_size={workload.batch_size} would take "
                    f"{peak / 2**30:.2f} GiB."
                )
        if self.streamed_memory_at_least is not None and self.streamed_memory_at_least <= free:
            return (
                "no smaller calibration would fit either. Block by block it takes "
                f"{self.streamed_memory_at_least / 2**30:.2f} GiB: compress_checkpoint(), or --max-memory."
            )
        return "no smaller calibration would fit either. Load the model in bfloat16, or take a larger machine."

    def table(self) -> Table:
        """Weights and bytes by kind of matrix, and the totals."""
        table = Table()
        table.add_column("")
        for title in ("weights", "→", "bytes", "→", "bits a weight"):
            table.add_column(title, justify="right")
        kinds = dict.fromkeys(row.kind for row in self.rows)
        for kind in kinds:
            rows = [row for row in self.rows if row.kind == kind]
            sums = [sum(getattr(row, name) for row in rows) for name in _SUMMED]
            table.add_row(kind, *(f"{value:,}" for value in sums), f"{8 * sums[3] / sums[0]:.3f}")
        totals = (self.parameters_before, self.parameters_after, self.bytes_before, self.bytes_on_disk)
        table.add_section()
        table.add_row("whole model", *(f"{value:,}" for value in totals), f"{self.model_bits_per_weight:.3f}")
        return table

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self.table())
        rows = [
            ("block matrices", self.block_linear_before, self.block_linear_after),
            ("all parameters", self.parameters_before, self.parameters_after),
            ("bytes on disk", self.bytes_before, self.bytes_on_disk),
        ]
        lines = [f"{name:<16} {a:>16,} → {b:>16,}  ({b / a - 1:+.1%})" for name, a, b in rows]
        if self.bytes_at_most > self.bytes_on_disk:
            lines.append(f"{'':<16} the data decide; at most {self.bytes_at_most:,} bytes")
        lines.append(f"{'peak memory':<16} {self.peak_memory:>16,} bytes, the model included")
        time = "not measured; ask with measure_time=True" if self.seconds is None else _readable(self.seconds)
        lines.append(f"{'time':<16} {time:>16}")
        return captured.get() + "\n".join(lines)


_SUMMED = ("weights_before", "weights_after", "bytes_before", "bytes_after")


def _readable(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def plan(
    model: PreTrainedModel | str | Path,
    config: CompressionConfig | MethodConfig | dict[str, Any],
    *,
    calibration: CalibrationConfig | Any = None,
    measure_time: bool | None = None,
    dtype: str | torch.dtype = "auto",
    processes: int = 1,
    **load_arguments: Any,
) -> CompressionPlan:
    """Sizes, memory and time before a run, without the model's weights and without data.

    Sizes are those of the tensors, to the byte, where the recipe alone decides on the layout. Where data decides
    (which modules give how much, which weights are kept), they are an estimate with a ceiling.

    Args:
        model: a model, or an id or path whose `config.json` is read.
        config: the recipe.
        calibration: as for `compress`; only its numbers of sequences and tokens are used.
        measure_time: rehearse on two blocks of random weights to tell the time. By default where blocks are so small
            that this takes seconds.
        dtype: what an id or path will be loaded in; by default the checkpoint's own.
        processes: that work together; memory is that of one of them, time that of one alone.
        load_arguments: `revision`, `token`, `cache_dir`, … for reading the config.

    Raises:
        UnsupportedModelError: a family without an anatomy record, or that the recipe's method cannot compress.
        ConfigurationError: a recipe that the model cannot meet.
    """
    recipe = CompressionConfig.wrap(config)
    for stage in recipe.stages:
        stage.check_in_one_call()
    check_order(recipe)
    skeleton, dense = _skeletons(model, dtype, load_arguments)
    anatomy = resolve_anatomy(skeleton)
    workload = Workload.of(recipe, calibration)
    own = workload.shared_by(processes)
    before = count_weights(anatomy)
    slack, peaks, streams = 0, list[StagePeak](), True
    for stage in recipe.stages:
        current = resolve_anatomy(skeleton)
        method = create_method(stage, current)
        expectation = method.expect()
        streams = streams and method.needs_whole_model is None
        peaks.append(StagePeak.of(current, method, expectation))
        if expectation.layout:
            replay(skeleton, expectation.layout)
        slack += expectation.slack_bytes
    after = count_weights(resolve_anatomy(skeleton))
    quick = max(_block_weights(anatomy)) <= min(method_class(stage).quick_weights for stage in recipe.stages)
    seconds = rehearse(dense, recipe, workload) if measure_time or (measure_time is None and quick) else None

    def peak_for(workload: Workload) -> int:
        return max(before[2], *(peak.whole(workload) for peak in peaks))

    def streamed_for(workload: Workload) -> int:
        return max(peak.streamed(workload, in_files=False) for peak in peaks)

    return CompressionPlan(
        rows=tuple(_rows(resolve_anatomy(dense), skeleton)),
        block_linear_before=before[0],
        block_linear_after=after[0],
        parameters_before=before[1],
        parameters_after=after[1],
        bytes_before=before[2],
        bytes_on_disk=after[2],
        bytes_at_most=after[2] + slack,
        peak_memory=peak_for(own),
        streamed_memory=streamed_for(own) if streams else None,
        streamed_memory_at_least=max(peak.streamed(own, in_files=True) for peak in peaks) if streams else None,
        seconds=seconds,
        workload=workload,
        processes=processes,
        peak_for=peak_for,
        streamed_for=streamed_for if streams else None,
        count=lambda: count_costs(_meta_copy(dense), recipe, workload),
    )


def _skeletons(
    model: PreTrainedModel | str | Path, dtype: str | torch.dtype, load_arguments: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model twice on the meta device: one to replace modules in, one that stays."""
    if isinstance(model, PreTrainedModel):
        if layout_of(model):
            raise ConfigurationError("the model is compressed already; plan for the dense original.")
        return _meta_copy(model), _meta_copy(model)
    if not isinstance(model, (str, Path)):
        raise ConfigurationError(f"expected a Transformers model, an id or a path, got a {type(model).__name__}.")
    skeleton = skeleton_of(model, dtype, load_arguments)
    return skeleton, _meta_copy(skeleton)


def skeleton_of(model: str | Path, dtype: str | torch.dtype, load_arguments: dict[str, Any]) -> PreTrainedModel:
    """A dense checkpoint's model on the meta device, from its config alone. Raises `ConfigurationError`."""
    try:
        read = AutoConfig.from_pretrained(model, **load_arguments)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no model config could be read from {str(model)!r}: {error}") from error
    if getattr(read, "quantization_config", None) is not None:
        raise ConfigurationError(f"{str(model)!r} is quantized or compressed already; take the dense original.")
    wanted: Any = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        wanted = read.dtype or torch.float32
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConfigurationError(f"unknown dtype {dtype!r}; expected one such as bfloat16.")
    return _of_config(read, wanted)


def _meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The structure of a model in memory, its tensors on the meta device in their own dtypes, tied as they are."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


def _of_config(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a checkpoint says it is, else a causal one, or whatever there is for the error that says so."""
    named: list[Any] = [getattr(transformers, name, None) for name in config.architectures or ()]
    classes: list[Any] = [kind for kind in named if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
    builders = [kind._from_config for kind in classes]
    reason = ""
    for build in [*builders, AutoModelForCausalLM.from_config, AutoModel.from_config]:
        try:
            with torch.device("meta"):
                skeleton: PreTrainedModel = build(config).to(dtype)
        except ValueError as error:
            reason = reason or str(error)
            continue
        # What Transformers keeps in another dtype when it loads the model in this one.
        for name, parameter in skeleton.named_parameters():
            parameter.data = parameter.data.to(loaded_dtype(skeleton, name, dtype))
        skeleton.tie_weights()
        return skeleton.eval()
    raise UnsupportedModelError(
        f"Transformers has no causal language model for model type {config.model_type!r}: {reason}"
    )


def _block_weights(anatomy: ModelAnatomy) -> Iterator[int]:
    for block in range(len(anatomy)):
        yield sum(weight_count(anatomy.model.get_submodule(path)) for path, _ in anatomy.block_weights(block))


def _rows(dense: ModelAnatomy, planned: nn.Module) -> Iterator[PlannedModule]:
    matrices = [(OUTSIDE, path, "embedding") for path in [dense.outside("embedding")] if path is not None]
    for block in range(len(dense)):
        matrices += [(block, path, kind) for path, kind in dense.block_weights(block)]
    head = dense.outside("head")
    if head is not None and not dense.head_is_tied():
        matrices.append((OUTSIDE, head, "head"))
    for block, path, kind in matrices:
        old, new = dense.model.get_submodule(path), planned.get_submodule(path)
        sizes = weight_count(old), kept_weights(new), stored_bytes(old), stored_bytes(new)
        yield PlannedModule(block, path, kind, *sizes)
