"""What a search is given: the evaluation text, and the working directory of an earlier call."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.hub import cached_file, extract_commit_hash

from ..calibration.configuration import CalibrationConfig
from ..calibration.data import CalibrationData, load_calibration_data
from ..calibration.sources import read_texts
from ..engine.distributed import several_processes
from ..errors import CalibrationError, ConfigurationError, ResumeError
from ..evaluation.perplexity import as_token_ids
from ..output import write_text
from .laboratory import overlap

FEWEST = 256
# Bytes at both ends of a weight file that tell it from another.
SAMPLE = 2**20


def require_one_process() -> None:
    """Raise `ConfigurationError` under a launcher: every process would search on its own."""
    if several_processes():
        raise ConfigurationError(
            "a search is the work of one process, and several were started. Search without a launcher; the recipe "
            "that it finds runs under `accelerate launch`."
        )


def evaluation_ids(evaluation: Any, tokenizer: Any) -> Int[Tensor, "tokens"]:
    """Token ids of the evaluation text.

    Raises:
        CalibrationError: a file that is not there, something that is no text, or too few tokens.
    """
    if isinstance(evaluation, os.PathLike) or _looks_like_a_file(evaluation):
        path = Path(evaluation)
        if not path.is_file():
            raise CalibrationError(f"the evaluation text {str(path)!r} is no file.")
        evaluation = path.read_text(encoding="utf-8", errors="replace")
    if isinstance(evaluation, CalibrationConfig):
        if evaluation.data_collator is not None or evaluation.kind in ("tokens", "mixture"):
            raise CalibrationError("as evaluation a CalibrationConfig must name texts; give token ids as a tensor.")
        evaluation = "".join(read_texts(evaluation, tokenizer, piece_characters=2**62, seed=0))
    if not isinstance(evaluation, (str, list, tuple, Tensor)):
        raise CalibrationError(
            f"the evaluation is a {type(evaluation).__name__}; expected a text, texts, token ids, the path of a text "
            "file or a CalibrationConfig."
        )
    ids = torch.as_tensor(as_token_ids(evaluation, tokenizer)).flatten()
    if len(ids) < FEWEST:
        raise CalibrationError(f"the evaluation text has {len(ids)} tokens; a perplexity needs {FEWEST} or more.")
    return ids


def _looks_like_a_file(evaluation: Any) -> bool:
    """A short line that is a file, or is named like one."""
    if not isinstance(evaluation, str) or len(evaluation) > 512 or "\n" in evaluation or not evaluation.strip():
        return False
    try:
        return Path(evaluation).is_file() or (" " not in evaluation and bool(Path(evaluation).suffix))
    except OSError:  # longer than a name may be
        return False


def digest(value: Any) -> str:
    """Of plain JSON, or of what prints itself."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights_digest(name: str, revision: str | None = None) -> list[Any]:
    """Tells a folder's weights from others by the sizes and ends of their files; a Hub id by the commit that its
    `revision` has led to in the cache."""
    found: list[Any] = []
    if not os.path.isdir(name):
        config = cached_file(name, "config.json", revision=revision, local_files_only=True)
        return [extract_commit_hash(config, None)]
    for path in sorted(path for path in Path(name).iterdir() if path.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        with path.open("rb") as file:
            own = hashlib.sha256(file.read(SAMPLE))
            file.seek(max(size - SAMPLE, 0))
            own.update(file.read(SAMPLE))
        found.append([path.name, size, own.hexdigest()])
    return found


def check_directory(directory: Path, fingerprint: dict[str, str]) -> None:
    """Make a working directory, or go on with it.

    Raises:
        ResumeError: it is a file, it is damaged, or it belongs to another search.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ResumeError(f"the working directory {str(directory)!r} cannot be made: there is a file.") from error
    file = directory / "search.json"
    if not file.exists():
        write_text(file, json.dumps(fingerprint))
        return
    try:
        before = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ResumeError(f"{str(file)!r} is damaged ({error}). Name another working directory.") from error
    different = sorted(name for name in fingerprint if before.get(name) != fingerprint[name])
    if different:
        raise ResumeError(
            f"the working directory {str(directory)!r} belongs to a search with another {', '.join(different)}. "
            "Name another folder, or remove this one."
        )


def sources_of(name: str, own: dict[str, Any], processing_class: Any) -> tuple[Any, Any]:
    """The model's config and tokenizer. Raises `ConfigurationError` where there are none."""
    try:
        config = AutoConfig.from_pretrained(name, **own)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(name, **own)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"config and tokenizer of {name!r} cannot be loaded: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigurationError(f"{name!r} is quantized or compressed already; search with the dense original.")
    return config, processing_class


def calibration_data(calibration: CalibrationConfig, token_ids: torch.Tensor, tokenizer: Any) -> CalibrationData:
    """Raises `CalibrationError` for data that are no text, or stand in the evaluation text."""
    data = load_calibration_data(calibration, tokenizer)
    for batch in [*data.batches, *data.held_out]:
        if "input_ids" not in batch:
            raise CalibrationError("auto() measures perplexity: the calibration data must be texts or token ids.")
        if any(overlap(row, token_ids) for row in batch["input_ids"]):
            raise CalibrationError(
                "a stretch of the calibration text stands in the evaluation text as well. Recipes would be judged on "
                "what they were fitted to: give another evaluation text."
            )
    return data
