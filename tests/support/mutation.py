"""Seeded changes to a saved checkpoint: to the JSON of its config, and to the bytes and tensors of its safetensors."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.tensor_mutation import TENSOR_CHANGES, framed, read_tensors, write_tensors

HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31 - 1,
    2**31,
    -(2**63),
    10**12,
    10**400,
    -0.0,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "0",
    "os.system",
    "../../../etc/passwd",
    "/etc/passwd",
    "__class__.__init__",
    "model.base_model.layers.0",
    "model.layers.0.mlp",
    "model.layers.0.mlp.down_proj",
    "model.layers.0.self_attn.q_proj",
    "model.embed_tokens",
    "lm_head",
    "model.norm",
    "<script>alert(1)</script>",
    "<!-- hf_compress: end -->",
    "[x](javascript:alert(1)) ![y](http://127.0.0.1/z)",
    "`; touch hf_compress_was_here; `",
    "\x1b[2J\x07\u202e\ud800\0",
    "a" * 5000,
    ".".join(["base_model"] * 200),
    [],
    {},
    [[]],
    [0, 0],
    {"": ""},
    {"self": 1},
    {"path": "model", "type": "linear", "spec": {}},
]
TYPES = (
    "linear",
    "attention",
    "codebook_linear",
    "codebook_shared_linear",
    "codebook_conv2d",
    "codebook_embedding",
    "codebook_tied_linear",
    "sparse_linear",
    "shared_linear",
    "shared_module",
    "shared_blocks",
    "shared_albert",
    "bnb_linear4bit",
    "bnb_linear8bit",
)


@dataclass(frozen=True)
class Checkpoint:
    """A saved model as the bytes of its two files."""

    config: bytes
    weights: bytes

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        return cls((folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes())

    def write(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(self.config)
        (folder / "model.safetensors").write_bytes(self.weights)


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


# The config: functions of a random generator and a quantization_config, which they change.


def _places(value: Any, limit: int = 4000) -> list[tuple[Any, Any]]:
    """Every container with every one of its keys or indices."""
    found, waiting = [], [value]
    while waiting and len(found) < limit:
        inner = waiting.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            found.append((inner, key))
            waiting.append(inner[key])
    return found


def _in_layout(rng: random.Random, stored: dict[str, Any]) -> tuple[Any, Any]:
    """A place to change: mostly in the layout, of which everything is read."""
    part = stored.get("layout") if rng.random() < 0.8 else stored
    return rng.choice(_places(part if isinstance(part, (list, dict)) and part else stored) or [({"x": 0}, "x")])


def _hostile_value(rng: random.Random, stored: dict[str, Any]) -> None:
    container, key = _in_layout(rng, stored)
    container[key] = copy.deepcopy(rng.choice(HOSTILE))


def _nudged_number(rng: random.Random, stored: dict[str, Any]) -> None:
    places = [(inner, key) for inner, key in _places(stored.get("layout")) if type(inner[key]) in (int, float, bool)]
    container, key = rng.choice(places or [({"x": 0}, "x")])
    value = container[key]
    if abs(value) < 10**300:  # what a float holds
        changes = [value + 1, value - 1, 2 * value, -value, value * 10**9, float(value), str(value), not value]
        container[key] = rng.choice([*changes, [value]])


def _without_key(rng: random.Random, stored: dict[str, Any]) -> None:
    container, key = _in_layout(rng, stored)
    del container[key]


def _with_key(rng: random.Random, stored: dict[str, Any]) -> None:
    objects = [stored, *(inner[key] for inner, key in _places(stored) if isinstance(inner[key], dict))]
    name = rng.choice(["self", "surprise", "__class__", "trust_remote_code", "source", "weight", "out_features"])
    rng.choice(objects)[name] = copy.deepcopy(rng.choice(HOSTILE))


def _layout(stored: dict[str, Any]) -> list[Any]:
    layout = stored.get("layout")
    return layout if isinstance(layout, list) else []


def _entry(rng: random.Random, stored: dict[str, Any]) -> dict[str, Any]:
    entries = [entry for entry in _layout(stored) if isinstance(entry, dict)]
    return rng.choice(entries) if entries else {}


def _other_type(rng: random.Random, stored: dict[str, Any]) -> None:
    _entry(rng, stored)["type"] = rng.choice(TYPES)


def _other_path(rng: random.Random, stored: dict[str, Any]) -> None:
    entry, other = _entry(rng, stored), str(_entry(rng, stored).get("path"))
    parts = other.split(".")
    choices = (other, ".".join(parts[:-1]), f"{other}.{parts[-1]}", f"base_model.{other}", f"{other}.source")
    entry[rng.choice(["path", "path", "source"])] = rng.choice([*choices, other.replace("0", "1"), f"model.{other}"])


def _other_source(rng: random.Random, stored: dict[str, Any]) -> None:
    spec = _entry(rng, stored).get("spec")
    if isinstance(spec, dict):
        paths = [str(_entry(rng, stored).get("path")), "model", "", "model.layers", "model.layers.0", "lm_head"]
        spec["source"] = rng.choice(paths)


def _swapped_specs(rng: random.Random, stored: dict[str, Any]) -> None:
    first, second = _entry(rng, stored), _entry(rng, stored)
    if first and second:
        first["spec"], second["spec"] = second.get("spec"), first.get("spec")
        if rng.random() < 0.5:
            first["type"], second["type"] = second.get("type"), first.get("type")


def _reordered(rng: random.Random, stored: dict[str, Any]) -> None:
    layout = _layout(stored)
    layout.reverse() if rng.random() < 0.5 else rng.shuffle(layout)


def _repeated(rng: random.Random, stored: dict[str, Any]) -> None:
    layout = _layout(stored)
    layout += [copy.deepcopy(_entry(rng, stored)) for _ in range(rng.choice([1, 2, 500]))]


def _deep(rng: random.Random, stored: dict[str, Any]) -> None:
    container, key = rng.choice(_places(stored)) if stored else (stored, "layout")
    container[key] = nested(rng.choice([3, 40, 70, 150, 400]))


def _long_list(rng: random.Random, stored: dict[str, Any]) -> None:
    container, key = _in_layout(rng, stored)
    value = container[key]
    container[key] = [copy.deepcopy(value) if not isinstance(value, (list, dict)) else 0] * rng.choice([10, 3000])


def _version(rng: random.Random, stored: dict[str, Any]) -> None:
    stored["format_version"] = rng.choice([0, -1, 2, 10**30, 1.0, True, "1", None, [1], {}, float("nan")])


def _story(rng: random.Random, stored: dict[str, Any]) -> None:
    """Recipe and provenance, which are shown to people."""
    part = stored.get(rng.choice(["recipe", "provenance"]))
    if isinstance(part, dict) and rng.random() < 0.9:
        places = _places(part)
        container, key = rng.choice(places) if places else (part, "report")
        container[key] = copy.deepcopy(rng.choice(HOSTILE))
    else:
        stored[rng.choice(["recipe", "provenance"])] = copy.deepcopy(rng.choice(HOSTILE))


_CONFIG: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    _hostile_value,
    _hostile_value,
    _hostile_value,
    _nudged_number,
    _nudged_number,
    _without_key,
    _with_key,
    _other_type,
    _other_path,
    _other_source,
    _swapped_specs,
    _reordered,
    _repeated,
    _deep,
    _long_list,
    _version,
    _story,
    _story,
)


# The bytes: functions of a random generator and a file.


def _broken_file(rng: random.Random, file: bytes) -> bytes:
    choice = rng.randrange(7)
    if choice == 0:
        return file[: rng.randrange(len(file))]
    if choice == 1:
        return file + rng.randbytes(rng.choice([1, 8, 1000]))
    if choice == 2:
        return struct.pack("<Q", rng.choice([0, 1, 7, 2**31, 2**62, 2**64 - 1, len(file)])) + file[8:]
    if choice == 3:
        return framed(json.dumps(nested(rng.choice([10, 200, 400]))).encode(), b"")
    changed = bytearray(file)
    # Half of the time at the beginning, where a header is.
    end = len(file) if rng.random() < 0.5 else min(len(file), 4000)
    for _ in range(rng.choice([1, 3, 20])):
        changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def _broken_text(rng: random.Random, file: bytes) -> bytes:
    if rng.random() < 0.2:
        return file[: rng.randrange(len(file))]
    changed, begin = bytearray(file), max(file.find(b'"quantization_config"'), 0)
    for _ in range(rng.choice([1, 3])):
        changed[rng.randrange(begin, len(file))] = rng.choice(b'0123456789,:.-"[]{}eE xna\xff\x00')
    return bytes(changed)


def _broken_offsets(rng: random.Random, file: bytes) -> bytes:
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    header[name][rng.choice(["data_offsets", "shape", "dtype"])] = rng.choice(
        [[0, 4], [4, 0], [0, 2**40], [-1, 3], [2**63, 2], [0], [], None, "F32", "F4", [[1]], [2**32, 2**32, 2**32]]
    )
    return framed(json.dumps(header).encode(), file[8 + length :])


def mutate(checkpoint: Checkpoint, seed: str) -> Checkpoint:
    """A checkpoint with one to three changes, the same for the same seed."""
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.06:
        return replace(checkpoint, weights=_broken_file(rng, checkpoint.weights))
    if kind < 0.09:
        return replace(checkpoint, weights=_broken_offsets(rng, checkpoint.weights))
    if kind < 0.13:
        return replace(checkpoint, config=_broken_text(rng, checkpoint.config))
    if kind < 0.6:
        config = json.loads(checkpoint.config)
        for _ in range(rng.choice([1, 1, 2, 3])):
            rng.choice(_CONFIG)(rng, config["quantization_config"])
        checkpoint = replace(checkpoint, config=json.dumps(config).encode())
    if kind > 0.55:
        tensors = read_tensors(checkpoint.weights)
        for _ in range(rng.choice([1, 1, 2, 3])):
            rng.choice(TENSOR_CHANGES)(rng, tensors)
        checkpoint = replace(checkpoint, weights=write_tensors(tensors))
    return checkpoint
