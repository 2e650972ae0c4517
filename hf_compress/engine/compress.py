"""`compress`: a model in memory, changed in place."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy import ModelAnatomy, resolve_anatomy, text_config
from ..calibration.configuration import CalibrationConfig
from ..calibration.data import CalibrationData, load_calibration_data, warn_if_few_tokens
from ..calibration.sources import check_local_data
from ..configuration import CompressionConfig, MethodConfig
from ..errors import CalibrationError, ConfigurationError, NumericalError, UnsupportedModelError
from ..layout import UNFINISHED, layout_of
from .distributed import Outcome, on_one_process
from .order import check_order, continues
from .registry import create_method, method_class
from .report import CompressionReport, ModuleReport
from .resume import ResumePoint, model_checksum
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
) -> PreTrainedModel:
    """Compress a model in place and return it, ready for `generate`, training and `save_pretrained`.

    Args:
        model: a dense Transformers model on its device, with real weights.
        config: the recipe; its `calibration` is used unless one is given here.
        processing_class: tokenizer (or image processor) for the calibration data. By default it is loaded from
            `model.name_or_path`.
        calibration: a `CalibrationConfig`, or anything that its `dataset` takes.
        working_directory: keeps a resume point after every block. The same call on the same inputs goes on from there.
        load_arguments: `revision`, `token`, `cache_dir`, `subfolder`, `gguf_file` for the implicit load of the
            `processing_class`.

    Returns:
        The same model, with `compression_report` attached.

    Raises:
        UnsupportedModelError: a family without an anatomy record, or weights that are not in memory.
        ConfigurationError: a recipe that the model cannot meet, or a model that is compressed already.
        CalibrationError: data that is missing or unfit.
        NumericalError: non-finite weights or activations, or a factorisation that failed; names the module.
        ResumeError: a working directory of another run.
    """
    recipe = CompressionConfig.wrap(config)
    goes_on = continues(recipe, layout_of(model))
    _require_dense(model, goes_on)
    anatomy, methods, sources = prepare(model, recipe, calibration)
    _require_finite_weights(model)
    base = str(getattr(model.config, "name_or_path", "") or "")
    before = count_weights(anatomy)
    attached = {name: model.__dict__.get(name) for name in ("hf_quantizer", "compression_report")}
    layout = layout_of(model)
    earlier = _reopen(model, recipe) if goes_on else []

    def run() -> Outcome:
        return _run(
            model, recipe, anatomy, sources, processing_class, load_arguments or {}, working_directory, base, before
        )

    def untouched() -> bool:
        """After a failure: give a model that is as it was its quantizer and report back."""
        if layout_of(model) != layout:
            return False
        if attached["hf_quantizer"] is not None and goes_on:
            attached["hf_quantizer"].attach(model)
            model.compression_report = attached["compression_report"]
        return True

    # Tensors made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad(), _interruptible(model, untouched):
        report, provenance, _ = on_one_process(model, run)
        for method in methods:
            method.finish()
    attach_result(model, {"stages": [*earlier, *recipe.to_dict()["stages"]]}, report, provenance)
    return model


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
    modes = {module: module.training for module in model.modules()}
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


def _run(
    model: PreTrainedModel,
    recipe: CompressionConfig,
    anatomy: ModelAnatomy,
    sources: list[CalibrationConfig | None],
    processing_class: Any,
    load_arguments: dict[str, Any],
    working_directory: str | Path | None,
    base: str,
    before: tuple[int, int, int],
) -> Outcome:
    checksum = model_checksum(model) if working_directory is not None else None
    rows: list[ModuleReport] = []
    notes: dict[str, Any] = {}
    left_alone: list[str] = []
    changed: list[str] = []
    provenance = describe_run(base, model)
    for position, (stage, source) in enumerate(zip(recipe.stages, sources, strict=True)):
        # The stage before has changed the structure: a method looks at the model as it is now.
        anatomy = resolve_anatomy(model)
        if position:
            method_class(stage).reopen(model, stage)
        method = create_method(stage, anatomy)
        data = _load_data(model, method, source, processing_class, load_arguments, base)
        directory = None if working_directory is None else Path(working_directory) / f"stage-{position}"
        fingerprint = {
            "recipe": hashlib.sha256(json.dumps(stage.to_dict(), sort_keys=True).encode()).hexdigest(),
            "model": checksum,
            "calibration data": data.fingerprint if data else None,
            "versions": provenance["versions"],
            "machine type": platform.machine(),
        }
        resume = ResumePoint(directory, fingerprint)
        session = Session(anatomy, data.batches if data else [], data.held_out if data else [])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.seed)
            _survey(method, session, resume)
            rows += walk(session, method, resume)
        notes.update(session.notes)
        left_alone += session.left_alone
        changed += session.changed
        if data is not None:
            notes["calibration_tokens"] = notes.get("calibration_tokens", 0) + data.num_tokens
            provenance["calibration"].append({**data.description, "fingerprint": data.fingerprint})
    after = count_weights(anatomy)
    report = CompressionReport(rows, before[0], after[0], before[1], after[1], before[2], after[2], notes, left_alone)
    return report, provenance, changed


def describe_run(base: str, model: PreTrainedModel) -> dict[str, Any]:
    """The provenance of a compression, before any data is read."""
    return {
        "base_model": base if _is_hub_id(base) else Path(base).name,
        "base_commit": getattr(model.config, "_commit_hash", None),
        "versions": {name: version(name) for name in ("hf_compress", "torch", "transformers")},
        "calibration": [],
    }


def _survey(method: Method[Any, Any], session: Session, resume: ResumePoint) -> None:
    """Survey, or take up what an interrupted run had decided."""
    kept = resume.decisions
    if kept is None:
        method.survey(session)
        found = method.decisions()
        if found is not None:
            resume.keep_decisions({"method": found, "notes": session.notes, "left_alone": session.left_alone})
    else:
        method.restore(kept["method"])
        session.notes.update(kept["notes"])
        session.left_alone.extend(kept["left_alone"])


def attach_result(
    model: PreTrainedModel, recipe: dict[str, Any], report: CompressionReport, provenance: dict[str, Any]
) -> None:
    """The report of a recipe (as JSON), and, if modules of ours are in the model, the quantizer that saves and loads
    it."""
    # The quantizer calls this module, so it cannot be imported above.
    from ..quantizer import CompressedModelConfig, CompressionQuantizer

    model.compression_report = report
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


def _load_data(
    model: PreTrainedModel,
    method: Method[Any, Any],
    source: CalibrationConfig | None,
    processing_class: Any,
    load_arguments: dict[str, Any],
    base: str,
) -> CalibrationData | None:
    if not method.needs_calibration:
        return None
    assert source is not None
    if processing_class is None and _reads_texts(source):
        processing_class = _load_processing_class(base, load_arguments)
    config = text_config(model)
    data = load_calibration_data(
        source,
        processing_class,
        vocab_size=getattr(config, "vocab_size", None),
        max_length=getattr(config, "max_position_embeddings", None),
        token=load_arguments.get("token"),
        cache_dir=load_arguments.get("cache_dir"),
    )
    if all("input_ids" in batch for batch in data.batches):  # images have many positions each, and no count of them
        warn_if_few_tokens(data.num_tokens, method.expect().largest_gram)
    return data


def _reads_texts(source: CalibrationConfig) -> bool:
    if source.kind == "mixture":
        return any(_reads_texts(part) for part in source.dataset)
    return source.data_collator is None and source.kind != "tokens"


def _load_processing_class(base: str, load_arguments: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, **load_arguments)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            "the calibration texts need a tokenizer and none could be loaded from "
            f"{base or 'a model without a name'!r} ({error}). "
            "Pass processing_class=tokenizer to compress(), or calibrate on token ids."
        ) from error


def _is_hub_id(name: str) -> bool:
    """Whether a model's name may stand in a published file: a path of this machine may not."""
    return name.count("/") <= 1 and not Path(name).exists() and not name.startswith((".", "/", "~"))


def _require_dense(model: PreTrainedModel, goes_on: bool) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a Transformers model (PreTrainedModel), got {type(model).__name__}. "
            "Compress before wrapping: first compress(model), then PEFT, DDP or compile."
        )
    if UNFINISHED in model.__dict__:
        raise ConfigurationError(
            "an earlier compression of this model was interrupted or failed, and some of its blocks are compressed. "
            "Load the dense model again; with the same working_directory the run goes on where it stopped."
        )
    if layout_of(model) and not goes_on:
        raise ConfigurationError(
            "the model is compressed already, and a second compression on top of the first is not supported. "
            "Compress the dense original with the recipe that you want."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and type(quantizer).__module__.split(".")[0] != __name__.split(".")[0]:
        method = quantizer.quantization_config.quant_method
        raise ConfigurationError(
            f"the model is quantized with {getattr(method, 'value', method)}; its weights are not plain matrices. "
            "Load the original in float32 or bfloat16 and compress that."
        )
    meta = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if meta is not None:
        raise UnsupportedModelError(
            f"{meta!r} is on the meta device: the model is offloaded or has no weights. Load it whole with "
            "device_map=None or onto devices that hold it."
        )


def _require_finite_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NumericalError(f"the weight {name!r} holds NaN or infinite values: the checkpoint is damaged.")
