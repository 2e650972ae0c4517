"""Running a model block by block, with exactly the arguments that the model itself would pass."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..anatomy import ModelAnatomy, text_config
from ..errors import CalibrationError, CompressionError, NumericalError, UnsupportedModelError
from .activations import Activations, filed, map_once, read

Batch = dict[str, Tensor]
# Arguments of a block beside the hidden states: positional, and by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]
CACHES = (Cache, EncoderDecoderCache)
# Numbers of an image that make up a position: a usual patch.
IMAGE_POSITION = 3 * 16 * 16


# Which positions of the batch now in a block are text, (batch · tokens,), by their number: encoder and decoder have
# sequences of their own. None for sequences without padding.
_TEXT_POSITIONS: ContextVar[Mapping[int, Tensor]] = ContextVar("text_positions", default=MappingProxyType({}))


def real_tokens(states: Shaped[Tensor, "*tokens n"]) -> Shaped[Tensor, "real n"]:
    """The rows of a hidden state, or of what goes with its tokens, that belong to text: without padding."""
    rows = states.reshape(-1, states.shape[-1])
    positions = _TEXT_POSITIONS.get().get(len(rows))
    return rows if positions is None else rows[positions.to(rows.device)]


@contextmanager
def text_positions(batch: Batch) -> Iterator[None]:
    """Within the context, `real_tokens` leaves out the padding of a batch."""
    found: dict[int, Tensor] = {}
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name)
        if mask is not None and mask.dim() == 2:
            positions = mask.bool().reshape(-1)
            # As many positions in both: what is text in either counts.
            found[len(positions)] = positions | found.get(len(positions), positions)
    token = _TEXT_POSITIONS.set({size: positions for size, positions in found.items() if not positions.all()})
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


def run_calls(block: nn.Module, hidden: Float[Tensor, "batch *place d"], calls: list[Call]) -> Tensor:
    """The hidden states after a block has run once for every call."""
    for args, kwargs in calls:
        output = block(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


class BlockStream:
    """The residual stream of some batches between two blocks.

    The model runs once with its blocks replaced by pass-throughs that record their arguments: masks, rotary tables and
    whatever else a family passes, per block. From there the blocks are called one by one. A model with several stacks
    of blocks (encoder and decoder) runs so once for each, when the stream comes to its first block; the stacks before
    it then hand out what the stream has made of them. What lies outside the blocks runs as it is by then.

    Args:
        anatomy: where the blocks are.
        batches: keyword arguments of the model's forward, one dictionary a batch.
        folder: where hidden states are kept; `None` for memory.
        resident: the context in which a block is in memory; by default all are.
    """

    def __init__(
        self,
        anatomy: ModelAnatomy,
        batches: list[Batch],
        folder: Path | None = None,
        resident: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.anatomy = anatomy
        self._resident = resident or (lambda _: nullcontext())
        self.batches = [complete(anatomy.model, batch) for batch in batches]
        self.hidden = Activations(folder)
        # Of the stack that the stream is in: what its blocks are called with, by the batch; large tensors in files.
        self._arguments: list[Any] = []
        self._stack = 0
        # The block that ran last, and what the stacks before have put out.
        self._last = -1
        self._finals: list[Activations] = []
        for batch in range(len(batches)):
            self._enter(batch)

    def _enter(self, batch: int) -> None:
        calls, entry = self._recorded(batch)
        self._arguments.append(filed(calls, self.hidden.folder))
        self.hidden.append(entry)

    def _recorded(self, batch: int) -> tuple[list[list[Call]], Tensor]:
        """Run the model on a batch: what it passes to the blocks of the present stack, and the first one's input."""
        anatomy, stack = self.anatomy, self.anatomy.stacks[self._stack]
        blocks = [anatomy.block(index) for index in range(len(anatomy))]
        forwards = [block.forward for block in blocks]
        finals = [done[batch] for done in self._finals]
        calls: list[list[Call]] = [[] for _ in blocks]
        ran: list[int] = []
        entry: list[Tensor] = []
        handed: list[Any] = []

        def entrance(index: int, *args: Any, **kwargs: Any) -> Any:
            if "hidden_states" in kwargs:
                args = (kwargs.pop("hidden_states"), *args)
            # A block runs more than once, and a cache would remember the times before.
            kwargs = {name: None if isinstance(value, CACHES) else value for name, value in kwargs.items()}
            hidden, rest = args[0], [None if isinstance(value, CACHES) else value for value in args[1:]]
            if index in stack:
                if calls[index] and ran[-1] != index:
                    raise UnsupportedModelError(
                        f"{type(model).__name__} runs {anatomy.block_paths[index]!r} again after another block, and "
                        "calibration goes through the blocks in turn. Choose a method or option that needs no data."
                    )
                calls[index].append((tuple(rest), kwargs))
                ran.append(index)
                entry.append(hidden)
                if anatomy.record.hands_on:
                    if not handed:  # the first block works them out
                        with self._resident(index):
                            handed.extend(forwards[index](hidden, *rest, **kwargs)[1:])
                    return (hidden, *handed[: anatomy.record.more_outputs])
            elif index < stack.start:
                hidden = next(final for final, own in zip(finals, anatomy.stacks, strict=False) if index in own)
            return self.as_output(hidden)

        model = body(anatomy.model)
        inputs = model_inputs(model, self.batches[batch])
        with torch.no_grad(), replaced_forward(blocks, entrance):
            try:
                model(**inputs)
            except (TypeError, ValueError, AttributeError) as error:
                if entry:
                    raise
                raise CalibrationError(
                    f"{type(model).__name__} does not run on a batch of {sorted(inputs)} ({error})."
                ) from error
        missed = [anatomy.block_paths[index] for index in stack if not calls[index]]
        if missed:
            raise CalibrationError(
                f"a batch of {sorted(self.batches[batch])} does not reach {missed[0]!r}: "
                f"{type(model).__name__} has several parts, and calibration needs data for each."
            )
        return calls, entry[0]

    def come_to(self, index: int) -> None:
        """Enter the stack of a block, unless the stream is in it already."""
        stacks = self.anatomy.stacks
        while index not in stacks[self._stack]:
            if self._last != stacks[self._stack].stop - 1:
                raise CompressionError(
                    f"the hidden states before {self.anatomy.block_paths[index]!r} are not enough: what the blocks up "
                    f"to {self.anatomy.block_paths[stacks[self._stack].stop - 1]!r} put out is needed as well. Start "
                    "without hidden states of an earlier run."
                )
            self._finals.append(self.hidden)
            self.hidden = Activations(self.hidden.folder)
            self._stack, self._last = self._stack + 1, stacks[self._stack + 1].start - 1
            self._arguments = []
            for batch in range(len(self)):
                self._enter(batch)

    def __len__(self) -> int:
        return len(self.batches)

    def copy(self) -> BlockStream:
        """A stream at the same place with the same arguments, to be moved on its own."""
        other = object.__new__(BlockStream)
        other.__dict__.update(self.__dict__)
        other.hidden, other._finals = self.hidden.copy(), list(self._finals)
        return other

    def by_sequence(self) -> BlockStream:
        """The same place, every sequence (or image) a batch of its own."""
        other = object.__new__(BlockStream)
        other.__dict__.update(self.__dict__)
        other.batches, other._arguments, other._finals = [], [], []
        other.hidden = Activations(self.hidden.folder)
        heads = int(getattr(text_config(self.anatomy.model), "num_attention_heads", 0))
        for batch, hidden, arguments in zip(self.batches, self.hidden, self._arguments, strict=True):
            calls = read(arguments)
            for row in range(len(hidden)):
                rows = slice(row, row + 1)
                row_of = partial(_row_of, size=len(hidden), heads=heads, rows=rows)
                own = map_once(row_of, calls)
                other.batches.append(rows_of(batch, rows))
                other.hidden.append(hidden[rows])
                other._arguments.append(filed(own, self.hidden.folder))
        return other

    def calls(self, index: int, batch: int) -> list[Call]:
        """What the model passes to block `index` beside the hidden states of a batch, every time that it runs it."""
        self.come_to(index)
        found: list[Call] = read(self._arguments[batch][index])
        return found

    def run(self, index: int, batch: int) -> Float[Tensor, "batch *place d"]:
        """Block `index` on the present hidden states of a batch; the stream itself does not move."""
        calls = self.calls(index, batch)
        self._last = index
        with torch.no_grad(), self.text_positions(batch):
            return run_calls(self.anatomy.block(index), self.hidden[batch], calls)

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

    def finals(self, batch: int) -> list[Float[Tensor, "batch *place d"]]:
        """What the blocks of every stack up to the present one have made of a batch."""
        return [own[batch] for own in (*self._finals, self.hidden)]

    def as_output(self, hidden: Tensor) -> Any:
        """Hidden states in place of what a block puts out, without what it has beside them."""
        count = self.anatomy.record.more_outputs
        return (hidden, *(None,) * count) if count else hidden


def body(model: Any) -> nn.Module:
    """The model without its head, if that is a part which takes the model's inputs."""
    base: nn.Module = model.base_model
    return base if model.main_input_name in inspect.signature(base.forward).parameters else model


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
        for name, tensor in complete(model, batch).items()
        if name in known and name != "labels"
    }
    main = getattr(model, "main_input_name", None)
    if not inputs or not inputs.keys() & {main or next(iter(inputs)), "inputs_embeds", "encoder_outputs"}:
        raise CalibrationError(
            f"{type(model).__name__} reads {main!r}, and a batch of the data has {sorted(batch)}. "
            "Give data of its kind: texts with a tokenizer, images with an image processor as processing_class."
        )
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    caches = "use_cache" in known or (hands_on and hasattr(text_config(model), "use_cache"))
    return {**inputs, "use_cache": False} if caches else inputs


def complete(model: Any, batch: Batch) -> Batch:
    """A batch with inputs for the decoder of an encoder-decoder: its labels, or else its text, one token later."""
    config, known = model.config, inspect.signature(model.forward).parameters
    if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
        return batch
    if "decoder_input_ids" not in known:
        return batch  # the encoder alone, under a head
    ids, mask = batch.get("labels"), None
    if ids is not None and (ids.dim() != 2 or ids.is_floating_point()):
        ids = None  # of classes
    if ids is not None:
        mask = ids != -100
    else:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        raise CalibrationError(
            f"{type(model).__name__} needs inputs for its decoder, and a batch has only {sorted(batch)}. Let the "
            "data_collator add `labels` or `decoder_input_ids`."
        )
    start, pad = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None) or 0
    first = torch.full_like(ids[:, :1], pad if start is None else start)
    shifted = torch.cat((first, ids[:, :-1]), dim=1)
    found = {**batch, "decoder_input_ids": shifted.masked_fill(shifted == -100, pad)}
    if mask is not None:
        found["decoder_attention_mask"] = torch.cat((torch.ones_like(mask[:, :1]), mask[:, :-1]), dim=1)
    return found


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


def warn_unreached(paths: list[str]) -> None:
    """Say that matrices are compressed by their weights alone."""
    warnings.warn(
        f"the calibration data never run through {', '.join(paths)}: their weights alone decide. Give data for every "
        "part of the model, or name them in modules_to_not_convert.",
        stacklevel=2,
    )


def require_finite(hidden: Tensor, what: str) -> Tensor:
    if not torch.isfinite(hidden).all():
        raise NumericalError(
            f"non-finite values in the {what}. Check the checkpoint's weights, or load it in float32 or bfloat16 "
            "(float16 overflows on many models)."
        )
    return hidden


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch; tensors that all rows share, such as position ids of shape (1, tokens), stay whole."""
    size = max(len(tensor) for tensor in batch.values())
    return {name: tensor[rows] if len(tensor) == size else tensor for name, tensor in batch.items()}


def _row_of(value: Any, size: int, heads: int, rows: slice) -> Any:
    """Rows of a tensor that has one a sequence, or, as ALiBi's biases, one a sequence and head; anything else as it
    is."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if value.dim() == 3 and value.shape[:2] == (size * heads, 1):
        return value.unflatten(0, (size, heads))[rows].flatten(0, 1)
    return value[rows] if len(value) == size else value


def every_nth(batches: list[Batch], first: int, n: int) -> list[Batch]:
    """Of all sequences, counted through the batches, number `first` and every n-th after it. Batches get smaller; one
    without a sequence is left out."""
    taken, seen = list[Batch](), 0
    for batch in batches:
        start = (first - seen) % n
        size = max(len(tensor) for tensor in batch.values())
        if start < size:
            taken.append(rows_of(batch, slice(start, None, n)))
        seen += size
    return taken


def take_tokens(batches: list[Batch], tokens: int) -> list[Batch]:
    """The first batches, until they hold `tokens` positions; the last one is cut to whole sequences."""
    taken: list[Batch] = []
    for batch in batches:
        first = max(batch.values(), key=len)
        length = first.shape[1] if first.dim() > 1 else 1
        if first.dim() > 2:  # an image
            length = max(first[0].numel() // IMAGE_POSITION, 1)
        rows = min(len(first), max(-(-tokens // length), 1))
        taken.append(rows_of(batch, slice(0, rows)))
        tokens -= rows * length
        if tokens <= 0:
            break
    return taken
