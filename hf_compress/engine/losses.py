"""How good the hidden states after the last block are: sums over held-out data, which add up over processes.

Every measure is a list of numerators and denominators, a pair for each part of a model that counts by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockStream, body, model_inputs, real_tokens, replaced_forward, rows_of

# Rows of logits turned to float32 at once.
LOGIT_ROWS = 128

Parts = list[tuple[float, float]]


def mean_ratio(measured: Iterable[Parts]) -> float:
    """The mean over a model's parts of what `measured` adds up to; a part whose denominator is 0 counts as 0."""
    parts = [
        tuple(map(sum, zip(*pairs, strict=True))) for pairs in zip(*(own for own in measured if own), strict=True)
    ]
    return sum(above / below for above, below in parts if below > 0) / max(len(parts), 1)


def token_losses(stream: BlockStream) -> Parts:
    """Negative log-likelihoods in nats and how many tokens they belong to.

    The stream has passed the last block. The model's own final norm and head run on its hidden states, sequence by
    sequence, so that a family's extras (softcap, logit scale) are kept.
    """
    blocks = [stream.anatomy.block(index) for index in range(len(stream.anatomy))]
    model, total, count = stream.anatomy.model, 0.0, 0
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        for row in range(len(hidden)):
            final = hidden[row : row + 1]
            single = rows_of(batch, slice(row, row + 1))
            with torch.no_grad(), replaced_forward(blocks, lambda *_, _final=final, **__: stream.as_output(_final)):
                logits = model(**model_inputs(model, single)).logits[0, :-1]
            targets = single["input_ids"][0, 1:].to(logits.device)
            mask = single.get("attention_mask")
            mask = mask[0, 1:].bool() if mask is not None and mask.dim() == 2 else None
            for start in range(0, len(targets), LOGIT_ROWS):
                rows = slice(start, start + LOGIT_ROWS)
                losses = nn.functional.cross_entropy(logits[rows].float(), targets[rows], reduction="none").double()
                if mask is not None:
                    losses = losses[mask[rows].to(losses.device)]
                total, count = total + float(losses.sum()), count + losses.numel()
    return [(total, count)]


def hidden_state_errors(stream: BlockStream, dense: BlockStream) -> Parts:
    """`Σ ‖h − h_dense‖²` and `Σ ‖h_dense‖²` over all positions that are no padding; of two towers a pair each.

    `h` are the last hidden states of the base model, after its final norm if it has one: what every head of an encoder
    reads; of an encoder and decoder the decoder's. Both streams have passed the last block, one of them the dense
    blocks.
    """
    found: Parts = []
    for batch in range(len(stream)):
        pairs = zip(_final_states(stream, batch), _final_states(dense, batch), strict=True)
        for tower, (states, wanted) in enumerate(pairs):
            if batch == 0:
                found.append((0.0, 0.0))
            with stream.text_positions(batch):
                states, wanted = real_tokens(states).double(), real_tokens(wanted).double()
            lost, energy = found[tower]
            found[tower] = (lost + float((states - wanted).square().sum()), energy + float(wanted.square().sum()))
    return found


def _final_states(stream: BlockStream, batch: int) -> list[Tensor]:
    """What the base model makes of the hidden states of a batch after the last block; of two towers, those of both."""
    blocks = [stream.anatomy.block(index) for index in range(len(stream.anatomy))]
    finals = stream.finals(batch)

    def final(index: int, *_: Any, **__: Any) -> Any:
        states = next(own for own, stack in zip(finals, stream.anatomy.stacks, strict=True) if index in stack)
        return stream.as_output(states)

    model = body(stream.anatomy.model)
    with torch.no_grad(), replaced_forward(blocks, final):
        output: Any = model(**model_inputs(model, stream.batches[batch]))
    states = getattr(output, "last_hidden_state", None)
    # A backbone gives maps of features, some of them without the last norm: then the blocks' own output counts.
    return [states] if isinstance(states, Tensor) else finals
