"""`hf-compress card`: the model card of a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigurationError
from . import recipe as options
from .console import command, say


@command
def card(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a compressed model.")],
    repo_id: Annotated[str | None, typer.Option("--repo", help="Id that the card names for loading.")] = None,
    evaluation: options.Evaluation = None,
    evaluation_data: options.EvaluationData = None,
    license_id: options.License = None,
    base: options.Base = None,
    write: Annotated[
        bool,
        typer.Option("--write", help="Write it into PATH, with report, figure and recipe, instead of printing it."),
    ] = False,
    verbose: options.Verbose = False,
) -> None:
    """Print the card of the compressed model in PATH. What somebody wrote around our section stays."""
    from ..hub import Options, folder_card, prepare_folder

    check_base(base)
    chosen = Options(evaluation=evaluation, evaluation_data=evaluation_data, license=license_id, base=base)
    if write:
        names = prepare_folder(path, repo_id=repo_id, options=chosen)
        say(f"Wrote {', '.join(names)} into {path}.")
    else:
        typer.echo(folder_card(path, repo_id=repo_id, options=chosen))


def check_base(base: Path | None) -> None:
    """Raise `ConfigurationError` for a base without a card to read."""
    if base is not None and not (base / "README.md").is_file():
        raise ConfigurationError(f"--base {base.name!r} holds no README.md to read. --license names it.")
