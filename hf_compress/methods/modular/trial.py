"""What candidates would cost: the held-out loss of several allocations in one walk over the blocks."""

from __future__ import annotations

from ...engine.blocks import take_tokens
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
    """Mean negative log-likelihood a held-out token for every candidate, in nats.

    One dense stream gathers each block's statistics; one held-out stream a candidate runs through the blocks as that
    candidate would compress them. Nothing of the model is changed, and no more than one block's statistics live.
    """
    anatomy = session.anatomy
    calibration = session.stream(take_tokens(session.batches, TRIAL_TOKENS))
    held_out = session.stream(take_tokens(session.held_out, held_out_tokens))
    streams = [held_out.copy() for _ in candidates]
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
    return [stream.final_loss() for stream in streams]
