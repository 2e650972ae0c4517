"""`hf-compress eval`: quality, size, speed and memory of models side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError
from . import recipe as options
from .console import command, say, stdout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluation import Comparison, Measurement, Task


@command
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders or Hub ids; the first is the one to compare with.")
    ],
    text: Annotated[Path | None, typer.Option(help="A text file, read as it is, for the perplexity.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Or a dataset: a file, a folder or a Hub id.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hub dataset (test if not given).")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of texts or messages.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use the first tokens alone.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; as --context if not given.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows a forward pass.")] = 1,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Also compare predictions on the text with the first model's.")
    ] = False,
    lambada: Annotated[Path | None, typer.Option(help="LAMBADA: passages whose last word is asked for.")] = None,
    similarity: Annotated[
        Path | None, typer.Option(help="Sentence pairs with scores (STS-B); alone, encoders can be measured.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="Of --similarity: mean, first, last or pooler.")] = "mean",
    images: Annotated[
        Path | None, typer.Option(help="A folder of a folder a class, or a Parquet file: image classifiers.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="A task of lm-evaluation-harness, zero-shot; once for each.")
    ] = None,
    task_path: Annotated[Path | None, typer.Option(help="A folder of task files of your own.")] = None,
    max_examples: Annotated[
        int | None, typer.Option(min=2, help="Examples a task at most, spread over the file.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also time prompt and generation, in turn.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Also measure the peak memory.")] = False,
    layer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Also time the compressed layers on so many tokens, beside dense ones.")
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens of the prompt of --speed and --memory.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated there.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed repeats.")] = 5,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    report: Annotated[Path | None, typer.Option(help="Also write tables and figures as one HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure MODELs of one tokenizer side by side, on data that none was calibrated on."""
    has_text = text is not None or dataset is not None
    if text is not None and dataset is not None:
        raise ConfigurationError("the perplexity is measured on --text FILE or --dataset ID, one of the two.")
    if not has_text and not (lambada or similarity or images or tasks or layer_tokens):
        raise ConfigurationError(
            "say what to measure: --text FILE or --dataset ID, one of the two, for the perplexity, --lambada FILE, "
            "--similarity FILE, --images FOLDER, --tasks NAME or --layer-tokens COUNT."
        )
    if text is not None and not text.is_file():
        raise ConfigurationError(f"--text {str(text)!r} is no file.")
    if len(set(models)) != len(models):
        raise ConfigurationError(f"a model is named twice: {', '.join(models)}.")
    if agreement and not has_text:
        raise ConfigurationError("--agreement compares predictions on a text: give --text FILE or --dataset ID.")
    language = has_text or bool(lambada or tasks) or speed
    if images is not None and (language or similarity is not None):
        raise ConfigurationError("--images is for image classifiers; leave out what is measured of language models.")

    from ..evaluation.perplexity import as_token_ids
    from ..evaluation.report import check_report_path, write_report
    from .loading import check_source

    if report is not None:
        check_report_path(report)
    chosen = _tasks(lambada, similarity, pooling, images, tasks, task_path, max_examples)
    for name in models:
        check_source(name)
    kind = "AutoModelForImageClassification" if images else "AutoModelForCausalLM" if language else "AutoModel"
    reads = has_text or bool(chosen)
    processing_class = _load_processing_class(models[0], images is not None, revision) if reads else None
    token_ids = None
    if has_text:
        content = (
            text.read_text(encoding="utf-8", errors="replace")
            if text is not None
            else _dataset_text(str(dataset), dataset_name, split, text_column, processing_class)
        )
        token_ids = as_token_ids(content, processing_class)[:max_tokens]
    measuring = {
        "data": token_ids,
        "processing_class": processing_class,
        "context": context,
        "stride": stride,
        "batch_size": batch_size,
        "memory": memory,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "tasks": chosen,
        "layer_tokens": layer_tokens,
    }
    loading = {"dtype": dtype, "device_map": device_map, "revision": revision}
    comparison = _measure_all(models, kind, measuring, agreement, repeats if speed else 0, loading)
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        stdout().print(comparison.table())
        timed = comparison.layer_table()
        if timed is not None:
            stdout().print(timed)
    if report is not None:
        write_report(comparison, report)
        say(f"The report is in {report}.")


def _dataset_text(dataset: str, name: str | None, split: str | None, column: str | None, tokenizer: Any) -> str:
    """All texts of a dataset in its own order, rows joined by an empty line."""
    from ..calibration.configuration import CalibrationConfig
    from ..calibration.sources import read_texts

    # Local data has no splits.
    chosen = split or ("train" if Path(dataset).expanduser().exists() else "test")
    source = CalibrationConfig(dataset, name=name, split=chosen, text_column=column)
    return "".join(read_texts(source, tokenizer, piece_characters=2**62, seed=0))


def _tasks(
    lambada: Path | None,
    similarity: Path | None,
    pooling: Any,
    images: Path | None,
    names: list[str] | None,
    task_path: Path | None,
    limit: int | None,
) -> list[Task]:
    """What gives scores, its data read; a mistake in it shows before a model is loaded."""
    from ..evaluation import HarnessTasks, ImageClassification, Lambada, SentenceSimilarity

    found: list[Task] = []
    if task_path is not None and not names:
        raise ConfigurationError("--task-path holds task files: name the tasks with --tasks NAME.")
    if lambada is not None:
        found.append(Lambada.from_file(lambada, limit=limit))
    if similarity is not None:
        found.append(SentenceSimilarity.from_file(similarity, pooling=pooling, limit=limit))
    if images is not None:
        found.append(ImageClassification.from_path(images, limit=limit))
    if names:
        found.append(HarnessTasks(names, task_path, limit=limit))
    return found


def _load_processing_class(name: str, images: bool, revision: str | None) -> Any:
    from .loading import load_tokenizer, load_with

    if not images:
        return load_tokenizer(name, revision=revision)
    from transformers import AutoImageProcessor

    return load_with(AutoImageProcessor, name, {"revision": revision})


def _load_model(kind: str, name: str, loading: dict[str, Any]) -> Any:
    import transformers

    from .loading import DTYPES, load_model, load_with

    if kind == "AutoModelForCausalLM":
        return load_model(name, **loading)
    if loading["dtype"] not in DTYPES:
        raise ConfigurationError(f"unknown dtype {loading['dtype']!r}; known: {', '.join(DTYPES)}.")
    return load_with(
        getattr(transformers, kind), name, {key: value for key, value in loading.items() if value is not None}
    )


def _measure_all(
    names: list[str],
    kind: str,
    measuring: dict[str, Any],
    agreement: bool,
    repeats: int,
    loading: dict[str, Any],
) -> Comparison:
    """One model after the other is loaded; only agreement keeps the first in memory, and speed all of them."""
    from ..evaluation import Comparison, measure, measure_speed
    from .loading import weights_folder

    rows: list[Measurement] = []
    kept: dict[str, PreTrainedModel] = {}
    for name in names:
        model = _load_model(kind, name, loading)
        reference = kept.get(names[0]) if agreement else None
        folder = weights_folder(name, loading["revision"])
        rows.append(measure(name, model, path=folder, reference=reference, **measuring))
        if repeats or (agreement and name == names[0]):
            kept[name] = model
        del model
    if repeats:
        lengths = {key: measuring[key] for key in ("prompt_length", "new_tokens")}
        speeds = measure_speed(kept, repeats=repeats, **lengths)
        rows = [replace(row, speed=speeds[row.name]) for row in rows]
    return Comparison(tuple(rows))
