"""The compiled kernel: finding it, choosing an instruction set, and what to do where there is none."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from ..errors import CompressionError, ConfigurationError

# Environment variable that names the kernel to use: one of `available_kernels()`, or "auto".
VARIABLE = "HF_COMPRESS_KERNEL"
# HFC_VERSION of csrc/codebook.h.
VERSION = 3
# Numbers of the instruction sets in csrc/codebook.c, fastest first.
_INSTRUCTION_SETS = {"avx512": 3, "avx2": 2, "neon": 1, "scalar": 0}
# For each number of bits, up to how many rows of x multiplying with the codes is faster than writing out tiles of the
# matrix for a GEMM.
_MOST_ROWS = {
    "avx512": {2: 80, 3: 44, 4: 80},
    "avx2": {2: 18, 3: 14, 4: 16},
    "neon": {2: 16, 3: 16, 4: 16},
    "scalar": {2: 2, 3: 2, 4: 2},
}
# The same for a GEMM in bfloat16, on the CPUs with instructions for it: all of them have AVX-512.
_MOST_ROWS_BFLOAT16 = {2: 18, 3: 10, 4: 18}
# hfc_type of csrc/codebook.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_STATUS = {
    1: "there is not enough memory for the kernel's working space.",
    2: "`row_codebook` names a codebook that is not there: the tensors are damaged. Load or compress the model again.",
}


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether torch's GEMM has instructions for bfloat16 on this CPU: without them it is slower than float32."""
    found = getattr(torch.cpu, "get_capabilities", None)  # Older torch lacks it.
    return found is not None and torch.backends.mkldnn.is_available() and bool(found().get("avx512_bf16"))


class Matrix(ctypes.Structure):
    """hfc_matrix of csrc/codebook.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "codebooks", "scales", "row_scales", "row_codebook")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "units", "groups", "group_units")),
        *((name, ctypes.c_int64) for name in ("codebook_count", "codebook_rows")),
        *((name, ctypes.c_int32) for name in ("bits", "codebook_type", "scale_type", "row_scale_type", "index_bytes")),
    )


class Library:
    """A loaded kernel: its two functions with their signatures, and the instruction sets that run here.

    Raises `OSError` or `AttributeError` for a file that is not a kernel of this version for this machine.
    """

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        if handle.hfc_version() != VERSION:
            raise OSError(f"it has version {handle.hfc_version()}, expected {VERSION}")
        self._configure = handle.hfc_configure
        self._configure.argtypes = (ctypes.c_int32, ctypes.c_void_p)
        self.linear = handle.hfc_linear
        self.linear.argtypes = (*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32)
        self.dequantize = handle.hfc_dequantize
        self.dequantize.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, ctypes.c_int32, ctypes.c_int32)
        self.supported = tuple(name for name, number in _INSTRUCTION_SETS.items() if handle.hfc_supported(number))
        self._parallel = _parallel_function()

    def select(self, name: str) -> None:
        self.most_rows = dict.fromkeys(TYPES, _MOST_ROWS[name])
        if name == "avx512" and multiplies_bfloat16():
            self.most_rows[torch.bfloat16] = _MOST_ROWS_BFLOAT16
        self._configure(_INSTRUCTION_SETS[name], self._parallel)


class _State:
    """What this process uses; found out at the first call."""

    library: Library | None = None
    problem: str | None = None
    searched = False
    active: Library | None = None
    name: str | None = None
    warned = False


def active_library() -> Library | None:
    """The kernel to call, or `None` for the torch operations. Warns once if the kernel is missing or broken.

    Raises:
        ConfigurationError: the environment variable names a kernel that this machine does not have.
    """
    if _State.name is None:
        use_kernel(os.environ.get(VARIABLE, "auto"))
    return _State.active


def available_kernels() -> tuple[str, ...]:
    """The names that `use_kernel` takes on this machine, fastest first; `"torch"` is always one of them."""
    library = _library()
    return (*(library.supported if library else ()), "torch")


def kernel_name() -> str:
    """The kernel in use: an instruction set, or `"torch"`."""
    active_library()
    assert _State.name is not None
    return _State.name


def use_kernel(name: str = "auto") -> None:
    """Choose the kernel for this process: one of `available_kernels()`, or `"auto"` for the fastest.

    Raises:
        ConfigurationError: a name that this machine does not have.
    """
    available = available_kernels()
    if name == "auto":
        name = available[0]
        if name == "torch":
            _warn()
    if name not in available:
        reason = f" ({_State.problem})" if _State.problem else ""
        raise ConfigurationError(f"kernel {name!r} is not there{reason}; this machine has {', '.join(available)}.")
    _State.active = None if name == "torch" else _State.library
    if _State.active is not None:
        _State.active.select(name)
    _State.name = name


@contextlib.contextmanager
def forced_kernel(name: str) -> Iterator[None]:
    """Within the context this process uses the kernel `name`. Not for several threads at once."""
    before = kernel_name()
    use_kernel(name)
    try:
        yield
    finally:
        use_kernel(before)


def check_status(status: int) -> None:
    """Raise `CompressionError` for what a kernel function returned, if it failed."""
    if status:
        raise CompressionError(_STATUS[status])


def _library() -> Library | None:
    if not _State.searched:
        _State.searched = True
        path = _path()
        if path is None:
            _State.problem = "it was not built when hf_compress was installed"
        else:
            try:
                _State.library = Library(path)
            except (OSError, AttributeError) as error:
                _State.problem = f"{path} cannot be used: {error}"
    return _State.library


def _path() -> Path | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_codebook{suffix}")
        if path.exists():
            return path
    return None


def _warn() -> None:
    if _State.warned:
        return
    _State.warned = True
    warnings.warn(
        f"hf_compress runs without its compiled kernel ({_State.problem}): codebook layers work, but slowly. Install "
        "a C compiler (gcc or clang) and then hf_compress again: "
        "pip install --force-reinstall --no-deps --no-cache-dir hf_compress.",
        RuntimeWarning,
        stacklevel=4,
    )


def _parallel_function() -> Any:
    """GOMP_parallel of the OpenMP runtime that torch itself is linked with, or `None`.

    A second runtime, or threads of our own, would fight with torch's threads for the processors.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        with contextlib.suppress(OSError, AttributeError):
            handle = ctypes.CDLL(str(folder / name), mode=os.RTLD_NOLOAD)
            return ctypes.cast(handle.GOMP_parallel, ctypes.c_void_p)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    return None
