"""How the commands speak: results on stdout, everything else on stderr, one line for an expected error."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from ..errors import CompressionError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_Command = TypeVar("_Command", bound=Callable[..., None])


def stdout() -> Console:
    """Made anew for each call: a console keeps the stream that it saw first."""
    return Console(soft_wrap=True)


def say(message: str) -> None:
    """A line of progress, on stderr."""
    Console(stderr=True, soft_wrap=True).print(Text(message, style="dim"))


def complain(message: str) -> None:
    """One red line on stderr."""
    Console(stderr=True, soft_wrap=True).print(Text(" ".join(message.split()), style="red"))


def command(function: _Command) -> _Command:
    """A command whose expected errors are one line and exit code 2 (a traceback with --verbose), Ctrl-C exit code 130.

    The function takes a parameter `verbose`, and `working_directory` where it can be resumed.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except CompressionError as error:
            if options.get("verbose"):
                raise
            complain(f"error: {error}")
            raise typer.Exit(EXIT_ERROR) from None
        except KeyboardInterrupt:
            complain(_interrupted(options))
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return wrapper  # type: ignore[return-value]


def _interrupted(options: dict[str, Any]) -> str:
    if "working_directory" not in options:
        return "interrupted."
    if options["working_directory"] is None:
        return "interrupted; nothing was kept. With --working-directory DIR the same command resumes where it stopped."
    return f"interrupted; the same command resumes from {options['working_directory']}."
