"""The commands, gathered. Each imports torch and Transformers when it runs, so that help does not wait for them."""

from __future__ import annotations

import typer

from .automatic import auto
from .card import card
from .demo import demo
from .evaluate import evaluate
from .families import families
from .plan import plan
from .push import push
from .run import run

app = typer.Typer(
    name="hf-compress",
    help="Compress Transformers models; load the result with a plain from_pretrained.",
    no_args_is_help=True,
    add_completion=False,
)
app.command("run")(run)
app.command("eval")(evaluate)
app.command("plan")(plan)
app.command("auto")(auto)
app.command("card")(card)
app.command("push")(push)
app.command("demo")(demo)
app.command("families")(families)


def main() -> None:
    """Entry point of the console script and of `python -m hf_compress`."""
    app()
