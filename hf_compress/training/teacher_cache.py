"""A teacher's likeliest classes on disk, so that it runs once for every example."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..engine.resume import write_atomically
from ..errors import ConfigurationError


class TeacherCache:
    """Files of one example each, named by its inputs.

    Args:
        folder: where they are; made if need be.
        identity: what must be the same for the files to be of use: teacher, temperature, number of classes.

    Raises:
        ConfigurationError: the folder belongs to another teacher or other settings.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "teacher.json"
        if note.exists():
            try:
                found = json.loads(note.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise ConfigurationError(
                    f"{note.name} of the teacher's cache in {str(folder)!r} is damaged. Name another folder, or "
                    "remove this one."
                )
            if found != identity:
                differing = sorted(
                    key for key in found.keys() | identity.keys() if found.get(key) != identity.get(key)
                )
                raise ConfigurationError(
                    f"the teacher's cache in {str(folder)!r} was made with other settings: {', '.join(differing)} "
                    "differ. Name another folder, or remove this one."
                )
        else:
            write_atomically(note, json.dumps(identity, indent=2))

    @staticmethod
    def keys(inputs: dict[str, Any]) -> list[str]:
        """A name for every row of a batch, from its tensors without labels and padding."""
        mask = inputs.get("attention_mask")
        tensors = {name: value for name, value in sorted(inputs.items()) if isinstance(value, Tensor)}
        tensors = {name: value for name, value in tensors.items() if name not in ("labels", "attention_mask")}
        names = []
        for row in range(len(next(iter(tensors.values())))):
            digest = hashlib.sha256()
            for name, value in tensors.items():
                own = value[row]
                if mask is not None and mask.dim() == 2 and own.dim() == 1 and own.shape == mask[row].shape:
                    own = own[mask[row].bool()]
                digest.update(f"{name}{tuple(own.shape)}{own.dtype}".encode())
                digest.update(own.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            names.append(digest.hexdigest())
        return names

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> tuple[Int[Tensor, "places count"], Float[Tensor, "places count"]] | None:
        """Classes and log-probabilities of an example; `None` where there are none."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
        except SafetensorError:
            return None  # written anew
        classes, log_probabilities = (tensors.get(name) for name in ("classes", "log_probabilities"))
        # Damaged ones are written anew as well: classes that are not there would index foreign memory on some devices.
        if classes is None or log_probabilities is None or classes.dtype != torch.int32 or classes.dim() != 2:
            return None
        if classes.shape != log_probabilities.shape or not log_probabilities.is_floating_point():
            return None
        if classes.numel() and int(classes.min()) < 0:
            return None
        return classes.long(), log_probabilities.float()

    def keep(
        self, key: str, classes: Int[Tensor, "places count"], log_probabilities: Float[Tensor, "places count"]
    ) -> None:
        """Write an example's file, whole or not at all."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {"classes": classes.int().cpu(), "log_probabilities": log_probabilities.float().cpu()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
