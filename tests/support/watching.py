"""What code does beside computing: imports, files written, processes and connections, and the memory it takes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of Python's audit hooks that a load has no business with, by how they begin.
_FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.putenv",
    "shutil.",
    "tempfile.",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
    "ctypes.dlopen",
)


class Watch:
    """An audit hook, of which Python has no way to be rid again: it listens only within `listening`.

    Attributes:
        events: what was seen since the last `listening` began, imports included.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self._on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "import":
            self.events.append(f"import {arguments[0]}")
        elif event == "open":
            flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
            mode = str(arguments[1] or "")
            if flags & _WRITING or set(mode) & set("wax+"):
                self.events.append(f"open {arguments[0]} {mode}")
        elif event.startswith(_FORBIDDEN):
            self.events.append(f"{event} {str(arguments)[:200]}")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self.events, self._on = [], True
        try:
            yield
        finally:
            self._on = False


class Peak:
    """The most memory that a stretch of code takes beyond what there was before, on Linux; None elsewhere."""

    _status, _reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        self._available = os.access(self._reset, os.W_OK)

    def start(self) -> None:
        if self._available:
            self._reset.write_text("5")  # the peak begins anew at what is resident now
            self._before = self._read("VmRSS")

    def bytes(self) -> int | None:
        return self._read("VmHWM") - self._before if self._available else None

    def _read(self, name: str) -> int:
        line = next(line for line in self._status.read_text().splitlines() if line.startswith(f"{name}:"))
        return 1024 * int(line.split()[1])
