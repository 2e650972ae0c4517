"""Several processes under `accelerate launch`: one compresses, the others receive the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env
from torch import nn

from ..errors import CompressionError
from ..layout import check_tensors, layout_of, replay
from .report import CompressionReport

# Where torchrun and the MPI launchers say how many processes there are.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# The report, the provenance, and the names of parameters that stay and have new values.
Outcome = tuple[CompressionReport, dict[str, Any], list[str]]


def several_processes() -> bool:
    """Whether a launcher has started more than one process."""
    return torch.distributed.is_initialized() or int(get_int_from_env(WORLD_SIZES, 1)) > 1


def on_one_process(model: nn.Module, run: Callable[[], Outcome]) -> Outcome:
    """Call `run` on the main process and give every process its result and the replaced modules' tensors.

    The other processes wait; none compresses a copy of its own. An error of the main process is raised on all.
    """
    if not several_processes():
        return run()
    # As the launcher asks for it: without, a process on CPUs takes itself for the only one.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes == 1:
        return run()
    message: list[Any] = [None]
    failure: BaseException | None = None
    if state.is_main_process:
        try:
            outcome = run()
            message = [("done", outcome, layout_of(model))]
        except Exception as error:  # sent on, and raised below on every process
            failure = error
            message = [("failed", f"{type(error).__name__}: {error}")]
    torch.distributed.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[0][0] == "failed":
        raise CompressionError(f"compression failed on the main process: {message[0][1]}")
    outcome, layout = message[0][1:]
    if not state.is_main_process and layout:
        replay(model, layout)
    _broadcast(model, [entry["path"] for entry in layout], outcome[2])
    result: Outcome = outcome
    return result


def _broadcast(model: nn.Module, paths: list[str], parameters: list[str]) -> None:
    """Tensors of new modules, and parameters that stay and have new values."""
    tensors = [tensor for path in paths for tensor in model.get_submodule(path).state_dict(keep_vars=True).values()]
    for tensor in [*tensors, *(model.get_parameter(name) for name in parameters)]:
        # As bytes: not every back end knows every dtype.
        contiguous = tensor.detach().contiguous()
        if contiguous.numel():
            torch.distributed.broadcast(contiguous.view(-1).view(torch.uint8), src=0)
            tensor.detach().copy_(contiguous)
    check_tensors(model)
