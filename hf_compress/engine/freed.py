"""Memory that was freed and is still held."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

# glibc's number of the parameter, and its value: larger pieces of memory go back as soon as they are freed.
_MMAP_THRESHOLD, _LARGE = -3, 2**20
# Linux's advice that pages are not needed, without losing what is in them.
_PAGE_OUT = 21


@cache
def _function(name: str) -> Any:
    """A function of glibc; `None` where the C library has none of this name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    The matrices of a block's solution are temporary, the small tensors between them stay: glibc would keep the holes.
    Measured on SmolLM2, sharing layers took 1.7 GB without this.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def pages_of_files(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Where the pages lie that tensors were mapped from safetensors files to: whole ones, as others are neighbours'
    too. None for tensors in memory of their own, and on systems other than Linux."""
    files, found = _mapped_files(), list[tuple[int, int]]()
    for tensor in tensors if files else ():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and _lie_in(files, first, last):
            found.append((first, last))
    return found


def return_pages(pages: Iterable[tuple[int, int]]) -> None:
    """Give back pages of files whose tensors have been replaced.

    A page that was read stays until the last tensor of its file is gone: a stage would hold the dense weights beside
    what the stage before made of them. Nothing is lost, as a page that is asked for again is read again.
    """
    advise, files = _function("madvise"), _mapped_files()
    for first, last in pages if advise is not None else ():
        if _lie_in(files, first, last):  # still
            advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGE_OUT)


def _lie_in(files: list[tuple[int, int]], first: int, last: int) -> bool:
    return any(start <= first and last <= stop for start, stop in files)


def _mapped_files() -> list[tuple[int, int]]:
    """Where safetensors files lie in this process's memory."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    ranges = (line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors"))
    return [(int(first, 16), int(last, 16)) for first, last in ranges]


def keep_heap_small() -> None:
    """Let large tensors always go back to the system when they are freed, for the rest of this process: for programs
    whose process is their own, and whose memory is limited.

    The peak of a compression varied up to twofold without. But pages come and go with every temporary tensor: the
    k-means start of codebooks took 122 s with it and 29 s without, magnitude pruning 8 and 3 s at 0.9 and 1.5 GB.
    """
    set_option = _function("mallopt")
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGE)
