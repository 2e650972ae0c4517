"""Several processes, as `accelerate launch` starts them, at work on one compression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env
from torch import Tensor

from .. import errors
from ..errors import CompressionError, ConfigurationError

# Where torchrun and the MPI launchers say how many processes there are.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What one process does while the others wait, such as a search, may take hours; the usual limit is minutes.
PATIENCE = timedelta(days=30)
# Until all processes have begun: one that has gone another way, or has failed, never will.
MEETING = timedelta(minutes=10)

Found = TypeVar("Found")


def several_processes() -> bool:
    """Whether a launcher has started more than one process."""
    return torch.distributed.is_initialized() or processes_started() > 1


def processes_started() -> int:
    """How many processes a launcher has started, on all machines."""
    return int(get_int_from_env(WORLD_SIZES, 1))


def processes_here() -> int:
    """How many processes a launcher has started on this machine."""
    return int(get_int_from_env(("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"), 1))


def process_state() -> PartialState:
    """Accelerate's view of this process, set up where it was not yet."""
    # As the launcher asks for it: without, a process on CPUs takes itself for the only one.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def process_device() -> torch.device:
    """The accelerator of this process, else the CPU."""
    device = process_state().device
    # Accelerate numbers CPUs; device maps and hooks know one.
    return torch.device("cpu") if device.type == "cpu" else device


class Processes:
    """The processes at work; without arguments, this one alone.

    Every method is called by all of them, in the same order.

    Args:
        rank: number of this process.
        size: how many there are.
        group: over gloo, for messages and for tensors on the CPU. Tensors on accelerators go through the back end that
            the launcher has chosen.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @classmethod
    @contextmanager
    def of_launcher(cls) -> Iterator[Processes]:
        """Those that a launcher has started, for the time of the context.

        Raises:
            ConfigurationError: not all of them came here.
        """
        state = process_state() if several_processes() else None
        if state is None or state.num_processes == 1:
            yield cls()
            return
        try:
            meeting = torch.distributed.new_group(backend="gloo", timeout=MEETING)
            torch.distributed.barrier(group=meeting)
        except RuntimeError as error:
            raise ConfigurationError(
                f"{state.num_processes} processes were started, and not all of them are here. Every process has to "
                "call it: not under `is_main_process` or `main_process_first()`, and none may have failed before."
            ) from error
        group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield cls(state.process_index, state.num_processes, group)
        finally:
            torch.distributed.destroy_process_group(group)
            torch.distributed.destroy_process_group(meeting)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def each(self, work: Callable[[], Found]) -> list[Found]:
        """What `work` returns on every process, by rank. An exception of one is raised on all."""
        if self.size == 1:
            return [work()]
        failure: Exception | None = None
        try:
            own: tuple[bool, Any] = (True, work())
        except Exception as error:  # sent on, and raised below on every process
            failure, own = error, (False, _described(error))
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, own, group=self._group)
        if failure is not None:
            raise failure
        for rank, (fine, found) in enumerate(gathered):
            if not fine:
                raise _raised_by(rank, *found)
        return [found for _, found in gathered]

    def together(self, work: Callable[[], Found]) -> Found:
        """What `work` returns here. Every process calls it, and an exception of one is raised on all."""
        found: list[Found] = []
        self.each(lambda: found.append(work()))
        return found[0]

    def agree(self, what: dict[str, str]) -> None:
        """Raise `ConfigurationError` where processes differ in one of these."""
        others = self.each(lambda: what)
        differing = sorted(name for name in what if any(other.get(name) != what[name] for other in others))
        if differing:
            raise ConfigurationError(
                f"the processes differ in {', '.join(differing)}. All have to make the same call, on the same model."
            )

    def once(self, work: Callable[[], Found]) -> Found:
        """What `work` returns on the main process, which alone calls it."""
        if self.size == 1:
            return work()
        failure: Exception | None = None
        message: list[Any] = [None]
        if self.is_main:
            try:
                message = [(True, work())]
            except Exception as error:  # sent on, and raised below on every process
                failure, message = error, [(False, _described(error))]
        torch.distributed.broadcast_object_list(message, src=0, group=self._group)
        if failure is not None:
            raise failure
        fine, found = message[0]
        if not fine:
            raise _raised_by(0, *found)
        return cast(Found, found)

    def wait(self) -> None:
        """Until all are here."""
        self.each(lambda: None)

    def add_up(self, tensor: Tensor, owner: int | None) -> None:
        """Put the sum of all processes' tensors into that of the owner, or of every process if `owner` is `None`. What
        the others' tensors hold then means nothing."""
        if self.size == 1:
            return
        group = self._group_for(tensor)
        if owner is None:
            torch.distributed.all_reduce(tensor, group=group)
        else:
            torch.distributed.reduce(tensor, dst=owner, group=group)

    def hand_round(self, tensor: Tensor, owner: int) -> None:
        """Fill a contiguous tensor with that of its owner."""
        if self.size > 1 and tensor.numel():
            # As bytes: not every back end knows every dtype.
            raw = tensor.reshape(-1).view(torch.uint8)
            torch.distributed.broadcast(raw, src=owner, group=self._group_for(tensor))

    def _group_for(self, tensor: Tensor) -> Any:
        return self._group if tensor.device.type == "cpu" else None


def _described(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _raised_by(rank: int, name: str, text: str) -> CompressionError:
    """The error of another process, of the same type where it is one of ours."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, CompressionError):
        return kind(f"{text} (Found by process {rank}.)")
    return CompressionError(f"process {rank} failed with {name}: {text}")
