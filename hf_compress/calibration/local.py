"""Files of this machine that a `CalibrationConfig` names: of texts, of rows or of images."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CalibrationError
from .configuration import CalibrationConfig

# Builders of `datasets`, by suffix.
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def local_path(config: CalibrationConfig) -> Path | None:
    """The file or folder meant, or None for a Hub id; raises `CalibrationError` if it is neither."""
    given = str(config.dataset)
    path = Path(os.path.expanduser(given))
    # os.path.exists, unlike Path.exists, takes a whole text given by mistake for a name too long to exist.
    if os.path.exists(path):
        return path
    if isinstance(config.dataset, Path) or path.suffix.lower() in BUILDERS or not _HUB_ID.fullmatch(given):
        shown = given if len(given) <= 200 else given[:200] + "..."
        raise CalibrationError(
            f"dataset={shown!r} is no file or folder (looked in {str(Path.cwd())!r}) and no Hub dataset id. "
            "Correct the path; texts in memory are given as a list of str."
        )
    return None


def local_images(config: CalibrationConfig) -> list[Path]:
    """The image files that the path of a configuration names or has below it; none for a Hub id."""
    path = local_path(config)
    if path is None:
        return []
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    images = [file for file in files if file.suffix.lower() in _IMAGES and file.is_file() and file.name[0] != "."]
    if images:
        _require_no_hub_fields(config)
    return images


def holds_only_images(config: CalibrationConfig) -> bool:
    """Whether a configuration names images on this machine without a file of texts beside them."""
    path = local_path(config)
    if path is None or any(file.suffix.lower() in BUILDERS for file in _files_at(path)):
        return False
    return bool(local_images(config))


def _files_at(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())


def _require_no_hub_fields(config: CalibrationConfig) -> None:
    for field, default in (("name", None), ("revision", None), ("split", "train")):
        if (value := getattr(config, field)) != default:
            raise CalibrationError(
                f"{field}={value!r} applies to datasets of the Hub, but {str(config.dataset)!r} is local. "
                f"Leave `{field}` out, or load the data with `datasets` and pass the Dataset."
            )


def local_files(config: CalibrationConfig) -> list[Path]:
    """Files of texts or rows, all of one kind; none for a Hub id.

    Raises:
        `CalibrationError`: for a path without such files, with files of several kinds, or with empty ones.
    """
    path = local_path(config)
    if path is None:
        return []
    _require_no_hub_fields(config)
    files = _files_at(path)
    usable = [file for file in files if file.suffix.lower() in BUILDERS]
    kinds = sorted({BUILDERS[file.suffix.lower()] for file in usable})
    if not kinds and local_images(config):
        raise CalibrationError(
            f"{path.name!r} holds images. Pass an image processor as `processing_class` to calibrate an image model "
            "on them; a model of text needs texts."
        )
    if len(kinds) != 1:
        found = sorted({file.suffix or file.name for file in files})
        raise CalibrationError(
            f"{path.name!r} holds {'files of several kinds' if kinds else 'nothing to read'}: found {found}, "
            f"expected files of one kind of {sorted(BUILDERS)}."
        )
    if not any(file.stat().st_size for file in usable):
        raise CalibrationError(f"{path.name!r} is empty: there is nothing to calibrate on.")
    return usable
