"""`hf-compress eval`: parameters, bytes on disk, perplexity and speed of models side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError
from . import recipe as options
from .console import command, stdout

if TYPE_CHECKING:
    from ..evaluation import Comparison


@command
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders or Hub ids; the first is the one to compare with.")
    ],
    text: Annotated[Path | None, typer.Option(help="A text file, read as it is.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Or a dataset: a file, a folder or a Hub id.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a Hub dataset (test if not given).")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of texts or messages.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use the first tokens alone.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; as --context if not given.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows a forward pass.")] = 1,
    speed: Annotated[bool, typer.Option("--speed", help="Also time prompt and generation, in turn.")] = False,
    prompt_length: Annotated[int, typer.Option(help="Tokens of the timed prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated and timed.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed repeats.")] = 5,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure MODELs of one tokenizer side by side, on a text that none was calibrated on."""
    if (text is None) == (dataset is None):
        raise ConfigurationError("say what to measure the perplexity on: --text FILE or --dataset ID, one of the two.")
    if text is not None and not text.is_file():
        raise ConfigurationError(f"--text {str(text)!r} is no file.")
    if len(set(models)) != len(models):
        raise ConfigurationError(f"a model is named twice: {', '.join(models)}.")

    from ..evaluation.perplexity import as_token_ids
    from .loading import check_source, load_tokenizer

    for name in models:
        check_source(name)
    tokenizer = load_tokenizer(models[0], revision=revision)
    content = (
        text.read_text(encoding="utf-8", errors="replace")
        if text is not None
        else _dataset_text(str(dataset), dataset_name, split, text_column, tokenizer)
    )
    token_ids = as_token_ids(content, tokenizer)[:max_tokens]
    comparison = _measure_all(
        models,
        token_ids,
        {"context": context, "stride": stride, "batch_size": batch_size},
        {"prompt_length": prompt_length, "new_tokens": new_tokens, "repeats": repeats} if speed else None,
        {"dtype": dtype, "device_map": device_map, "revision": revision},
    )
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        stdout().print(comparison.table())


def _dataset_text(dataset: str, name: str | None, split: str | None, column: str | None, tokenizer: Any) -> str:
    """All texts of a dataset in its own order, rows joined by an empty line."""
    from ..calibration.configuration import CalibrationConfig
    from ..calibration.sources import read_texts

    # Local data has no splits.
    chosen = split or ("train" if Path(dataset).expanduser().exists() else "test")
    source = CalibrationConfig(dataset, name=name, split=chosen, text_column=column)
    return "".join(read_texts(source, tokenizer, piece_characters=2**62, seed=0))


def _measure_all(
    names: list[str],
    token_ids: Any,
    perplexity: dict[str, Any],
    speed: dict[str, Any] | None,
    loading: dict[str, Any],
) -> Comparison:
    """Speed needs all models in memory at once; without it they are loaded one after the other."""
    from ..evaluation import Comparison, compare, measure
    from .loading import load_model, weights_folder

    revision = loading["revision"]
    if speed is None:
        rows = [
            measure(name, load_model(name, **loading), token_ids, path=weights_folder(name, revision), **perplexity)
            for name in names
        ]
        return Comparison(tuple(rows))
    models = {name: load_model(name, **loading) for name in names}
    folders = {name: weights_folder(name, revision) for name in names}
    paths = {name: folder for name, folder in folders.items() if folder is not None}
    return compare(models, token_ids, paths=paths, **perplexity, **speed)
