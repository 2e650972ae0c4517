"""Resume points: the finished blocks of an interrupted run, and the fingerprint that guards them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..anatomy import ModelAnatomy
from ..errors import CheckpointError, ResumeError
from .residency import Residency
from .results import pack_result, unpack_result
from .session import OUTSIDE, BlockResult

# What `write_atomically` and `keep` write until it is whole; the number is the process's.
_TEMPORARY = re.compile(r"\.(state\.json|(block-\d{5}|outside|activations)\.safetensors)\.\d+")
_ACTIVATIONS = "activations.safetensors"


def model_checksum(model: nn.Module, residency: Residency | None = None) -> str:
    """SHA-256 over names, dtypes and bytes of all parameters and persistent buffers, the offloaded ones too."""
    digest = hashlib.sha256()
    for name, kept in model.state_dict().items():
        tensor: Tensor = residency.tensor(name) if residency is not None and residency.knows(name) else kept
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()


def quick_checksum(anatomy: ModelAnatomy) -> str:
    """SHA-256 over names, shapes, dtypes and the first numbers of what lies in the blocks and in memory: enough to
    tell models of different origin apart. Outside them, a head may be fresh and random."""
    digest = hashlib.sha256()
    lists = tuple(f"{path}." for path in anatomy.block_paths)
    for name, tensor in anatomy.model.state_dict().items():
        if name.startswith(lists):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if not tensor.is_meta:
                raw: Any = tensor.detach().flatten()[:16].cpu().contiguous().view(torch.uint8).numpy()
                digest.update(raw)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _replace(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    """Move a finished file into place once it is on the disk: a power cut leaves the whole file or none."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors whole or not at all. Raises `ResumeError` where there is no room or no permission."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata=metadata)
        _replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ResumeError(
            f"{path} cannot be written ({error}). What was finished before is kept: make room, or see to the "
            "permissions, and repeat the same call."
        ) from error


def _remove_temporaries(directory: Path) -> None:
    """Remove what a killed run had not finished writing; its process number would never be met again."""
    for file in directory.iterdir():
        if _TEMPORARY.fullmatch(file.name):
            file.unlink()


class ResumePoint:
    """One stage's finished blocks under a directory; without a directory, nothing is kept.

    Args:
        directory: where this stage keeps its files.
        fingerprint: what must be equal for the finished blocks to be of use.
        keeps_activations: whether hidden states are kept beside them.
    """

    def __init__(self, directory: Path | None, fingerprint: dict[str, Any], keeps_activations: bool = False) -> None:
        self.directory, self.keeps_activations = directory, keeps_activations
        self._state: dict[str, Any] = {"fingerprint": fingerprint}

    def open(self) -> None:
        """Begin, or go on with what is there; before anything else, and by one process.

        Raises:
            ResumeError: the directory holds another run; the message names what differs.
        """
        directory, fingerprint = self.directory, self._state["fingerprint"]
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        state = directory / "state.json"
        if not state.exists():
            _remove_temporaries(directory)
            write_atomically(state, json.dumps(self._state, indent=2))
            return
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
            before = dict(found["fingerprint"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResumeError(
                f"{state} is damaged ({error}). Remove the working directory to start afresh."
            ) from error
        differing = sorted(
            key for key in before.keys() | fingerprint.keys() if before.get(key) != fingerprint.get(key)
        )
        if differing:
            raise ResumeError(
                f"the working directory {str(directory)!r} holds another run: {', '.join(differing)} differ. "
                "Repeat the interrupted command unchanged, or name an empty working directory."
            )
        _remove_temporaries(directory)
        self._state = found

    @property
    def decisions(self) -> dict[str, Any] | None:
        """What the survey decided and noted, if it was finished."""
        return self._state.get("decisions")

    def keep_decisions(self, decisions: dict[str, Any]) -> None:
        if self.directory is not None:
            self._state["decisions"] = decisions
            write_atomically(self.directory / "state.json", json.dumps(self._state, indent=2))

    def path(self, block: int) -> Path | None:
        """The file of a finished block; `None` without a directory."""
        name = "outside" if block == OUTSIDE else f"block-{block:05d}"
        return None if self.directory is None else self.directory / f"{name}.safetensors"

    def has(self, block: int) -> bool:
        path = self.path(block)
        return path is not None and path.exists()

    def lacks(self, block: int, names: Iterable[str]) -> bool:
        """Whether the file of a finished block is without some tensors: a run of a model in memory leaves out what it
        does not change."""
        path = self.path(block)
        assert path is not None
        with safe_open(path, framework="pt") as file:
            return not set(names) <= set(file.keys())

    def keep(self, block: int, result: BlockResult, whole: dict[str, Tensor] | None = None) -> None:
        """Write a block's new modules with their layout and report rows, in one file, atomically. `whole` are tensors
        of the block that have to be there as well, where nothing else will hold them."""
        path = self.path(block)
        if path is None:
            return
        record, changed = pack_result(result)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in {**(whole or {}), **changed}.items()}
        # A file needs at least one tensor; a block that stays dense has none.
        _save(path, tensors or {"": torch.zeros(1)}, {"block": json.dumps(record)})

    def keep_activations(self, block: int, streams: dict[str, Iterable[Tensor]]) -> None:
        """Write the hidden states at the entrance of a block, in place of those of the block before."""
        if self.directory is None or not self.keeps_activations:
            return
        path = self.directory / _ACTIVATIONS
        tensors = {
            f"{name}.{batch}": hidden.detach().cpu().contiguous()
            for name, stream in streams.items()
            for batch, hidden in enumerate(stream)
        }
        _save(path, tensors, {"block": str(block)})

    def activations(self) -> tuple[int, dict[str, Tensor]] | None:
        """The last hidden states that were kept, and the block that they are at the entrance of; `None` without."""
        path = None if self.directory is None else self.directory / _ACTIVATIONS
        if path is None or not self.keeps_activations or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return int(file.metadata()["block"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ResumeError(f"{path} is damaged ({error}). Remove this file to compute it again.") from error

    def load(self, block: int, model: nn.Module) -> BlockResult:
        """Rebuild a finished block's modules for the dense ones that `model` still has in place."""
        path = self.path(block)
        assert path is not None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["block"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ResumeError(f"{path} is damaged ({error}). Remove this file to compute the block again.") from error
        try:
            return unpack_result(record, tensors, model)
        except (RuntimeError, LookupError, AttributeError, ValueError, TypeError, CheckpointError) as error:
            raise ResumeError(f"{path} is damaged ({error}). Remove this file to compute the block again.") from error
