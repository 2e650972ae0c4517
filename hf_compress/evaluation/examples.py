"""Reading small evaluation sets from local files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigurationError

_Item = TypeVar("_Item")


def spread(items: Sequence[_Item], limit: int | None) -> list[_Item]:
    """At most `limit` items, evenly spread: files are often sorted by class or by source."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise ConfigurationError(f"the number of examples is at least one, got {limit}.")
    return [items[index * len(items) // limit] for index in range(limit)]


def read_records(path: str | os.PathLike[str], columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows with these columns from a `.jsonl`, `.csv` or `.tsv` file, or the lines of a text file as the only column.

    A table without a line of column names has the columns in the order asked for.

    Raises:
        ConfigurationError: for a file that is missing, unreadable, empty or without the columns.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigurationError(f"{str(path)!r} is no file.")
    suffix = file.suffix.lower()
    if suffix not in (".jsonl", ".csv", ".tsv") and len(columns) > 1:
        raise ConfigurationError(f"{str(path)!r}: expected a .jsonl, .csv or .tsv file with {', '.join(columns)}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif suffix in (".csv", ".tsv"):
            records = _table(text, suffix, columns)
        else:
            records = [{columns[0]: line} for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error}.") from error
    if not records:
        raise ConfigurationError(f"{str(path)!r} holds no example.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or any(record.get(column) is None for column in columns):
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ConfigurationError(
                f"{str(path)!r}, example {number}: expected the columns {', '.join(columns)}; found {found}."
            )
    return records


def _table(text: str, suffix: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    # Tab-separated sets such as GLUE's hold quotation marks as they are.
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    rows = [row for row in csv.reader(text.splitlines(keepends=True), **style) if row]
    if rows and not set(columns) <= set(rows[0]):
        rows.insert(0, list(columns))
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]
