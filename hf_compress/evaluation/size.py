"""How large a model is: parameters in memory, bytes on disk."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigurationError

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class SizeOnDisk:
    """Bytes of a saved model.

    Attributes:
        weights: bytes of the weight files, every shard of them.
        total: bytes of all files of the folder, tokenizer and configuration included.
    """

    weights: int
    total: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def size_on_disk(path: str | os.PathLike[str]) -> SizeOnDisk:
    """Size of the saved model in the folder `path` (or of one weight file).

    Where a folder holds weights in several formats, safetensors count, as `from_pretrained` would load them.

    Raises:
        ConfigurationError: where there is no such folder or no weight file in it.
    """
    root = Path(path)
    if root.is_file():
        return SizeOnDisk(root.stat().st_size, root.stat().st_size)
    if not root.is_dir():
        raise ConfigurationError(f"{str(path)!r} is not a folder; size_on_disk measures saved models.")
    files = [file for file in root.rglob("*") if file.is_file()]
    for suffix in _WEIGHT_SUFFIXES:
        weights = [file for file in files if file.parent == root and file.suffix == suffix]
        if weights:
            return SizeOnDisk(sum(file.stat().st_size for file in weights), sum(file.stat().st_size for file in files))
    raise ConfigurationError(f"no weight file ({', '.join(_WEIGHT_SUFFIXES)}) in {str(path)!r}; was the model saved?")


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a parameter that several modules share (tied embeddings, shared layers) counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
