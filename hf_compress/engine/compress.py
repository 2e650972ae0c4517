"""`compress`: a model in memory, changed in place."""

from __future__ import annotations

import hashlib
import json
import platform
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy import ModelAnatomy, resolve_anatomy, unreached, untouched_experts, untouched_matrices
from ..calibration.configuration import CalibrationConfig
from ..calibration.sources import check_local_data
from ..configuration import CompressionConfig, MethodConfig
from ..errors import CalibrationError, ConfigurationError
from ..layout import UNFINISHED, layout_of
from ..seeds import seeded
from .activations import folder_of_activations
from .checks import require_dense, require_finite_weights
from .distributed import Processes, several_processes
from .freed import return_pages
from .inputs import Inputs, is_hub_id
from .order import check_order, continues
from .placement import require_whole
from .registry import create_method, method_class
from .report import CompressionReport, ModuleReport
from .residency import Residency
from .resume import ResumePoint, model_checksum, quick_checksum
from .session import Method, Session
from .walk import walk
from .weights import count_weights


def compress(
    model: PreTrainedModel,
    config: CompressionConfig | MethodConfig | dict[str, Any],
    *,
    processing_class: Any = None,
    calibration: CalibrationConfig | Any = None,
    working_directory: str | Path | None = None,
    load_arguments: dict[str, Any] | None = None,
    activations_on_disk: bool = False,
    keep_activations: bool = False,
) -> PreTrainedModel:
    """Compress a model in place and return it, ready for `generate`, training and `save_pretrained`.

    Args:
        model: a dense Transformers model with real weights, on its devices or offloaded by Accelerate.
        config: the recipe; its `calibration` is used unless one is given here.
        processing_class: tokenizer (or image processor) for the calibration data. By default it is loaded from
            `model.name_or_path`.
        calibration: a `CalibrationConfig`, or anything that its `dataset` takes.
        working_directory: keeps a resume point after every block. The same call on the same inputs goes on from there.
            Of an offloaded model it holds the compressed blocks as long as the model is used.
        load_arguments: `revision`, `token`, `cache_dir`, `subfolder`, `gguf_file` for the implicit load of the
            `processing_class`.
        activations_on_disk: keep the hidden states of the calibration data in files instead of memory, in the
            working directory or a temporary folder.
        keep_activations: write the hidden states into the working directory after every block, so that a run that goes
            on need not run the finished blocks again. They take tokens times hidden size numbers, twice in sequential
            order.

    Returns:
        The same model, with `compression_report` attached.

    Raises:
        UnsupportedModelError: a family without an anatomy record, or a model without weights.
        ConfigurationError: a recipe that the model cannot meet, or a model that is compressed already.
        CalibrationError: data that is missing or unfit.
        NumericalError: non-finite weights or activations, or a factorisation that failed; names the module.
        ResumeError: a working directory of another run.
    """
    directory = None if working_directory is None else Path(working_directory)
    with Processes.of_launcher() as processes:
        start = processes.together(lambda: _checked(model, config, calibration, directory, keep_activations))
        if processes.size > 1:
            processes.agree(
                {
                    "the recipe": json.dumps(start.recipe.to_dict(), sort_keys=True),
                    "the weights": quick_checksum(start.anatomy),
                    "the folders": str((directory, activations_on_disk)),
                }
            )
        inputs = Inputs(processing_class, load_arguments or {}, str(getattr(model.config, "name_or_path", "") or ""))
        _compress(model, start, inputs, _Places(directory, keep_activations), activations_on_disk, processes)
    return model


@dataclass(frozen=True)
class _Start:
    """A compression that may begin. `residency` is for a model that is offloaded."""

    recipe: CompressionConfig
    goes_on: bool
    anatomy: ModelAnatomy
    methods: list[Method[Any, Any]]
    sources: list[CalibrationConfig | None]
    residency: Residency | None


def _checked(
    model: PreTrainedModel, config: Any, calibration: Any, directory: Path | None, keep_activations: bool
) -> _Start:
    recipe = CompressionConfig.wrap(config)
    goes_on = continues(recipe, layout_of(model))
    require_dense(model, goes_on)
    require_whole(model)
    anatomy, methods, sources = prepare(model, recipe, calibration)
    require_finite_weights(model)
    residency = _residency(anatomy, methods, directory)
    if keep_activations and directory is None:
        raise ConfigurationError("keep_activations=True keeps them in a working_directory; name one.")
    if keep_activations and several_processes():
        raise ConfigurationError("keep_activations=True is for one process: of several each has a part of them.")
    return _Start(recipe, goes_on, anatomy, methods, sources, residency)


def _compress(
    model: PreTrainedModel,
    start: _Start,
    inputs: Inputs,
    places: _Places,
    activations_on_disk: bool,
    processes: Processes,
) -> None:
    before = count_weights(start.anatomy)
    attached = {name: model.__dict__.get(name) for name in ("hf_quantizer", "compression_report")}
    layout = layout_of(model)
    earlier = _reopen(model, start.recipe) if start.goes_on else []

    def untouched() -> bool:
        """After a failure: give a model that is as it was its quantizer and report back."""
        if layout_of(model) != layout:
            return False
        if attached["hf_quantizer"] is not None and start.goes_on:
            attached["hf_quantizer"].attach(model)
            model.compression_report = attached["compression_report"]
        return True

    # Tensors made in inference mode could never be trained.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _interruptible(model, untouched),
        _taken_over(start.residency),
        folder_of_activations(places.resume, processes) if activations_on_disk else nullcontext() as activations,
    ):
        places = replace(places, activations=activations)
        report, provenance = _run(model, start, inputs, places, before, processes)
        for method in start.methods:
            method.finish()
    attach_result(model, {"stages": [*earlier, *start.recipe.to_dict()["stages"]]}, report, provenance)


def _reopen(model: PreTrainedModel, recipe: CompressionConfig) -> list[dict[str, Any]]:
    """Make a compressed model dense for a method that goes on with it; the stages that have been."""
    stages: list[dict[str, Any]] = list(model.config.quantization_config.recipe.get("stages", []))
    method_class(recipe.stages[0]).reopen(model, recipe.stages[0])
    model.hf_quantizer.remove_quantization_config(model)
    model.__dict__.pop("compression_report", None)
    return stages


@contextmanager
def _interruptible(model: nn.Module, untouched: Callable[[], bool]) -> Iterator[None]:
    """Run in evaluation mode; after an exception, mark a model of which some blocks are compressed and some are not.

    Keeping the dense modules until the end would make this a plain undo, at the price of the whole model's memory.
    """
    # Weakly: the dense modules that are replaced go, with their weights.
    modes = weakref.WeakKeyDictionary({module: module.training for module in model.modules()})
    model.eval()
    try:
        yield
    except BaseException:
        for module, training in modes.items():
            module.training = training
        if not untouched():
            model.__dict__[UNFINISHED] = True
        raise
    model.train(modes[model])
    for module, training in modes.items():
        module.training = training


def prepare(
    model: PreTrainedModel, recipe: CompressionConfig, calibration: Any = None
) -> tuple[ModelAnatomy, list[Method[Any, Any]], list[CalibrationConfig | None]]:
    """Check a recipe against a model's structure, before weights or data are read: a meta skeleton will do.

    Raises:
        UnsupportedModelError, ConfigurationError: see `compress`.
        CalibrationError: a stage that needs data and has none, or data on this machine that cannot be read.
    """
    anatomy = resolve_anatomy(model)
    for stage in recipe.stages:
        stage.check_in_one_call()
    methods = [create_method(stage, anatomy) for stage in recipe.stages]
    check_order(recipe)
    sources = [_calibration_for(stage, recipe, calibration) for stage in recipe.stages]
    for stage, method, source in zip(recipe.stages, methods, sources, strict=True):
        if not method.needs_calibration:
            continue
        if source is None:
            raise CalibrationError(
                f"{type(stage).__name__} needs calibration data and got none. Add calibration=CalibrationConfig("
                'dataset="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train") to the config, or '
                "calibration=[...] (texts) to compress()."
            )
        check_local_data(source)
    return anatomy, methods, sources


@dataclass(frozen=True)
class _Places:
    """Where a run keeps things: `resume` the finished blocks, with or without hidden states beside them, `activations`
    hidden states that are not to be in memory."""

    resume: Path | None
    keep_activations: bool
    activations: Path | None = None


def _run(
    model: PreTrainedModel,
    start: _Start,
    inputs: Inputs,
    places: _Places,
    before: tuple[int, int, int],
    processes: Processes,
) -> tuple[CompressionReport, dict[str, Any]]:
    directory, residency = places.resume, start.residency
    checksum = None if directory is None else processes.once(lambda: model_checksum(model, residency))
    if residency is not None and directory is None:
        directory = residency.folder()
    rows: list[ModuleReport] = []
    notes: dict[str, Any] = {}
    left_alone = unreached(resolve_anatomy(model))
    provenance = describe_run(inputs.base, model)
    for position, (stage, source) in enumerate(zip(start.recipe.stages, start.sources, strict=True)):
        # The stage before has changed the structure: a method looks at the model as it is now.
        anatomy = resolve_anatomy(model)
        if position:
            method_class(stage).reopen(model, stage)
        method = create_method(stage, anatomy)
        if not method.reaches_experts:
            left_alone += untouched_experts(anatomy, before[1])
        if not method.reaches_left_dense:
            left_alone += untouched_matrices(anatomy, before[1])
        data = processes.once(partial(inputs.load, model, method, source))
        fingerprint = {
            "recipe": hashlib.sha256(json.dumps(stage.to_dict(), sort_keys=True).encode()).hexdigest(),
            "model": checksum,
            "calibration data": data.fingerprint if data else None,
            "versions": provenance["versions"],
            "machine type": platform.machine(),
        }
        stage_directory = None if directory is None else directory / f"stage-{position}"
        resume = ResumePoint(stage_directory, fingerprint, places.keep_activations)
        processes.once(resume.open)
        if residency is not None:
            processes.each(partial(_require_in_sight, stage_directory))
        batches, held_out = (data.batches, data.held_out) if data else ([], [])
        session = Session(anatomy, batches, held_out, residency, places.activations, processes)
        with seeded(stage.seed):
            _survey(method, session, resume)
            rows += walk(session, method, resume)
        return_pages(session.replaced_pages)
        notes.update(session.notes)
        left_alone += session.left_alone
        if data is not None:
            notes["calibration_tokens"] = notes.get("calibration_tokens", 0) + data.num_tokens
            provenance["calibration"].append({**data.description, "fingerprint": data.fingerprint})
    after = count_weights(resolve_anatomy(model))
    report = CompressionReport(rows, before[0], after[0], before[1], after[1], before[2], after[2], notes, left_alone)
    return report, provenance


def describe_run(base: str, model: PreTrainedModel) -> dict[str, Any]:
    """The provenance of a compression, before any data is read."""
    return {
        "base_model": base if is_hub_id(base) else Path(base).name,
        "base_commit": getattr(model.config, "_commit_hash", None),
        "versions": {name: version(name) for name in ("hf_compress", "torch", "transformers")},
        "calibration": [],
    }


def _require_in_sight(directory: Path | None) -> None:
    """The blocks that one process writes are read by all of them."""
    if directory is not None and not directory.is_dir():
        raise ConfigurationError(
            f"the working directory {str(directory.parent)!r} is not seen by every process. The model is offloaded, "
            "and its compressed blocks lie there: name a folder that all machines share."
        )


def _survey(method: Method[Any, Any], session: Session, resume: ResumePoint) -> None:
    """Survey, or take up what an interrupted run had decided. All processes know it then."""
    processes, alone = session.processes, replace(session, processes=Processes())

    def decide(surveyed: Session) -> dict[str, Any]:
        method.survey(surveyed)
        return {"method": method.decisions(), "notes": surveyed.notes, "left_alone": surveyed.left_alone}

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        if found["method"] is not None:
            resume.keep_decisions(found)
        return found

    found, shared = processes.once(lambda: resume.decisions), session.is_shared(method)
    surveyed = False
    if found is None and shared and method.surveys_together:
        own, surveyed = decide(session), processes.is_main
        found = processes.once(partial(kept, own))
    elif found is None:
        found, surveyed = processes.once(lambda: kept(decide(alone))), processes.is_main
    if not surveyed and (processes.is_main or shared):
        if found["method"] is None:
            method.survey(alone)
        else:
            method.restore(found["method"])
    session.notes, session.left_alone = found["notes"], found["left_alone"]


def attach_result(
    model: PreTrainedModel, recipe: dict[str, Any], report: CompressionReport, provenance: dict[str, Any]
) -> None:
    """The report of a recipe (as JSON), and, if modules of ours are in the model, the quantizer that saves and loads
    it."""
    # The quantizer calls this module, so it cannot be imported above.
    from ..quantizer import CompressedModelConfig, CompressionQuantizer

    model.compression_report = report
    # For the card of a portable model, whose config tells nothing.
    model.compression_record = {"recipe": recipe, "provenance": provenance}
    if not layout_of(model) and report.parameters_after == report.parameters_before:
        return
    model.name_or_path = model.config.name_or_path = ""
    if not layout_of(model):
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
        return
    stored = CompressedModelConfig(
        recipe=recipe, layout=layout_of(model), provenance={**provenance, "report": report.to_dict()}
    )
    CompressionQuantizer(stored, pre_quantized=True).attach(model)


def _calibration_for(stage: MethodConfig, recipe: CompressionConfig, override: Any) -> CalibrationConfig | None:
    if override is not None:
        return override if isinstance(override, CalibrationConfig) else CalibrationConfig(override)
    return stage.calibration or recipe.calibration


def _residency(
    anatomy: ModelAnatomy, methods: list[Method[Any, Any]], working_directory: str | Path | None
) -> Residency | None:
    """What brings a model's offloaded blocks into memory; `None` where all of it is there."""
    residency = Residency(anatomy)
    if not residency:
        return None
    for method in methods:
        if method.needs_whole_model is not None:
            raise ConfigurationError(
                f"the model is offloaded, and {type(method.config).__name__} {method.needs_whole_model}. Load the "
                "model whole with device_map=None or onto devices that hold it."
            )
    packed = {entry["type"] for entry in layout_of(anatomy.model)} - {"linear", "attention"}
    if packed:
        raise ConfigurationError(
            f"the model is offloaded and holds modules of type {sorted(packed)}, which have to be unpacked first. "
            "Load it whole, or compress its dense original."
        )
    if several_processes() and working_directory is None:
        raise ConfigurationError(
            "the model is offloaded, and its compressed blocks have to lie where every process finds them as long as "
            "the model is used: name a working_directory."
        )
    return residency


@contextmanager
def _taken_over(residency: Residency | None) -> Iterator[None]:
    """Within the context the blocks are fetched one by one; after it whenever they are called."""
    if residency is None:
        yield
        return
    residency.take_over()
    try:
        yield
    finally:
        residency.give_back()
