"""Results of blocks as tensors and plain data: for files, and for other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..layout import build_module, layout_entry
from .distributed import Processes, process_device
from .report import ModuleReport
from .session import BlockResult

Key = TypeVar("Key")


def pack_result(result: BlockResult) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A result as plain data, ready for JSON, and tensors by their full names."""
    tensors = {
        f"{at}.{name}": tensor.detach().contiguous()
        for at, module in result.modules.items()
        for name, tensor in module.state_dict().items()
    }
    tensors.update({name: values.detach().contiguous() for name, values in result.parameters.items()})
    record = {
        "layout": [layout_entry(at, module) for at, module in result.modules.items()],
        "rows": [asdict(row) for row in result.rows],
        "parameters": sorted(result.parameters),
    }
    return record, tensors


def unpack_result(record: dict[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> BlockResult:
    """The result again, for the dense modules that `model` still has in place.

    Raises:
        RuntimeError, LookupError, AttributeError, ValueError, TypeError, CheckpointError: data that do not fit.
    """
    modules: dict[str, nn.Module] = {}
    for entry in record["layout"]:
        at = entry["path"]
        module = build_module(model.get_submodule(at), entry)
        prefix = f"{at}."
        module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        modules[at] = module
    parameters = {name: tensors[name] for name in record["parameters"]}
    return BlockResult(modules, [ModuleReport(**row) for row in record["rows"]], parameters)


def merged(results: Iterable[BlockResult]) -> BlockResult:
    """The parts of a block's result in one."""
    whole = BlockResult({}, [])
    for result in results:
        whole.modules.update(result.modules)
        whole.rows.extend(result.rows)
        whole.parameters.update(result.parameters)
    return whole


def exchange(
    processes: Processes, own: Mapping[Key, BlockResult], model: nn.Module
) -> dict[Key, Callable[[], BlockResult]]:
    """The results of all processes on every one. Keys tell them apart, and may be of any kind that can be sent. What
    comes from another process is put together when it is called for, while the block that it is for is in memory."""
    found: dict[Key, Callable[[], BlockResult]] = {key: partial(_itself, result) for key, result in own.items()}
    if processes.size == 1:
        return found
    packed = {key: pack_result(result) for key, result in own.items()}
    headers = processes.each(
        lambda: {
            key: (record, {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors.items()})
            for key, (record, tensors) in packed.items()
        }
    )
    for rank, header in enumerate(headers):
        for key, (record, kinds) in header.items():
            if rank == processes.rank:
                tensors = packed[key][1]
            else:
                tensors = {
                    name: torch.empty(shape, dtype=dtype, device="cpu" if device == "cpu" else process_device())
                    for name, (shape, dtype, device) in kinds.items()
                }
            for name in kinds:
                processes.hand_round(tensors[name], rank)
            if rank != processes.rank:
                found[key] = partial(unpack_result, record, tensors, model)
    return found


def _itself(result: BlockResult) -> BlockResult:
    return result
