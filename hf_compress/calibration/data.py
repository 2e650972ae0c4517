"""Calibration data: from a `CalibrationConfig` to batches that a model takes as they are."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ..errors import CalibrationError
from .configuration import CalibrationConfig
from .units import Access, Batch, Request, Unit, read_units


@dataclass(frozen=True)
class CalibrationData:
    """
    Batches to calibrate on, and others kept apart.

    Args:
        batches (`list[dict[str, torch.Tensor]]`):
            CPU tensors ready for `model(**batch)`. For images what the image processor
            makes of them (`pixel_values`); for texts and token ids only `input_ids` of shape
            `(batch_size, sequence_length)` and type int64, without padding.
        held_out (`list[dict[str, torch.Tensor]]`):
            The same, for choices that must not be made on the calibration data; may be empty.
        num_tokens (`int`):
            Tokens in `batches` (by `attention_mask`, else `input_ids`; the number of examples if there is neither).
        num_held_out_tokens (`int`):
            Tokens in `held_out`, counted likewise.
        fingerprint (`str`):
            SHA-256 of all tensors with their names, shapes and types, in order.
        description (`dict`):
            Origin and amount of the data in plain JSON, without local paths.
    """

    batches: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    num_tokens: int
    num_held_out_tokens: int
    fingerprint: str
    description: dict[str, Any]


def load_calibration_data(
    config: CalibrationConfig,
    processing_class: Any = None,
    *,
    vocab_size: int | None = None,
    max_length: int | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> CalibrationData:
    """
    Read, tokenise, pack, choose and batch the data that a configuration names.

    The same configuration, data and tokenizer give the same batches.

    Args:
        config (`CalibrationConfig`):
            What to read and how much of it.
        processing_class (`PreTrainedTokenizerBase`, `BaseImageProcessor` or `ProcessorMixin`, *optional*):
            Tokenises texts, or makes tensors of images. Not needed for token ids or with a `data_collator`.
        vocab_size (`int`, *optional*):
            Token ids from here on are refused.
        max_length (`int`, *optional*):
            Longer sequences are refused: the positions that the model has.
        token (`str` or `bool`, *optional*):
            For private and gated datasets.
        cache_dir (`str` or `Path`, *optional*):
            Where `datasets` keeps its copies.

    Returns:
        `CalibrationData`

    Raises:
        `CalibrationError`: for data that are missing, unreadable, empty, too long or outside the vocabulary, and for
            texts or images without a `processing_class` that reads them.
    """
    access = Access(processing_class, max_length, token, cache_dir)
    units = read_units(config, Request.of(config), access)
    batches = _into_batches(units.calibration, config.batch_size)
    held_out = _into_batches(units.held_out, config.batch_size)
    for batch in batches + held_out:
        _check_token_ids(batch.tensors, vocab_size, max_length)
    return CalibrationData(
        batches=[batch.tensors for batch in batches],
        held_out=[batch.tensors for batch in held_out],
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_held_out_tokens=sum(batch.num_tokens for batch in held_out),
        fingerprint=_fingerprint({"batches": batches, "held_out": held_out}),
        description=units.description,
    )


def warn_if_few_tokens(num_tokens: int, largest_dimension: int) -> None:
    """Warn when fewer tokens were seen than the largest Gram matrix has rows: it is singular then."""
    if num_tokens < largest_dimension:
        warnings.warn(
            f"{num_tokens} calibration tokens for a Gram matrix of dimension {largest_dimension}: its rank is at most "
            f"{num_tokens}, so the result depends on the damping. Raise `num_samples` or `sequence_length`.",
            stacklevel=2,
        )


def _into_batches(units: list[Unit], batch_size: int) -> list[Batch]:
    """Stack sequences of equal length in the order they come; collated batches pass as they are."""
    batches: list[Batch] = []
    waiting: dict[int, list[Tensor]] = {}

    def flush(length: int) -> None:
        input_ids: Int64[Tensor, "batch length"] = torch.stack(waiting.pop(length))
        batches.append(Batch({"input_ids": input_ids}, input_ids.numel()))

    for unit in units:
        if isinstance(unit, Batch):
            batches.append(unit)
            continue
        group = waiting.setdefault(unit.numel(), [])
        group.append(unit)
        if len(group) == batch_size:
            flush(unit.numel())
    for length in list(waiting):
        flush(length)
    return batches


def _check_token_ids(tensors: dict[str, Tensor], vocab_size: int | None, max_length: int | None) -> None:
    input_ids = tensors.get("input_ids")
    if input_ids is None or not input_ids.numel():
        return
    smallest, largest = int(input_ids.min()), int(input_ids.max())
    if vocab_size is not None and (largest >= vocab_size or smallest < 0):
        raise CalibrationError(
            f"token ids run from {smallest} to {largest}, but the vocabulary size of the model is {vocab_size}. "
            "Use the tokenizer of this model."
        )
    if max_length is not None and input_ids.shape[-1] > max_length:
        raise CalibrationError(
            f"a sequence has {input_ids.shape[-1]} tokens, more than the {max_length} positions of the model. "
            "Shorten the sequences."
        )


def _fingerprint(parts: dict[str, list[Batch]]) -> str:
    digest = hashlib.sha256()
    for part, batches in parts.items():
        for number, batch in enumerate(batches):
            for name, tensor in sorted(batch.tensors.items()):
                header = [part, number, name, str(tensor.dtype), list(tensor.shape)]
                digest.update(json.dumps(header).encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
