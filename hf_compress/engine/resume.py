"""Resume points: the finished blocks of an interrupted run, and the fingerprint that guards them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import CheckpointError, ResumeError
from ..layout import build_module, layout_entry
from .report import ModuleReport
from .session import OUTSIDE, BlockResult

# What `write_atomically` and `keep` write until it is whole; the number is the process's.
_TEMPORARY = re.compile(r"\.(state\.json|(block-\d{5}|outside)\.safetensors)\.\d+")


def model_checksum(model: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
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

    Raises:
        ResumeError: the directory holds another run; the message names what differs.
    """

    def __init__(self, directory: Path | None, fingerprint: dict[str, Any]) -> None:
        self.directory = directory
        self._state: dict[str, Any] = {"fingerprint": fingerprint}
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
        except json.JSONDecodeError as error:
            raise ResumeError(
                f"{state} is damaged ({error}). Remove the working directory to start afresh."
            ) from error
        before = found.get("fingerprint", {})
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

    def _path(self, block: int) -> Path | None:
        name = "outside" if block == OUTSIDE else f"block-{block:05d}"
        return None if self.directory is None else self.directory / f"{name}.safetensors"

    def has(self, block: int) -> bool:
        path = self._path(block)
        return path is not None and path.exists()

    def keep(self, block: int, result: BlockResult) -> None:
        """Write a block's new modules with their layout and report rows, in one file, atomically."""
        path = self._path(block)
        if path is None:
            return
        tensors = {
            f"{at}.{name}": tensor.detach().cpu().contiguous()
            for at, module in result.modules.items()
            for name, tensor in module.state_dict().items()
        }
        tensors.update({name: values.detach().cpu().contiguous() for name, values in result.parameters.items()})
        record = {
            "layout": [layout_entry(at, module) for at, module in result.modules.items()],
            "rows": [asdict(row) for row in result.rows],
            "parameters": sorted(result.parameters),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        # A file needs at least one tensor; a block that stays dense has none.
        save_file(tensors or {"": torch.zeros(1)}, temporary, metadata={"block": json.dumps(record)})
        _replace(temporary, path)

    def load(self, block: int, model: nn.Module) -> BlockResult:
        """Rebuild a finished block's modules for the dense ones that `model` still has in place."""
        path = self._path(block)
        assert path is not None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["block"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ResumeError(f"{path} is damaged ({error}). Remove this file to compute the block again.") from error
        modules: dict[str, nn.Module] = {}
        try:
            for entry in record["layout"]:
                at = entry["path"]
                module = build_module(model.get_submodule(at), entry)
                prefix = f"{at}."
                module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
                modules[at] = module
            parameters = {name: tensors[name] for name in record["parameters"]}
        except (RuntimeError, KeyError, AttributeError, CheckpointError) as error:
            raise ResumeError(f"{path} is damaged ({error}). Remove this file to compute the block again.") from error
        return BlockResult(modules, [ModuleReport(**row) for row in record["rows"]], parameters)
