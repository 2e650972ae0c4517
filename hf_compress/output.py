"""Where results are written: folders that may be filled, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CompressionError, ConfigurationError


def check_output(out: Path) -> None:
    """Raise `ConfigurationError`, before the work, where the result could not be written or would mix with files."""
    if out.is_file():
        raise ConfigurationError(f"{str(out)!r} is a file; name a folder to write.")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigurationError(f"the folder {str(out)!r} is not empty; name a new one, or empty it.")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise ConfigurationError(f"{str(parent)!r} is a file, so {str(out)!r} cannot be made.")
    try:
        Path(tempfile.mkdtemp(dir=parent)).rmdir()
    except OSError as error:
        raise ConfigurationError(f"{str(out)!r} cannot be written ({error}); name another folder.") from error


def check_working_directory(directory: str | Path | None, out: Path) -> None:
    """Raise `ConfigurationError` for a working directory in the folder that the result is written to, or a file."""
    if directory is None:
        return
    place = Path(directory).resolve()
    if place.is_file():
        raise ConfigurationError(f"the working directory {str(directory)!r} is a file; name a folder.")
    if place == out.resolve() or out.resolve() in place.parents:
        raise ConfigurationError(
            f"the working directory {str(directory)!r} lies in {str(out)!r}, which the result is written to; name one "
            "outside."
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill in place of `out`, which is there, whole, once the context ends without an exception. What a
    killed process has left of an earlier attempt goes.

    Raises:
        ConfigurationError: as `check_output`.
        CompressionError: the finished folder cannot be given its name; it stays, and the message says where.
    """
    check_output(out)
    out = out.resolve()
    scratch = out.with_name(f".{out.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CompressionError(f"there is no room for the result in {str(out.parent)!r} ({error}).") from error
        raise
    try:
        _put_in_place(scratch, out)
    except OSError as error:
        raise CompressionError(
            f"the result is finished, and could not be moved to {str(out)!r} ({error}). It is whole in "
            f"{str(scratch)!r}: move it yourself."
        ) from error


def _put_in_place(scratch: Path, out: Path) -> None:
    """Give a finished folder its name. One that is there already and cannot go, such as a mount point, is filled."""
    if out.is_dir():
        try:
            out.rmdir()  # it is empty
        except OSError:
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
                shutil.move(file, out / file.name)
            scratch.rmdir()
            return
    scratch.rename(out)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, with the same bytes on every system."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
