"""Running a model block by block, with exactly the arguments that the model itself would pass."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..anatomy import ModelAnatomy
from ..errors import CalibrationError, NumericalError, UnsupportedModelError
from .activations import Activations

Batch = dict[str, Tensor]
# Rows of logits turned to float32 at once.
LOGIT_ROWS = 128


# Which positions of the batch now in a block are text: (batch · tokens,), or `None` without padding.
_TEXT_POSITIONS: ContextVar[Tensor | None] = ContextVar("text_positions", default=None)


def real_tokens(states: Float[Tensor, "*tokens n"]) -> Float[Tensor, "real n"]:
    """The rows of a hidden state that belong to text, without padding."""
    rows = states.reshape(-1, states.shape[-1])
    positions = _TEXT_POSITIONS.get()
    return rows if positions is None else rows[positions.to(rows.device)]


@contextmanager
def text_positions(batch: Batch) -> Iterator[None]:
    """Within the context, `real_tokens` leaves out the padding of a batch."""
    mask = batch.get("attention_mask")
    plain = mask is None or mask.dim() != 2 or bool(mask.all())
    token = _TEXT_POSITIONS.set(None if plain or mask is None else mask.bool().reshape(-1))
    try:
        yield
    finally:
        _TEXT_POSITIONS.reset(token)


@contextmanager
def replaced_forward(modules: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let every module run `forward(index, *args, **kwargs)` for the time of the context."""
    before = [module.__dict__.get("forward") for module in modules]
    for index, module in enumerate(modules):
        module.forward = lambda *args, _index=index, **kwargs: forward(_index, *args, **kwargs)
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            if original is None:
                del module.forward
            else:
                module.forward = original


class BlockStream:
    """The residual stream of some batches between two blocks.

    The model runs once with its blocks replaced by pass-throughs that record their arguments: masks, rotary tables and
    whatever else a family passes, per block. From there the blocks are called one by one.

    Args:
        anatomy: where the blocks are.
        batches: keyword arguments of the model's forward, one dictionary a batch.
        folder: where hidden states are kept; `None` for memory.
    """

    def __init__(self, anatomy: ModelAnatomy, batches: list[Batch], folder: Path | None = None) -> None:
        if anatomy.record.repeated and batches:
            raise UnsupportedModelError(
                f"{type(anatomy.model).__name__} runs every block several times, and calibration goes through each "
                "once. Choose a method or option that needs no data."
            )
        self.anatomy = anatomy
        self.batches = batches
        self.hidden = Activations(folder)
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        blocks = [anatomy.block(index) for index in range(len(anatomy))]
        model = anatomy.model.base_model
        for batch in batches:
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((), {})] * len(blocks)
            entry: list[Tensor] = []

            def record(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                calls[index] = (args, kwargs)  # noqa: B023 - used within the same turn of the loop
                if not entry:  # noqa: B023
                    entry.append(hidden)  # noqa: B023
                return hidden

            def entrance(index: int, *args: Any, **kwargs: Any) -> Tensor:
                if "hidden_states" in kwargs:
                    hidden = kwargs.pop("hidden_states")
                    return record(index, hidden, *args, **kwargs)
                return record(index, *args, **kwargs)

            with torch.no_grad(), replaced_forward(blocks, entrance):
                model(**model_inputs(model, batch))
            self.hidden.append(entry[0])
            self._arguments.append(calls)

    def __len__(self) -> int:
        return len(self.batches)

    def copy(self) -> BlockStream:
        """A stream at the same place with the same arguments, to be moved on its own."""
        other = object.__new__(BlockStream)
        other.anatomy, other.batches = self.anatomy, self.batches
        other.hidden, other._arguments = self.hidden.copy(), self._arguments
        return other

    def by_sequence(self) -> BlockStream:
        """The same place, every sequence (or image) a batch of its own."""
        other = object.__new__(BlockStream)
        other.anatomy, other.batches, other._arguments = self.anatomy, [], []
        other.hidden = Activations(self.hidden.folder)
        for batch, hidden, calls in zip(self.batches, self.hidden, self._arguments, strict=True):
            for row in range(len(hidden)):
                rows = slice(row, row + 1)
                row_of = partial(_row_of, size=len(hidden), rows=rows)
                other.batches.append(_rows(batch, rows))
                other.hidden.append(hidden[rows])
                other._arguments.append(tree_map(row_of, calls))
        return other

    def arguments(self, index: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model passes to block `index` beside the hidden states of a batch."""
        return self._arguments[batch][index]

    def run(self, index: int, batch: int) -> Float[Tensor, "batch *place d"]:
        """Block `index` on the present hidden states of a batch; the stream itself does not move."""
        args, kwargs = self._arguments[batch][index]
        with torch.no_grad(), self.text_positions(batch):
            output = self.anatomy.block(index)(self.hidden[batch], *args, **kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def text_positions(self, batch: int) -> AbstractContextManager[None]:
        """Within the context, `real_tokens` leaves out the padding of a batch."""
        return text_positions(self.batches[batch])

    def advance(self, index: int, check: bool = True) -> None:
        """Move every batch through block `index`.

        Raises:
            NumericalError: non-finite activations, with the name of the block, unless they were checked before.
        """
        for batch in range(len(self)):
            output = self.run(index, batch)
            self.hidden[batch] = (
                require_finite(output, f"output of {self.anatomy.block_paths[index]!r}") if check else output
            )

    def final_loss(self) -> float:
        """What the model makes of the hidden states after the last block: mean negative log-likelihood a token.

        The model's own final norm and head run on them, sequence by sequence, so that a family's extras (softcap,
        logit scale) are kept.
        """
        blocks = [self.anatomy.block(index) for index in range(len(self.anatomy))]
        model, total, count = self.anatomy.model, 0.0, 0
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            for row in range(len(hidden)):
                final = hidden[row : row + 1]
                single = _rows(batch, slice(row, row + 1))
                with torch.no_grad(), replaced_forward(blocks, lambda *_, _final=final, **__: _final):
                    logits = model(**model_inputs(model, single)).logits[0, :-1]
                targets = single["input_ids"][0, 1:].to(logits.device)
                mask = single.get("attention_mask")
                mask = mask[0, 1:].bool() if mask is not None and mask.dim() == 2 else None
                for start in range(0, len(targets), LOGIT_ROWS):
                    rows = slice(start, start + LOGIT_ROWS)
                    losses = nn.functional.cross_entropy(
                        logits[rows].float(), targets[rows], reduction="none"
                    ).double()
                    if mask is not None:
                        losses = losses[mask[rows].to(losses.device)]
                    total, count = total + float(losses.sum()), count + losses.numel()
        if count == 0:
            raise CalibrationError("there is no held-out token to measure a loss on; give more text.")
        return total / count


def run_until(model: nn.Module, batches: list[Batch], path: str, tokens: int) -> None:
    """Run a model on its first `tokens` tokens for the sake of hooks on the module at `path`, whose own work is left
    out: it hands on its input."""
    for batch in take_tokens(batches, tokens):
        with torch.no_grad(), text_positions(batch), replaced_forward([model.get_submodule(path)], lambda _, x: x):
            model(**model_inputs(model, batch))


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The part of a batch that `model` takes, on its device, without a cache."""
    known = inspect.signature(model.forward).parameters
    # Blocks that are offloaded are on the meta device between their turns.
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
    dtype: Any = model.dtype
    inputs: dict[str, Any] = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
        if name in known and name != "labels"
    }
    return {**inputs, "use_cache": False} if "use_cache" in known else inputs


def next_token_labels(batch: Batch) -> Tensor | None:
    """The tokens of a batch as labels for a causal language model, padding left out; `None` without tokens."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    return ids if ids is None or mask is None else ids.masked_fill(mask == 0, -100)


@contextmanager
def only_these_train(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Within the context gradients are kept for some parameters alone, or for none."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)


def require_finite(hidden: Tensor, what: str) -> Tensor:
    if not torch.isfinite(hidden).all():
        raise NumericalError(
            f"non-finite values in the {what}. Check the checkpoint's weights, or load it in float32 or bfloat16 "
            "(float16 overflows on many models)."
        )
    return hidden


def _rows(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch; tensors that all rows share, such as position ids of shape (1, tokens), stay whole."""
    size = max(len(tensor) for tensor in batch.values())
    return {name: tensor[rows] if len(tensor) == size else tensor for name, tensor in batch.items()}


def _row_of(value: Any, size: int, rows: slice) -> Any:
    """Rows of a tensor that has one a sequence; anything else as it is."""
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value


def every_nth(batches: list[Batch], first: int, n: int) -> list[Batch]:
    """Of all sequences, counted through the batches, number `first` and every n-th after it. Batches get smaller; one
    without a sequence is left out."""
    taken, seen = list[Batch](), 0
    for batch in batches:
        start = (first - seen) % n
        size = max(len(tensor) for tensor in batch.values())
        if start < size:
            taken.append(_rows(batch, slice(start, None, n)))
        seen += size
    return taken


def take_tokens(batches: list[Batch], tokens: int) -> list[Batch]:
    """The first batches, until they hold `tokens` positions; the last one is cut to whole sequences."""
    taken: list[Batch] = []
    for batch in batches:
        first = max(batch.values(), key=len)
        length = first.shape[1] if first.dim() > 1 else 1
        rows = min(len(first), max(-(-tokens // length), 1))
        taken.append(_rows(batch, slice(0, rows)))
        tokens -= rows * length
        if tokens <= 0:
            break
    return taken
