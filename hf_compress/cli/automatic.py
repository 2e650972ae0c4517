"""`hf-compress auto`: the best recipe under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigurationError
from ..output import check_output
from . import recipe as options
from .console import command, say, stdout

FIGURES = (".png", ".svg", ".pdf")


@command
def auto(
    model: Annotated[str, typer.Argument(help="Folder of a dense model, or its id on the Hub.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the winner to; it must not exist or be empty.")],
    evaluation: Annotated[Path, typer.Option(help="Text file that recipes are judged on, never calibrated on.")],
    max_bytes: Annotated[str | None, typer.Option(help="All files of the model: 300MB, 1.5GB, 280MiB.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="The loaded model in memory, likewise.")] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Relative to the dense model: 0.1 allows ten per cent.")
    ] = None,
    min_tokens_per_second: Annotated[float | None, typer.Option(help="Of generation on this machine.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Calibration data: a file, a folder or a Hub id; repeated, a mixture.")
    ] = None,
    dataset_name: Annotated[list[str] | None, typer.Option(help="Configuration of a Hub dataset.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Split of a Hub dataset.")] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="Column of texts or messages; a,b: each text of both a sequence.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Sequences to calibrate on.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    max_minutes: Annotated[float, typer.Option(help="Wall time of the search.")] = 120.0,
    max_trials: Annotated[int, typer.Option(help="Recipes that are tried quickly.")] = 40,
    quick_samples: Annotated[int, typer.Option(help="Calibration sequences of a quick try.")] = 16,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens that are scored.")] = 12288,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    figure: Annotated[Path | None, typer.Option(help="Draw size against perplexity: a .png, .svg or .pdf.")] = None,
    working_directory: Annotated[
        Path | None, typer.Option(help="Keeps what was measured, so that a killed search goes on.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampler.")] = 0,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    verbose: options.Verbose = False,
) -> None:
    """Search for the recipe that loses least under a budget, and write the model that it makes to OUT."""
    check_output(out)
    if not evaluation.is_file():
        raise ConfigurationError(f"--evaluation {str(evaluation)!r} is no file.")
    calibration = options.build_calibration(
        dataset or [],
        dataset_name,
        split,
        text_column,
        num_samples=num_samples,
        sequence_length=sequence_length,
    )

    import hf_compress

    from ..calibration.sources import check_local_data
    from .loading import DTYPES, check_source, load_tokenizer

    if dtype not in DTYPES:
        raise ConfigurationError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}.")
    if figure is not None and (figure.suffix not in FIGURES or not figure.absolute().parent.is_dir()):
        raise ConfigurationError(
            f"--figure {str(figure)!r} cannot be written: name one of {', '.join(FIGURES)} in a folder that exists."
        )
    budget = hf_compress.Budget(
        bytes=max_bytes,
        memory=max_memory,
        max_perplexity_increase=max_perplexity_increase,
        min_tokens_per_second=min_tokens_per_second,
    )
    check_source(model)
    check_local_data(calibration)
    loading = {"dtype": dtype, "device_map": device_map, "revision": revision}
    result = hf_compress.auto(
        model,
        budget,
        calibration=calibration,
        evaluation=evaluation,
        processing_class=load_tokenizer(model, revision=revision),
        output=out,
        working_directory=working_directory,
        max_minutes=max_minutes,
        max_trials=max_trials,
        quick_samples=quick_samples,
        evaluation_tokens=evaluation_tokens,
        context=context,
        seed=seed,
        **{name: value for name, value in loading.items() if value is not None},
    )
    stdout().print(result.table())
    for line in result.refused:
        say(f"not run: {line}")
    if figure is not None:
        result.figure(figure)
    say(f"Saved {result.best.description} to {out} ({result.best.bytes:,} bytes)")
