"""Which files of a folder are the model's."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

# What turns texts and images into a model's inputs.
PROCESSING = (
    "tokenizer*.json",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
WEIGHTS = ("*.safetensors", "*.safetensors.index*.json")
_MODEL = (*WEIGHTS, "config.json", "generation_config.json")


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that one of the patterns takes, sorted; a pattern without a slash takes none in a folder."""
    return sorted(
        name
        for name in names
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
    )


def names_in(folder: Path) -> list[str]:
    """Files of a folder and of its folders, with forward slashes."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def model_files(folder: Path, extras: Iterable[str]) -> list[str]:
    """What belongs to a saved model: weights, configuration, what processes its inputs, and `extras`.

    Anything else in the folder, such as data or a training's state, is not for the Hub.
    """
    return matching(names_in(folder), (*_MODEL, *PROCESSING, *extras))
