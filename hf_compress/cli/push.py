"""`hf-compress push`: a compressed model to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import recipe as options
from .card import check_base
from .console import command, say


@command
def push(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a compressed model.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO", help="Repository, such as me/model; made where there is none.")
    ],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository; the account's default if not given."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made where there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    token: Annotated[str | None, typer.Option(help="In place of the one that `hf auth login` has stored.")] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Send the report as JSON.")] = True,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Send the figure of the blocks.")] = True,
    evaluation: options.Evaluation = None,
    evaluation_data: options.EvaluationData = None,
    license_id: options.License = None,
    base: options.Base = None,
    verbose: options.Verbose = False,
) -> None:
    """Push the compressed model in PATH to REPO, with its card, in one commit. A failed upload can be repeated."""
    from ..hub import Options, push_folder

    check_base(base)

    commit = push_folder(
        path,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
        options=Options(
            report=report,
            figures=figures,
            evaluation=evaluation,
            evaluation_data=evaluation_data,
            license=license_id,
            base=base,
        ),
    )
    say(f"Pushed: {commit.pr_url or commit.commit_url}")
