"""Seeded changes to the tensors of a safetensors file: values, dtypes, shapes, names."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Bytes of an element, by the names of safetensors.
_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
_WHOLE = {"I8": "b", "U8": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q", "U64": "Q"}
_PATTERNS = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\x00\x7c", b"\x00\xfc", b"\x80\x7f", b"\x00\x00\xc0\x7f")


@dataclass
class Entry:
    """A tensor of a safetensors file."""

    dtype: str
    shape: list[int]
    data: bytes


def read_tensors(weights: bytes) -> dict[str, Entry]:
    (length,) = struct.unpack("<Q", weights[:8])
    header, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: Entry(fields["dtype"], fields["shape"], data[slice(*fields["data_offsets"])])
        for name, fields in header.items()
    }


def write_tensors(tensors: dict[str, Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        data += tensor.data
    return framed(json.dumps(header).encode(), data)


def framed(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


# Functions of a random generator and the tensors by name, which they change.


def _some(rng: random.Random, tensors: dict[str, Entry]) -> Entry:
    return tensors[rng.choice(list(tensors))]


def _flipped_bits(rng: random.Random, tensors: dict[str, Entry]) -> None:
    tensor = _some(rng, tensors)
    data = bytearray(tensor.data)
    for _ in range(rng.choice([1, 4, 64]) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    tensor.data = bytes(data)


def _pattern(rng: random.Random, tensors: dict[str, Entry]) -> None:
    tensor, pattern = _some(rng, tensors), rng.choice(_PATTERNS)
    tensor.data = (pattern * (len(tensor.data) // len(pattern) + 1))[: len(tensor.data)]


def _noise(rng: random.Random, tensors: dict[str, Entry]) -> None:
    tensor = _some(rng, tensors)
    tensor.data = rng.randbytes(len(tensor.data))


def _extreme_integers(rng: random.Random, tensors: dict[str, Entry]) -> None:
    whole = [tensor for tensor in tensors.values() if tensor.dtype in _WHOLE and tensor.data]
    if whole:
        tensor = rng.choice(whole)
        size, code = _SIZES[tensor.dtype], _WHOLE[tensor.dtype]
        low, high = (0, 2 ** (8 * size)) if code.isupper() else (-(2 ** (8 * size - 1)), 2 ** (8 * size - 1))
        value = max(low, min(high - 1, rng.choice([low, high - 1, -1, 0, 1, 3, 4, 8, 16, 254, 255])))
        data, place = bytearray(tensor.data), size * rng.randrange(len(tensor.data) // size)
        data[place : place + size] = struct.pack(f"<{code}", value)
        tensor.data = bytes(data)


def _renamed_dtype(rng: random.Random, tensors: dict[str, Entry]) -> None:
    tensor = _some(rng, tensors)
    tensor.dtype = rng.choice([name for name, size in _SIZES.items() if size == _SIZES[tensor.dtype]])


def _wider(rng: random.Random, tensors: dict[str, Entry]) -> None:
    """The same shape in another dtype, with numbers that only it can hold."""
    tensor = _some(rng, tensors)
    count = len(tensor.data) // _SIZES[tensor.dtype]
    tensor.dtype = rng.choice(list(_SIZES))
    large = [0, 1, -1, 7, 10**12, -(10**12), 2**62]
    tensor.data = (
        struct.pack(f"<{count}q", *rng.choices(large, k=count))
        if tensor.dtype == "I64"
        else rng.randbytes(count * _SIZES[tensor.dtype])
    )


def _reshaped(rng: random.Random, tensors: dict[str, Entry]) -> None:
    tensor = _some(rng, tensors)
    shape = tensor.shape
    count = math.prod(shape)
    tensor.shape = rng.choice([shape[::-1], [count], [1, *shape], [*shape, 1], [count, 1, 1]])


def _resized(rng: random.Random, tensors: dict[str, Entry]) -> None:
    tensor = _some(rng, tensors)
    shape = [max(0, size + rng.choice([-1, 0, 1, 1])) for size in tensor.shape] if rng.random() < 0.8 else [0]
    count = math.prod(shape)
    tensor.shape = shape
    tensor.data = (tensor.data * 4 + bytes(64))[: count * _SIZES[tensor.dtype]]
    tensor.data += bytes(count * _SIZES[tensor.dtype] - len(tensor.data))


def _dropped(rng: random.Random, tensors: dict[str, Entry]) -> None:
    for _ in range(rng.choice([1, 1, 3, len(tensors) - 1])):
        if len(tensors) > 1:
            del tensors[rng.choice(list(tensors))]


def _renamed(rng: random.Random, tensors: dict[str, Entry]) -> None:
    name = rng.choice(list(tensors))
    tensors[rng.choice([f"{name}.x", "../../x", "", "weight", name.replace("0", "1"), "a" * 3000])] = tensors.pop(name)


def _swapped(rng: random.Random, tensors: dict[str, Entry]) -> None:
    first, second = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def _extra(rng: random.Random, tensors: dict[str, Entry]) -> None:
    name = rng.choice(list(tensors)).rpartition(".")[0]
    data = rng.randbytes(64)
    tensors[f"{name}.{rng.choice(['row_scales', 'bias', 'kernel_codes', 'row_starts', 'source'])}"] = Entry(
        "U8", [64], data
    )


TENSOR_CHANGES: tuple[Callable[[random.Random, dict[str, Entry]], None], ...] = (
    _flipped_bits,
    _flipped_bits,
    _pattern,
    _pattern,
    _noise,
    _extreme_integers,
    _extreme_integers,
    _renamed_dtype,
    _wider,
    _wider,
    _reshaped,
    _resized,
    _dropped,
    _renamed,
    _swapped,
    _extra,
)
