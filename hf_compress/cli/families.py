"""`hf-compress families`: which family can be compressed by which method."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import recipe as options
from .console import command, stdout

if TYPE_CHECKING:
    from ..engine.support import Family

# A table that goes into a file is not folded to the width of a terminal that is not there.
PIPED_WIDTH = 400
_SIGNS = {"yes": "yes", "partly": "partly", "no": "–"}


@command
def families(
    model_types: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL_TYPE]...", help="Of config.model_type; all by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every reason in full.")] = False,
    reasons: Annotated[
        bool, typer.Option("--reasons", help="Say why a method does not work, or only partly.")
    ] = False,
    verbose: options.Verbose = False,
) -> None:
    """Show which model types can be compressed by which method: MLPs and attention by modular decomposition, single
    matrices by codebooks and pruning, whole heads and MLP columns, and layers shared. A multimodal model is compressed
    as its language part is. The last column is the share of the weights that no method reaches."""
    from ..engine.support import families as supported

    found = supported(model_types or ())
    if as_json:
        typer.echo(json.dumps([asdict(family) for family in found], indent=2))
        return
    _print_table(found)
    if reasons:
        _print_reasons(found)


def _print_table(found: list[Family]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for name in ("model type", *found[0].methods, "out of reach"):
        table.add_column(name, no_wrap=name != "model type")
    alike: dict[tuple[str, ...], list[str]] = {}
    for family in found:
        share = sum(family.left_dense.values())
        cells = [_SIGNS[support.works] for support in family.methods.values()]
        alike.setdefault((*cells, f"{share:.0%}" if share >= 0.005 else ""), []).append(family.model_type)
    for cells_of_all, names in alike.items():
        table.add_row(", ".join(names), *cells_of_all)
    console = stdout()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    console.print(table)


def _print_reasons(found: list[Family]) -> None:
    console = stdout()
    said: dict[tuple[str, str], list[str]] = {}
    for family in found:
        for name, support in family.methods.items():
            if support.reason:
                reason = support.reason.replace(repr(family.model_type), "this type")
                said.setdefault((name, reason), []).append(family.model_type)
        for what, share in family.left_dense.items():
            said.setdefault(("out of reach", f"{what}: {share:.1%}"), []).append(family.model_type)
    for (name, reason), types in said.items():
        console.print(f"{', '.join(types)}: {name}: {reason}", highlight=False, markup=False)
