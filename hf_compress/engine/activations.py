"""Hidden states of all calibration batches at one place of a model, and what goes with them: in memory, or in files
where they are too many."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import CompressionError
from .distributed import Processes


class Activations(MutableSequence[Tensor]):
    """A list of tensors, one a batch, that are kept in a folder if one is given.

    A file lives as long as some list refers to it: copies share files.
    """

    def __init__(self, folder: Path | None = None, tensors: Iterable[Tensor] = ()) -> None:
        self.folder = folder
        self._items: list[Tensor | FiledTensor] = [self._kept(tensor) for tensor in tensors]

    def copy(self) -> Activations:
        """The same tensors in a list of its own."""
        other = Activations(self.folder)
        other._items = list(self._items)
        return other

    def _kept(self, tensor: Tensor) -> Tensor | FiledTensor:
        return tensor if self.folder is None else FiledTensor(tensor, self.folder)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Activations: ...
    def __getitem__(self, index: int | slice) -> Tensor | Activations:
        if isinstance(index, slice):
            other = Activations(self.folder)
            other._items = self._items[index]
            return other
        item = self._items[index]
        return item.read() if isinstance(item, FiledTensor) else item

    def __setitem__(self, index: Any, tensor: Any) -> None:
        self._items[index] = self._kept(tensor)

    def __delitem__(self, index: int | slice) -> None:
        del self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def insert(self, index: int, value: Tensor) -> None:
        self._items.insert(index, self._kept(value))


# Smaller tensors stay in memory.
WORTH_A_FILE = 2**16


def filed(value: Any, folder: Path | None) -> Any:
    """Nested data with the large tensors in files; as it is without a folder."""
    if folder is None:
        return value

    def large(part: Any) -> bool:
        return isinstance(part, Tensor) and part.nbytes >= WORTH_A_FILE

    return map_once(lambda part: FiledTensor(part, folder) if large(part) else part, value)


def read(value: Any) -> Any:
    """What `filed` was given."""
    return map_once(lambda part: part.read() if isinstance(part, FiledTensor) else part, value)


def map_once(function: Callable[[Any], Any], value: Any) -> Any:
    """Nested data with a function of every part in its place, called once for a part that occurs several times."""
    found: dict[int, Any] = {}

    def mapped(part: Any) -> Any:
        if id(part) not in found:
            found[id(part)] = function(part)
        return found[id(part)]

    return tree_map(mapped, value)


class FiledTensor:
    """A tensor in a file, which goes when nobody refers to it any more."""

    def __init__(self, tensor: Tensor, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".safetensors")
        os.close(handle)  # safetensors opens the file by its name
        self.path, self.device = Path(name), tensor.device
        weakref.finalize(self, self.path.unlink, missing_ok=True)
        try:
            save_file({"hidden": tensor.detach().cpu().contiguous()}, self.path)
        except (OSError, SafetensorError) as error:
            raise CompressionError(
                f"hidden states cannot be written to {str(folder)!r} ({error}): make room. With a working directory "
                "the same call goes on."
            ) from error

    def read(self) -> Tensor:
        found: Tensor = load_file(self.path)["hidden"].to(self.device, copy=True)
        return found


@contextmanager
def folder_of_activations(directory: Path | None, processes: Processes) -> Iterator[Path]:
    """Of this process; gone at the end. What a killed run has left goes at the start."""
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="hf_compress-") as temporary:
            yield Path(temporary)
        return
    folder = directory / f"activations-{processes.rank}"

    def clear() -> None:
        for left in directory.glob("activations-*"):
            shutil.rmtree(left, ignore_errors=True)

    processes.once(clear)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
