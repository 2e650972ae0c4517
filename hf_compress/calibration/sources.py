"""Opens what a `CalibrationConfig` names and reads its rows or its texts, no further than asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..errors import CalibrationError
from .configuration import CalibrationConfig, is_image
from .local import BUILDERS, local_files, local_images, local_path

_SEPARATOR = "\n\n"  # between rows, as perplexity on wikitext is measured everywhere
_ROWS_IN_CHUNK = 1024
_IN_MEMORY = {
    "texts": "in-memory texts",
    "images": "in-memory images",
    "tokens": "in-memory token ids",
    "rows": "in-memory dataset",
    "examples": "in-memory examples",
    "mixture": "mixture",
}


def describe_source(config: CalibrationConfig) -> dict[str, Any]:
    """What a model card says about the origin of the data, in plain JSON. A local path is given by its last part."""
    if config.kind != "source":
        source: dict[str, Any] = {"dataset": _IN_MEMORY[config.kind]}
    elif (path := local_path(config)) is not None:
        source = {"dataset": path.resolve().name}
    else:
        source = {"dataset": str(config.dataset), "split": config.split}
        source |= {field: value for field in ("name", "revision") if (value := getattr(config, field)) is not None}
    if config.text_column is not None:
        source["text_column"] = config.text_column if isinstance(config.text_column, str) else list(config.text_column)
    return source


def title(config: CalibrationConfig) -> str:
    """How messages call the data."""
    source = describe_source(config)
    details = ", ".join(f"{key}={value!r}" for key, value in source.items() if key not in ("dataset", "text_column"))
    return f"the dataset {source['dataset']!r}" + (f" ({details})" if details else "")


def open_rows(
    config: CalibrationConfig, *, token: str | bool | None = None, cache_dir: str | Path | None = None
) -> Any:
    """Open the data without reading more than `datasets` must.

    Returns:
        The list or iterable of the user, or a `datasets.Dataset` or `IterableDataset`.

    Raises:
        `CalibrationError`: for a path that does not exist, a folder without usable files, or whatever `datasets` or
            the Hub reports.
    """
    if config.kind != "source":
        return config.dataset
    files = local_files(config)
    cache = str(cache_dir) if cache_dir is not None else None
    import datasets

    try:
        if not files:
            return datasets.load_dataset(
                str(config.dataset),
                config.name,
                split=config.split,
                revision=config.revision,
                streaming=config.streaming,
                token=token,
                cache_dir=cache,
            )
        # The readers of the classes, unlike load_dataset, ask nothing of the network.
        reader = f"from_{BUILDERS[files[0].suffix.lower()]}"
        paths = [str(file) for file in files]
        if config.streaming:
            return getattr(datasets.IterableDataset, reader)(paths)
        return getattr(datasets.Dataset, reader)(paths, cache_dir=cache)
    except Exception as error:
        raise _unreadable(config, error) from error


def check_local_data(config: CalibrationConfig) -> None:
    """Look whether data on this machine are there and have their text column, without reading more than a first chunk.

    Datasets of the Hub are not asked for, streams are not started, and a `.json` file, which has no first row until
    all of it is parsed, is not opened. Images pass: whether they fit depends on the `processing_class`.

    Raises:
        `CalibrationError`: what reading the data would raise, before the model's weights are loaded for nothing.
    """
    if config.kind == "mixture":
        for part in config.dataset:
            check_local_data(part)
        return
    rows = config.dataset if config.kind == "rows" and config.dataset.features is not None else None
    # Transformers builds its skeletons with meta as the default device, where `datasets` cannot share its counters.
    with torch.device("cpu"):
        if config.kind == "source" and not _may_be_images(config) and (files := local_files(config)):
            suffix = files[0].suffix.lower()
            if suffix == ".txt":
                _require_no_column(config)
            elif suffix != ".json":
                rows = open_rows(config.model_copy(update={"streaming": True}))
        if rows is not None and config.data_collator is None:
            columns = Columns.of(config, rows)
            if config.text_column is not None or not columns.images:
                columns.require_text(config)


def _may_be_images(config: CalibrationConfig) -> bool:
    return config.data_collator is None and config.text_column is None and bool(local_images(config))


def read_texts(
    config: CalibrationConfig,
    processing_class: Any,
    *,
    piece_characters: int,
    seed: int,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[str]:
    """Read the texts, in pieces that put together are the whole text.

    Rows are joined by an empty line, rendered conversations by nothing. A source of up to `piece_characters` is one
    piece, so that its tokens do not depend on where it is cut. Of a larger one that can be indexed, chunks of
    consecutive rows come in an order drawn by `seed`; other sources come in their own order.

    Raises:
        `CalibrationError`: for data that cannot be read, a missing text column, or rows that are not texts.
    """
    files = local_files(config) if config.kind == "source" else []
    if files and files[0].suffix.lower() == ".txt":
        _require_no_column(config)
        fragments = guarded(config, _file_fragments(files))
    else:
        rows = open_rows(config, token=token, cache_dir=cache_dir)
        values = rows if config.kind == "texts" else _column(config, rows)
        fragments = _row_fragments(config, values, processing_class, piece_characters, seed)
    piece: list[str] = []
    characters = 0
    for fragment in fragments:
        # A whole corpus may stand in a single row or line.
        for start in range(0, len(fragment), piece_characters):
            piece.append(fragment[start : start + piece_characters])
            characters += len(piece[-1])
            if characters > piece_characters:
                yield "".join(piece)
                piece, characters = [], 0
    if piece:
        yield "".join(piece)


def read_sentences(
    config: CalibrationConfig,
    *,
    wanted: int,
    seed: int,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> list[str]:
    """Up to `wanted` different texts from all columns that `config.text_column` lists.

    Rows that can be indexed are drawn with `seed`, others come in their own order.

    Raises:
        `CalibrationError`: for data that cannot be read, a missing column, or values that are not texts.
    """
    if config.kind == "source" and (files := local_files(config)) and files[0].suffix.lower() == ".txt":
        _require_no_column(config)
    rows = open_rows(config, token=token, cache_dir=cache_dir).with_format(None)
    names = Columns.of(config, rows).require_text(config)
    rows = rows.select_columns(names) if names else rows
    if hasattr(rows, "__len__"):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn: Iterable[Any] = (rows[index] for index in order)
    else:
        drawn = rows
    found: dict[str, None] = {}
    for row in guarded(config, drawn):
        for name in names:
            if row[name] is not None and not isinstance(row[name], str):
                raise CalibrationError(
                    f"{title(config)}: a row of the column {name!r} holds a {type(row[name]).__name__}; a list of "
                    "columns in `text_column` is for columns of texts."
                )
            if row[name] and row[name].strip():
                found[row[name]] = None
        if len(found) >= wanted:
            break
    return list(found)[:wanted]


def _require_no_column(config: CalibrationConfig) -> None:
    if config.text_column is not None:
        raise CalibrationError(f"{title(config)} is plain text without columns; leave `text_column` out.")


def _file_fragments(files: list[Path]) -> Iterator[str]:
    for number, file in enumerate(files):
        if number:
            yield _SEPARATOR
        with file.open(encoding="utf-8") as lines:
            yield from lines


def _row_fragments(
    config: CalibrationConfig, values: Any, processing_class: Any, piece_characters: int, seed: int
) -> Iterator[str]:
    first = True
    for value in _in_reading_order(guarded(config, values), values, piece_characters, config, seed):
        if value is None:
            continue
        if isinstance(value, str):
            text, separator = value, _SEPARATOR
        elif isinstance(value, list):
            text, separator = _conversation(value, processing_class), ""
        else:
            raise CalibrationError(
                f"{title(config)}: a row of the text column holds a {type(value).__name__}; expected a text or a "
                "list of messages. Choose another column with `text_column=`, or give a `data_collator`."
            )
        yield text if first else separator + text
        first = False


def _in_reading_order(
    in_order: Iterator[Any], values: Any, characters: int, config: CalibrationConfig, seed: int
) -> Iterator[Any]:
    if not hasattr(values, "__len__"):
        yield from in_order
        return
    head, seen = [], 0
    for value in in_order:
        head.append(value)
        seen += len(value) if isinstance(value, str) else len(str(value))
        if seen > characters:
            break
    else:
        yield from head
        return
    # Short chunks for short lists, so that a few long documents are drawn from as well as many lines.
    size = max(1, min(_ROWS_IN_CHUNK, len(values) // 64))
    starts = range(0, len(values), size)
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))
    chunks = (values[starts[chunk] : starts[chunk] + size] for chunk in order.tolist())
    yield from guarded(config, chain.from_iterable(chunks))


def _conversation(messages: list[Any], processing_class: Any) -> str:
    try:
        return str(processing_class.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        raise CalibrationError(
            f"{type(processing_class).__name__}.apply_chat_template could not render a conversation: {error} "
            "Give a processing_class whose chat template fits the messages, or choose a column of texts with "
            "`text_column=`."
        ) from error


@dataclass(frozen=True)
class Columns:
    """The columns of some rows: all of them, those of strings and those of images."""

    names: list[str]
    strings: list[str]
    images: list[str]

    @classmethod
    def of(cls, config: CalibrationConfig, rows: Any) -> Columns:
        rows = rows.with_format(None)
        if rows.features is not None:
            import datasets

            types = rows.features
            strings = [name for name in types if getattr(types[name], "dtype", None) in ("string", "large_string")]
            return cls(list(types), strings, [name for name in types if isinstance(types[name], datasets.Image)])
        first: dict[str, Any] = next(guarded(config, rows), {})
        strings = [name for name in first if isinstance(first[name], str)]
        return cls(list(first), strings, [name for name in first if is_image(first[name])])

    def text(self, config: CalibrationConfig) -> list[str]:
        """The columns that are named or, without names, the one that is plainly the text; empty if there is none."""
        if config.text_column is not None:
            wanted = [config.text_column] if isinstance(config.text_column, str) else list(config.text_column)
            return wanted if set(wanted) <= set(self.names) else []
        for usual in ("text", "messages"):
            if usual in self.names:
                return [usual]
        return self.strings if len(self.strings) == 1 else []

    def require_text(self, config: CalibrationConfig) -> list[str]:
        """As `text`; raises `CalibrationError` for columns without it."""
        if (found := self.text(config)) or not self.names:
            return found
        if config.text_column is None and self.images:
            raise CalibrationError(
                f"{title(config)} has images and no column that is plainly the text; its columns are {self.names}. "
                "Pass an image processor as `processing_class` to calibrate on the images, or name the column of "
                "texts with `text_column=`."
            )
        named = [config.text_column] if isinstance(config.text_column, str) else config.text_column or ()
        missing = " or ".join(repr(name) for name in named if name not in self.names)
        several = f", or several whose texts are sequences of their own, text_column={self.strings[:2]}"
        raise CalibrationError(
            f"{title(config)} has {f'no column {missing}' if missing else 'no column that is plainly the text'}; its "
            f"columns are {self.names}. Name the one to read, such as "
            f"text_column={(self.strings or self.names)[0]!r}{several if len(self.strings) > 1 else ''}."
        )


def _column(config: CalibrationConfig, rows: Any) -> Any:
    """The column of texts or conversations: indexable if `rows` is, else only iterable."""
    names = Columns.of(config, rows).require_text(config)
    # Selected first, so that images and other columns beside it are neither read nor decoded.
    return rows.with_format(None).select_columns(names)[names[0]] if names else []


def guarded(config: CalibrationConfig, values: Iterable[Any]) -> Iterator[Any]:
    """Yield the same values; what goes wrong while they are read is raised as a `CalibrationError`."""
    try:
        yield from values
    except Exception as error:
        raise _unreadable(config, error) from error


def _unreadable(config: CalibrationConfig, error: Exception) -> CalibrationError:
    reason = error.__cause__ or error
    remedy = ""
    if config.kind == "source" and local_path(config) is not None:
        remedy = " Check the contents of the file."
    elif config.kind == "source":
        remedy = (
            " No file or folder has that name, so it was asked of the Hub. Check `dataset`, `name`, `split` and the "
            "connection; a private or gated dataset needs `token`."
        )
    return CalibrationError(f"{title(config)} could not be read: {type(reason).__name__}: {reason}{remedy}")
