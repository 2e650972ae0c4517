"""Sequences and collated batches drawn from one source or from a mixture of sources."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ..errors import CalibrationError
from ..seeds import seeded
from .configuration import CalibrationConfig
from .images import find_images, image_collator
from .sources import describe_source, guarded, open_rows, read_sentences, read_texts, title

# Reading stops at this multiple of the tokens wanted: enough to choose from, little enough to tokenise.
_OVERSAMPLING = 4
_CHARACTERS_PER_TOKEN = 4
_PIECE_CHARACTERS = (2**16, 2**20)  # bounds on what is tokenised in one call


@dataclass(frozen=True)
class Batch:
    """A batch as a collator made it, with what can only be counted beside its examples."""

    tensors: dict[str, Tensor]
    num_tokens: int


Unit = Tensor | Batch  # a sequence of token ids of shape (length,), or a collated batch


@dataclass(frozen=True)
class Units:
    """What was drawn, and its description for a model card."""

    calibration: list[Unit]
    held_out: list[Unit]
    description: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """How much to take from a source, and how: its own numbers, or those that a mixture gives it."""

    num_samples: int
    num_held_out: int
    sequence_length: int
    batch_size: int
    seed: int

    @classmethod
    def of(cls, config: CalibrationConfig) -> Request:
        return cls(config.num_samples, config.num_held_out, config.sequence_length, config.batch_size, config.seed)


@dataclass(frozen=True)
class Access:
    """What is needed to read: the arguments of `load_calibration_data` that no source changes."""

    processing_class: Any
    max_length: int | None
    token: str | bool | None
    cache_dir: str | Path | None


def read_units(config: CalibrationConfig, request: Request, access: Access) -> Units:
    """Read what is requested from the source, or the sources of the mixture, that `config` names.

    Raises:
        `CalibrationError`: for data that are missing, unreadable, empty or too long, and for texts that cannot be
            tokenised.
    """
    if config.kind == "mixture":
        return _read_mixture(config, request, access)
    places: dict[str, Any] = {"token": access.token, "cache_dir": access.cache_dir}
    if config.data_collator is not None:
        return _read_examples(config, open_rows(config, **places), config.data_collator, request, "examples")
    if config.kind == "tokens":
        return _read_token_ids(config, request)
    images = find_images(config, access.processing_class, **places)
    if images is not None:
        return _read_examples(config, images, image_collator(access.processing_class), request, "images")
    if isinstance(config.text_column, tuple):
        return _read_sentences(config, request, access)
    return _read_windows(config, request, access)


def _read_windows(config: CalibrationConfig, request: Request, access: Access) -> Units:
    length = request.sequence_length
    if access.max_length is not None and length > access.max_length:
        raise CalibrationError(
            f"sequence_length={length} exceeds the {access.max_length} positions of the model; "
            f"set `sequence_length={access.max_length}` or less."
        )
    stream = _token_stream(config, request, access)
    if len(stream) < 2:
        raise CalibrationError(
            f"{title(config)} gives {len(stream)} tokens; at least 2 are needed to calibrate on. "
            "Give a dataset with text in it."
        )
    windows = list(stream[: len(stream) // length * length].view(-1, length)) or [stream]
    kept, apart = _choose(len(windows), request)
    if len(stream) < length:
        warnings.warn(
            f"{title(config)} gives {len(stream)} tokens, fewer than sequence_length={length}; calibrating on one "
            f"sequence of {len(stream)} tokens.",
            stacklevel=2,
        )
    else:
        _warn_if_scarce(config, request, len(windows), len(kept), len(apart), f"sequences of {length} tokens")
    description = _describe(config, request, len(kept), len(apart)) | {"sequence_length": windows[0].numel()}
    return Units([windows[i] for i in kept], [windows[i] for i in apart], description)


def _token_stream(config: CalibrationConfig, request: Request, access: Access) -> Int64[Tensor, " tokens"]:
    tokenizer = _tokenizer(config, access)
    wanted = _OVERSAMPLING * (request.num_samples + request.num_held_out) * request.sequence_length
    low, high = _PIECE_CHARACTERS
    pieces = read_texts(
        config,
        access.processing_class,
        piece_characters=min(max(wanted * _CHARACTERS_PER_TOKEN, low), high),
        seed=request.seed,
        token=access.token,
        cache_dir=access.cache_dir,
    )
    ids: list[int] = []
    for piece in pieces:
        if not piece.strip():
            continue
        # verbose=False: a stream longer than the model's context is meant to be, and is cut below.
        encoded = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids.extend(encoded["input_ids"])
        if len(ids) >= wanted:
            break
    return torch.tensor(ids, dtype=torch.int64)


def _read_sentences(config: CalibrationConfig, request: Request, access: Access) -> Units:
    tokenizer = _tokenizer(config, access)
    wanted = request.num_samples + request.num_held_out
    sentences = read_sentences(
        config, wanted=wanted, seed=request.seed, token=access.token, cache_dir=access.cache_dir
    )
    limits = (request.sequence_length, access.max_length, getattr(tokenizer, "model_max_length", None))
    cut = {"truncation": True, "max_length": min(limit for limit in limits if limit is not None)}
    encoded = tokenizer(sentences, return_attention_mask=False, **cut)["input_ids"] if sentences else []
    # Batches are of sequences of equal length, so that no padding is measured.
    sequences = [torch.tensor(ids, dtype=torch.int64) for ids in encoded if ids]
    if not sequences:
        raise CalibrationError(f"{title(config)} holds no texts in the columns {list(config.text_column or ())}.")
    num_kept, num_apart = _share(len(sequences), request)
    _warn_if_scarce(config, request, len(sequences), num_kept, num_apart, "different texts")
    longest = max(sequence.numel() for sequence in sequences)
    description = _describe(config, request, num_kept, num_apart) | {"sequence_length": longest}
    return Units([*sequences[:num_kept]], [*sequences[num_kept : num_kept + num_apart]], description)


def _tokenizer(config: CalibrationConfig, access: Access) -> Any:
    tokenizer = getattr(access.processing_class, "tokenizer", access.processing_class)
    if hasattr(tokenizer, "encode"):
        return tokenizer
    found = "no processing_class" if tokenizer is None else f"{type(tokenizer).__name__}, which cannot tokenise"
    raise CalibrationError(
        f"{title(config)} must be tokenised, and there is {found}. Pass `processing_class=tokenizer`, an image "
        "processor if the dataset holds images, or a `data_collator` if it holds neither."
    )


def _read_token_ids(config: CalibrationConfig, request: Request) -> Units:
    sequences = [row.detach().to(device="cpu", dtype=torch.int64) for row in config.dataset]
    sequences = [row for row in sequences if row.numel()]
    if not sequences:
        raise CalibrationError("`dataset` holds no token ids; give at least one sequence.")
    # Whoever brings sequences knows how many there are: fewer than `num_samples` is no reason to warn.
    kept, apart = _choose(len(sequences), request)
    longest = max(sequences[i].numel() for i in kept + apart)
    description = _describe(config, request, len(kept), len(apart)) | {"sequence_length": longest}
    return Units([sequences[i] for i in kept], [sequences[i] for i in apart], description)


def _read_examples(
    config: CalibrationConfig, rows: Any, data_collator: Callable[..., Any], request: Request, what: str
) -> Units:
    # torch's IterableDataset has a __getitem__ that only raises.
    streamed = isinstance(rows, torch.utils.data.IterableDataset)
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not streamed:
        available = len(rows)
        kept, apart = _choose(available, request)
        examples = list(guarded(config, (rows[i] for i in kept + apart)))
    else:
        wanted = request.num_samples + request.num_held_out
        examples = list(islice(guarded(config, rows), wanted))
        available = len(examples)
        num_kept, num_apart = _share(available, request)
        kept, apart = list(range(num_kept)), list(range(num_kept, num_kept + num_apart))
    if not examples:
        raise CalibrationError(f"{title(config)} holds no {what}; there is nothing to calibrate on.")
    _warn_if_scarce(config, request, available, len(kept), len(apart), what)
    # Collators that mask at random draw from torch; the caller's random state is not ours to move.
    with seeded(request.seed):
        calibration = _collate(data_collator, examples[: len(kept)], request.batch_size)
        held_out = _collate(data_collator, examples[len(kept) : len(kept) + len(apart)], request.batch_size)
    return Units(calibration, held_out, _describe(config, request, len(kept), len(apart)))


def _collate(data_collator: Callable[..., Any], examples: list[Any], batch_size: int) -> list[Unit]:
    units: list[Unit] = []
    for start in range(0, len(examples), batch_size):
        group = examples[start : start + batch_size]
        batch = data_collator(group)
        if not isinstance(batch, Mapping) or not batch:
            raise CalibrationError(
                f"`data_collator` returned {type(batch).__name__} {'' if batch else 'without entries '}for a list of "
                f"{len(group)} examples; expected a dictionary of tensors for model(**batch)."
            )
        wrong = {name: type(value).__name__ for name, value in batch.items() if not isinstance(value, Tensor)}
        if wrong:
            raise CalibrationError(
                f"`data_collator` returned values that are not tensors: {wrong}. Leave them out or convert them."
            )
        tensors = {str(name): value.detach().cpu() for name, value in batch.items()}
        units.append(Batch(tensors, _count_tokens(tensors, num_examples=len(group))))
    return units


def _read_mixture(config: CalibrationConfig, request: Request, access: Access) -> Units:
    weights = config.weights or (1.0,) * len(config.dataset)
    shares = zip(_apportion(request.num_samples, weights), _apportion(request.num_held_out, weights), strict=True)
    parts: list[Units] = []
    for number, (part, (num_samples, num_held_out)) in enumerate(zip(config.dataset, shares, strict=True)):
        if num_samples + num_held_out:
            # Seeds differ, so that a source named twice gives two choices.
            share = Request(
                num_samples, num_held_out, request.sequence_length, request.batch_size, request.seed + number
            )
            parts.append(read_units(part, share, access))
    description = _describe(
        config,
        request,
        sum(part.description["num_samples"] for part in parts),
        sum(part.description["num_held_out"] for part in parts),
    )
    if lengths := [part.description["sequence_length"] for part in parts if "sequence_length" in part.description]:
        description["sequence_length"] = max(lengths)
    description["parts"] = [part.description for part in parts]
    return Units(
        _interleave([part.calibration for part in parts]), _interleave([part.held_out for part in parts]), description
    )


def _choose(available: int, request: Request) -> tuple[list[int], list[int]]:
    """Draw the indices to calibrate on and those kept apart; each set in order, the two disjoint."""
    num_kept, num_apart = _share(available, request)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(request.seed)).tolist()
    return sorted(order[:num_kept]), sorted(order[num_kept : num_kept + num_apart])


def _share(available: int, request: Request) -> tuple[int, int]:
    """How many to calibrate on and how many to keep apart: of too few, a quarter is kept apart at most."""
    if available >= request.num_samples + request.num_held_out:
        return request.num_samples, request.num_held_out
    num_apart = min(request.num_held_out, max(1, available // 4)) if available > 1 else 0
    return min(request.num_samples, available - num_apart), num_apart


def _warn_if_scarce(
    config: CalibrationConfig, request: Request, available: int, num_kept: int, num_apart: int, what: str
) -> None:
    wanted = request.num_samples + request.num_held_out
    if available < wanted:
        warnings.warn(
            f"{title(config)} gives {available} {what}, but {wanted} are wanted (num_samples={request.num_samples} "
            f"and num_held_out={request.num_held_out}); calibrating on {num_kept} and keeping {num_apart} apart.",
            stacklevel=2,
        )


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` by weight with the largest-remainder method; the shares sum to `total`."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _interleave(parts: list[list[Unit]]) -> list[Unit]:
    """Spread every part evenly over the whole; ties go to the earlier part."""
    placed = [
        ((position + 0.5) / len(part), number, position)
        for number, part in enumerate(parts)
        for position in range(len(part))
    ]
    return [parts[number][position] for _, number, position in sorted(placed)]


def _count_tokens(tensors: dict[str, Tensor], *, num_examples: int) -> int:
    mask, input_ids = tensors.get("attention_mask"), tensors.get("input_ids")
    # A mask of more dimensions says who sees whom, not which tokens are there.
    if mask is not None and mask.ndim == 2:
        return int(mask.count_nonzero())
    return input_ids.numel() if input_ids is not None else num_examples


def _describe(config: CalibrationConfig, request: Request, num_samples: int, num_held_out: int) -> dict[str, Any]:
    return describe_source(config) | {"num_samples": num_samples, "num_held_out": num_held_out, "seed": request.seed}
