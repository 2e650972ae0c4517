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
    evaluation: Annotated[
        Path | None, typer.Option(help="What `hf-compress eval BASE PATH --json` printed, in a file.")
    ] = None,
    evaluation_data: Annotated[str | None, typer.Option(help="Name of the text that was measured on.")] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="License of the base, such as apache-2.0, where no card says it.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base, whose card names license, task and language.")
    ] = None,
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
