"""Blocks whose weights are not in memory: brought in while they are worked on, and put away again.

Accelerate offloads weights to the CPU's memory or to files and fetches them for every call of a module. A compression
works on one block after the other, so it takes the blocks out of Accelerate's hands, fetches each one once a pass, and
gives them back when it is done.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import ModelAnatomy
from ..errors import CheckpointError, NumericalError, UnsupportedModelError
from .freed import return_freed_memory
from .weights import loaded_dtype


class Residency:
    """Which blocks of a model are offloaded, and where their tensors are.

    Args:
        anatomy: the model, as Accelerate has dispatched it or whole in memory.

    Raises:
        UnsupportedModelError: a tensor on the meta device that no hook of Accelerate knows.
    """

    def __init__(self, anatomy: ModelAnatomy) -> None:
        self.model: PreTrainedModel = anatomy.model
        self.paths = anatomy.block_paths
        self._sources: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        self._devices: dict[int, Any] = {}
        self._options: dict[int, dict[str, Any]] = {}
        # Blocks whose weights were found to be finite: every pass fetches them anew.
        self._seen: set[int] = set()
        # Those that are in memory now.
        self._inside: set[int] = set()
        for block, path in enumerate(self.paths):
            kept = dict(_kept_tensors(self.model, path))
            away = [name for name, tensor in kept.items() if tensor.is_meta]
            if away:
                self._find(block, away)
                # What is in memory of a block that is not is put away with it.
                here = {name: tensor.detach() for name, tensor in kept.items() if not tensor.is_meta}
                self._sources.update({name: (here, name) for name in here})
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor.is_meta and name not in self._sources:
                # An offloaded head or embedding is fetched by its own hook.
                hook, key = _hook_of(self.model, name)
                self._sources[name] = (hook.weights_map, key)

    def __bool__(self) -> bool:
        """Whether anything is offloaded."""
        return bool(self._sources)

    def _find(self, block: int, names: list[str]) -> None:
        for name in names:
            hook, key = _hook_of(self.model, name)
            self._sources[name] = (hook.weights_map, key)
            self._devices[block] = hook.execution_device
            self._options[block] = {"offload_buffers": hook.offload_buffers, "skip_keys": hook.skip_keys}

    def take_over(self) -> None:
        """Take the offloaded blocks out of Accelerate's hands."""
        for block in self._devices:
            module = self.model.get_submodule(self.paths[block])
            remove_hook_from_module(module, recurse=True)
            for part in module.modules():
                # Accelerate leaves every module a method that refers to it: a cycle, which would keep the weights of
                # replaced modules in memory until Python looks for cycles.
                if getattr(part.__dict__.get("forward"), "__func__", None) is type(part).forward:
                    del part.forward
            _put_away(self.model, self.paths[block])

    @contextmanager
    def resident(self, block: int) -> Iterator[None]:
        """Within the context, and all contexts within it, a block is in memory, on the device that it runs on.

        Raises:
            CheckpointError: a file that is gone or damaged.
            NumericalError: a weight that is not finite.
        """
        if block not in self._devices or block in self._inside:
            yield
            return
        self._fetch(block)
        self._inside.add(block)
        try:
            yield
        finally:
            self._inside.discard(block)
            _put_away(self.model, self.paths[block])
            return_freed_memory()

    def _fetch(self, block: int) -> None:
        for name, tensor in list(_kept_tensors(self.model, self.paths[block])):
            if not tensor.is_meta:
                continue
            found = self.tensor(name)
            unseen = block not in self._seen and found.is_floating_point()
            if unseen and not torch.isfinite(found).all():
                raise NumericalError(f"the weight {name!r} holds NaN or infinite values: the checkpoint is damaged.")
            dtype = loaded_dtype(self.model, name, found.dtype) if found.is_floating_point() else found.dtype
            _set(self.model, name, found.to(self._devices[block], dtype))
        self._seen.add(block)

    def tensor(self, name: str) -> Tensor:
        """An offloaded tensor, from wherever it is. A copy: nothing keeps its file open."""
        return _read(self._sources, name).clone()

    def knows(self, name: str) -> bool:
        """Whether `tensor` has this one."""
        return name in self._sources

    def whole(self, block: int) -> dict[str, Tensor]:
        """All tensors of a block that is in memory, as a file has to hold them; none where it is not offloaded."""
        if block not in self._devices:
            return {}
        return {name: tensor.detach() for name, tensor in _kept_tensors(self.model, self.paths[block])}

    def moved(self, block: int, file: Path) -> None:
        """From now on the tensors of a block, whatever modules it has now, come from this file."""
        if block not in self._devices:
            return
        path = self.paths[block]
        self._sources = {name: at for name, at in self._sources.items() if not name.startswith(f"{path}.")}
        index = {
            name: {"safetensors_file": str(file.absolute()), "weight_name": name}
            for name, _ in _kept_tensors(self.model, path)
        }
        loader = OffloadedWeightsLoader(index=index)
        self._sources.update({name: (loader, name) for name in index})

    def give_back(self) -> None:
        """Let Accelerate fetch the blocks again whenever they are called."""
        tensors = _Sources(self)
        for block, device in self._devices.items():
            module = self.model.get_submodule(self.paths[block])
            options = {**self._options[block], "offload_buffers": True}
            attach_align_device_hook(
                module,
                execution_device=device,
                offload=True,
                weights_map=tensors,
                module_name=self.paths[block],
                **options,
            )

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Within the context the whole model runs: every part of a block is fetched when it is called."""
        self.give_back()
        try:
            yield
        finally:
            self.take_over()

    def folder(self) -> Path:
        """A folder for the compressed blocks that lasts as long as the model does."""
        made = tempfile.mkdtemp(prefix="hf_compress-")
        weakref.finalize(self.model, shutil.rmtree, made, ignore_errors=True)
        return Path(made)


def _read(sources: dict[str, Any], name: str) -> Tensor:
    try:
        weights, key = sources[name]
        found: Tensor = weights[key]
        return found
    except Exception as error:  # of the file system or of safetensors, which has many kinds
        raise CheckpointError(
            f"the offloaded weight {name!r} cannot be read ({error}). The checkpoint, or the folder that holds "
            "offloaded weights (of a compression in place: the working directory), is incomplete or damaged."
        ) from error


class _Sources(Mapping[str, Tensor]):
    """What Accelerate's hooks read: the tensors of all offloaded blocks by their full names."""

    def __init__(self, residency: Residency) -> None:
        # Not the residency itself: it refers to the model, which then would never be freed with its folder.
        self._sources = residency._sources

    def __getitem__(self, name: str) -> Tensor:
        return _read(self._sources, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _kept_tensors(model: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of a block by their full names."""
    for name, tensor in model.get_submodule(path).state_dict(keep_vars=True).items():
        yield f"{path}.{name}", tensor


def _hook_of(model: nn.Module, name: str) -> tuple[Any, str]:
    """The hook that fetches a tensor, and the tensor's name in its map."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        owner = model.get_submodule(".".join(parts[:depth]))
        hook = getattr(owner, "_hf_hook", None)
        for single in getattr(hook, "hooks", [hook]):
            if getattr(single, "weights_map", None) is not None:
                return single, ".".join(parts[depth:])
    raise UnsupportedModelError(
        f"{name!r} is on the meta device and nothing says where its values are: the model has no weights. Load it "
        "with from_pretrained; with device_map= weights may be offloaded to the CPU or to disk."
    )


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    before = owner._parameters.get(attribute)
    if before is None:
        owner._buffers[attribute] = tensor
    else:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=before.requires_grad)


def _put_away(model: nn.Module, path: str) -> None:
    """Tensors of a block to the meta device; what modules have derived from them is forgotten."""
    for module in model.get_submodule(path).modules():
        forget: Any = getattr(module, "forget_derived", None)
        if forget is not None:
            forget()
    for name, tensor in list(_kept_tensors(model, path)):
        _set(model, name, tensor.detach().to("meta"))
