"""What candidates would cost: the held-out loss of several allocations in one walk over the blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...anatomy import ModelAnatomy
from ...engine.blocks import BlockStream, body, model_inputs, real_tokens, replaced_forward, take_tokens
from ...engine.session import Session, placed
from .compress import compress_block
from .configuration import ModularDecompositionConfig
from .sizes import Geometry, Sizes
from .statistics import collect_statistics

# Tokens for the Grams of a trial, and held-out tokens that every candidate is judged on.
TRIAL_TOKENS = 8192
HELD_OUT_TOKENS = 4096


def trial_losses(
    session: Session,
    config: ModularDecompositionConfig,
    candidates: list[Sizes],
    held_out_tokens: int = HELD_OUT_TOKENS,
) -> list[float]:
    """What every candidate loses on held-out data: the mean negative log-likelihood of a token in nats, or, of an
    encoder, the relative error of the final hidden states (see `hidden_state_error`).

    One dense stream gathers each block's statistics; one held-out stream a candidate runs through the blocks as that
    candidate would compress them. Nothing of the model is changed, and no more than one block's statistics live.
    """
    anatomy = session.anatomy
    calibration = session.stream(take_tokens(session.batches, TRIAL_TOKENS))
    held_out = session.stream(take_tokens(session.held_out, held_out_tokens))
    streams = [held_out.copy() for _ in candidates]
    by_tokens = anatomy.record.decoder
    dense = Geometry.of(anatomy, config).dense()
    for block in session.progress(range(len(anatomy)), f"trial of {len(candidates)} allocations"):
        reduced = [
            {kind: size for kind, size in candidate[block].items() if size < dense[block][kind]}
            for candidate in candidates
        ]
        with collect_statistics(anatomy, block, {kind for sizes in reduced for kind in sizes}) as statistics:
            calibration.advance(block, check=False)
        for stream, sizes in zip(streams, reduced, strict=True):
            modules = compress_block(anatomy, config, block, sizes, statistics).modules if sizes else {}
            with placed(anatomy.model, modules):
                stream.advance(block)
        if not by_tokens:
            held_out.advance(block, check=False)
    if by_tokens:
        return [stream.final_loss() for stream in streams]
    return [hidden_state_error(stream, held_out) for stream in streams]


def hidden_state_error(stream: BlockStream, dense: BlockStream) -> float:
    """`Σ ‖h − h_dense‖² / Σ ‖h_dense‖²` over all positions that are no padding.

    `h` are the last hidden states of the base model, after its final norm if it has one: what every head of an encoder
    reads; of an encoder and decoder the decoder's. Of two towers it is the mean of both. Both streams have passed the
    last block, one of them the dense blocks.
    """
    lost: list[float] = []
    energy: list[float] = []
    for batch in range(len(stream)):
        pairs = zip(_final_states(stream, batch), _final_states(dense, batch), strict=True)
        for tower, (found, wanted) in enumerate(pairs):
            if batch == 0:
                lost.append(0.0)
                energy.append(0.0)
            with stream.text_positions(batch):
                found, wanted = real_tokens(found).double(), real_tokens(wanted).double()
            lost[tower] += float((found - wanted).square().sum())
            energy[tower] += float(wanted.square().sum())
    return sum(own / whole for own, whole in zip(lost, energy, strict=True) if whole > 0) / max(len(lost), 1)


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


def shown(anatomy: ModelAnatomy, loss: float) -> tuple[str, float]:
    """A loss as the report's notes have it: what it is called, and its value."""
    if anatomy.record.decoder:
        return "perplexity", round(math.exp(loss), 3)
    return "hidden_state_error", round(loss, 5)
