"""Recipes as YAML files, with the line of whatever is wrong in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigurationError


def load_recipe(path: Path) -> tuple[Any, Any]:
    """The recipe in a file, and its calibration data if it names any.

    The file has `stages`, a list of methods with their fields, or one method's fields; and, optionally, `calibration`,
    the fields of a `CalibrationConfig`.

    Raises:
        ConfigurationError: no such file, no YAML, unknown fields or values; the message has the line.
    """
    from ..calibration.configuration import CalibrationConfig
    from ..configuration import CompressionConfig, method_config_from_dict

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the recipe {str(path)!r} cannot be read: {error}") from error
    try:
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(f"{path}{where}: no YAML ({getattr(error, 'problem', error)}).") from error
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: expected fields such as `method: codebook`, or a list of `stages`.")
    calibration = None
    if "calibration" in data:
        own = data.pop("calibration")
        calibration = _built(path, _child(node, "calibration"), own, lambda fields: CalibrationConfig(**fields))
    if "stages" not in data:
        return CompressionConfig(stages=(_built(path, node, data, method_config_from_dict),)), calibration
    unknown = sorted(set(data) - {"stages"})
    if unknown:
        raise ConfigurationError(
            f"{path}, line {_line(node, unknown[0])}: unknown field `{unknown[0]}` beside `stages` and `calibration`."
        )
    if not isinstance(data["stages"], list) or not data["stages"]:
        raise ConfigurationError(f"{path}, line {_line(node, 'stages')}: `stages` must be a list of methods.")
    nodes = _child(node, "stages").value
    stages = [
        _built(path, stage, fields, method_config_from_dict)
        for stage, fields in zip(nodes, data["stages"], strict=True)
    ]
    return CompressionConfig(stages=tuple(stages)), calibration


def _built(path: Path, node: Any, fields: Any, build: Any) -> Any:
    if not isinstance(fields, dict):
        raise ConfigurationError(f"{path}, line {node.start_mark.line + 1}: expected fields, found {fields!r}.")
    try:
        return build(dict(fields))
    except ConfigurationError as error:
        # The first field of this part that the message names.
        named = [name for name in re.findall(r"[`']([\w.]+)[`']", str(error)) if name.split(".")[0] in fields]
        line = _line(node, named[0].split(".")[0]) if named else node.start_mark.line + 1
        raise ConfigurationError(f"{path}, line {line}: {error}") from None


def _child(node: Any, name: str) -> Any:
    return next(value for key, value in node.value if key.value == name)


def _line(node: Any, name: str) -> int:
    found: int = next((key.start_mark.line for key, _ in node.value if key.value == name), node.start_mark.line)
    return found + 1
