"""Compressing a checkpoint that is larger than memory: from its files to files, block by block."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from ..anatomy import ModelAnatomy, join
from ..configuration import CompressionConfig, MethodConfig
from ..errors import ConfigurationError
from ..output import check_output, check_working_directory, whole_folder
from ..sizes import parse_bytes
from .compress import compress, prepare
from .distributed import Processes, process_device, several_processes
from .plan import CompressionPlan, plan, skeleton_of
from .report import CompressionReport

# Of the written files: one is put together in memory.
SHARD_BYTES = 2**30


def compress_checkpoint(
    model: str | Path,
    out: str | Path,
    config: CompressionConfig | MethodConfig | dict[str, Any],
    *,
    processing_class: Any = None,
    calibration: Any = None,
    working_directory: str | Path | None = None,
    max_memory: int | float | str | None = None,
    keep_activations: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    **load_arguments: Any,
) -> CompressionReport:
    """Compress a checkpoint of any size into another, with one block in memory at a time.

    Several processes (`accelerate launch`) hold one block each, on a device of their own, and work as in `compress`.

    Embedding, norms and head stay in memory, and so does what the calibration data are at the block's entrance, unless
    that exceeds `max_memory`: then it lies in files. The blocks are read from the checkpoint's files, once for every
    pass over them.

    Args:
        model: folder of a checkpoint, or its id on the Hub.
        out: folder to write; it must not exist or be empty.
        config, calibration: as for `compress`.
        processing_class: as for `compress`; one that is given is saved with the model.
        working_directory: keeps finished blocks, so that the same call goes on after an interruption; every stage
            takes as much room as its result. By default a folder beside `out`, removed when the call ends.
        max_memory: bytes, or a number with its unit such as `"6GB"`, that a process may take in all.
        keep_activations: as for `compress`.
        device: where blocks run; by default this process's accelerator, else the CPU.
        dtype: what the weights are loaded in; by default the checkpoint's own.
        load_arguments: `revision`, `token`, `cache_dir`, `subfolder` of `from_pretrained`.

    Returns:
        The report, which the written config holds as well.

    Raises:
        ConfigurationError: a method that needs all blocks at once, a folder that is not empty, or a `max_memory` that
            is too small; the message has the number that it would take.
        UnsupportedModelError, CalibrationError, NumericalError, ResumeError: as for `compress`.
    """
    target = Path(out).resolve()
    asked = _Asked(model, target, calibration, working_directory, max_memory, keep_activations, dtype, load_arguments)
    with Processes.of_launcher() as processes:
        start = processes.together(lambda: _checked(asked, config, processes.size))
        # What is in memory already may differ, and what is done then has to be the same.
        taken = max(processes.each(lambda: int(psutil.Process().memory_info().rss)))
        on_disk = processes.together(lambda: _spills(asked, start, taken))
        device = torch.device(device) if device is not None else default_device()
        with _work_folder(working_directory, target, processes) as work:
            offload = work / f"offload-{processes.rank}"
            loaded = processes.together(lambda: _load_offloaded(asked, start, torch.device(device), offload))
            compress(
                loaded,
                start.recipe,
                processing_class=processing_class,
                calibration=calibration,
                working_directory=work,
                load_arguments=load_arguments,
                activations_on_disk=on_disk,
                keep_activations=keep_activations,
            )
            processes.once(lambda: _write(loaded, processing_class, target))
            report: CompressionReport = loaded.compression_report
            shutil.rmtree(offload, ignore_errors=True)  # nothing reads from it any more
    return report


@dataclass(frozen=True)
class _Asked:
    """Arguments of `compress_checkpoint`."""

    model: str | Path
    target: Path
    calibration: Any
    working_directory: str | Path | None
    max_memory: int | float | str | None
    keep_activations: bool
    dtype: str | torch.dtype
    load_arguments: dict[str, Any]


@dataclass(frozen=True)
class _Start:
    recipe: CompressionConfig
    anatomy: ModelAnatomy
    planned: CompressionPlan | None


def _checked(asked: _Asked, config: Any, processes: int) -> _Start:
    recipe = CompressionConfig.wrap(config)
    check_output(asked.target)
    check_working_directory(asked.working_directory, asked.target)
    if asked.keep_activations and asked.working_directory is None:
        raise ConfigurationError("keep_activations=True keeps them in a working_directory; name one.")
    skeleton = skeleton_of(asked.model, asked.dtype, asked.load_arguments)
    anatomy, methods, _ = prepare(skeleton, recipe, asked.calibration)
    for method in methods:
        if method.needs_whole_model is not None:
            raise ConfigurationError(
                f"{type(method.config).__name__} {method.needs_whole_model}, which cannot be done block by block. "
                "Load the model whole and use compress()."
            )
    planned = None
    if asked.max_memory is not None:
        planned = plan(skeleton, recipe, calibration=asked.calibration, measure_time=False, processes=processes)
    asked.target.parent.mkdir(parents=True, exist_ok=True)
    return _Start(recipe, anatomy, planned)


def _spills(asked: _Asked, start: _Start, taken: int) -> bool:
    """Whether hidden states have to lie in files."""
    on_disk = start.planned is not None and _must_spill(start.planned, _limit(asked.max_memory), taken)
    if on_disk and asked.keep_activations:
        raise ConfigurationError(
            "keep_activations=True writes hidden states from memory, and they do not fit into max_memory. Leave "
            "it out: a run that goes on computes them again."
        )
    return on_disk


@contextmanager
def _work_folder(given: str | Path | None, target: Path, processes: Processes) -> Iterator[Path]:
    """The folder of finished blocks, of which all processes read; one of our own goes when all are done."""
    if given is not None:
        yield Path(given)
        return
    made = target.with_name(f".{target.name}.work")

    def begin() -> None:
        shutil.rmtree(made, ignore_errors=True)  # what a killed run has left
        made.mkdir()

    processes.once(begin)
    try:
        yield made
        processes.wait()
    finally:
        if processes.is_main:
            shutil.rmtree(made, ignore_errors=True)


def _write(loaded: PreTrainedModel, processing_class: Any, target: Path) -> None:
    with whole_folder(target) as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        loaded.save_pretrained(scratch, max_shard_size=SHARD_BYTES)
        if hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(scratch)


def _limit(max_memory: Any) -> int:
    try:
        limit = parse_bytes(max_memory)
    except ValueError as error:
        raise ConfigurationError(f"max_memory: {error}.") from error
    if not isinstance(limit, (int, float)) or not limit > 0:
        raise ConfigurationError(f"max_memory: {max_memory!r} is no size such as 6GB.")
    return int(limit)


def default_device() -> torch.device:
    """The accelerator of this process, or the first of this machine, else its CPU."""
    if several_processes():
        return process_device()
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _load_offloaded(asked: _Asked, start: _Start, device: torch.device, folder: Path) -> PreTrainedModel:
    """The model with everything but its blocks on a device, and the blocks in the checkpoint's files."""
    device_map = blocks_on_disk(start.anatomy, str(device))
    kind = type(start.anatomy.model)
    # It says that parameters are offloaded, which is what was asked for.
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # The folder is for weights that the files hold in another form than the model.
        loaded: PreTrainedModel = kind.from_pretrained(
            asked.model, dtype=asked.dtype, device_map=device_map, offload_folder=folder, **asked.load_arguments
        )
    except OSError as error:
        if error.errno is not None:  # the system's, such as a full disk
            raise
        raise ConfigurationError(f"the weights of {str(asked.model)!r} cannot be read: {error}") from error
    finally:
        logger.setLevel(level)
    return loaded.eval()


def blocks_on_disk(anatomy: ModelAnatomy, device: str) -> dict[str, str]:
    """A `device_map` for `from_pretrained` that leaves the blocks in the files: every part outside them by its name,
    as Accelerate wants it."""
    lists = {path.rpartition(".")[0] for path in anatomy.block_paths}
    placed = dict.fromkeys(sorted(lists), "disk")
    above = {".".join(path.split(".")[:depth]) for path in lists for depth in range(path.count(".") + 1)}
    for path in above:
        module = anatomy.model.get_submodule(path)
        names = [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
        names += dict(module.named_buffers(recurse=False))
        for name in (join(path, name) for name in names):
            if name not in above and name not in lists:
                placed[name] = device
    return placed


def _must_spill(planned: CompressionPlan, limit: int, taken: int) -> bool:
    """Whether activations have to lie in files; refuses a limit that even then is too small.

    Args:
        taken: what the program has in memory before anything is loaded.
    """
    assert planned.streamed_memory is not None and planned.streamed_memory_at_least is not None
    if planned.streamed_memory + taken <= limit:
        return False
    least = planned.streamed_memory_at_least + taken
    if least > limit:
        raise ConfigurationError(
            f"max_memory is {limit / 1e9:.2f} GB, and the program, one block with its statistics, and embedding and "
            f"head take {least / 1e9:.2f} GB even with the hidden states in files. Give that much, or smaller batches."
        )
    return True
