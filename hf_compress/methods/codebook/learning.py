"""From dense matrices to codes: the steps of `mathematics` in the order that a recipe asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import NumericalError
from . import gradient, mathematics
from .coded import Coded, as_stored, join, split
from .configuration import CodebookConfig

# Weights that are worked on at once: larger matrices are coded in pieces, so that their codes, errors and scales stay
# small beside the model.
WEIGHTS_AT_ONCE = 1 << 23


def code_matrices(
    config: CodebookConfig,
    weights: list[Tensor],
    gram: Float[Tensor, "columns columns"] | None,
    codes: int,
    generator: torch.Generator,
    in_turn: Sequence[bool] | None = None,
) -> list[Coded]:
    """Matrices over the same inputs as codes, rounded as they are stored.

    Args:
        weights: (rows, columns) each, float32.
        gram: `H`, damped, float64; `None` without data.
        codes: codes of a codebook.
        generator: on the CPU; draws the samples that codebooks start from.
        in_turn: of every matrix, whether its codebooks serve rows that follow each other.

    Raises:
        NumericalError: `H` is not positive definite even with more damping, or the weights are too large.
    """
    columns = weights[0].shape[1]
    height = max(WEIGHTS_AT_ONCE // columns // config.rows_per_codebook, 1) * config.rows_per_codebook
    taken = in_turn or [False] * len(weights)
    pieces = [(piece, own) for weight, own in zip(weights, taken, strict=True) for piece in weight.split(height)]
    coded: list[Coded] = []
    feedback = None if gram is None or config.learning == "none" else mathematics.feedback_of(gram)
    for together in _within(pieces, WEIGHTS_AT_ONCE):
        coded += _code_pieces(config, together, gram, feedback, codes, generator)
    result = []
    for weight in weights:
        count = -(-len(weight) // height)
        result.append(join(coded[:count]))
        if not (result[-1].scales.isfinite().all() and result[-1].codebooks.isfinite().all()):
            raise NumericalError(
                f"weights up to {float(weight.abs().max()):.3g} are too large for scales and codes in half precision"
            )
        coded = coded[count:]
    return result


def _within(pieces: list[tuple[Tensor, bool]], limit: int) -> Iterator[list[tuple[Tensor, bool]]]:
    """Neighbours together, up to `limit` weights."""
    group: list[tuple[Tensor, bool]] = []
    for piece in pieces:
        if group and sum(other.numel() for other, _ in group) + piece[0].numel() > limit:
            yield group
            group = []
        group.append(piece)
    yield group


def _code_pieces(
    config: CodebookConfig,
    pieces: list[tuple[Tensor, bool]],
    gram: Tensor | None,
    feedback: tuple[Tensor, Tensor] | None,
    codes: int,
    generator: torch.Generator,
) -> list[Coded]:
    weights = [weight for weight, _ in pieces]
    columns = weights[0].shape[1]
    importance = weights[0].new_ones(columns) if gram is None else gram.diagonal()
    starts = [
        mathematics.start(
            weight,
            importance,
            codes=codes,
            column_group=min(config.column_group or columns, columns),
            rows_per_codebook=config.rows_per_codebook,
            generator=generator,
            in_turn=in_turn,
        )
        for weight, in_turn in pieces
    ]
    coded, stacked = as_stored(join(starts), config.integer_scales), torch.cat(weights)
    if gram is None or feedback is None or config.learning == "none":
        coded = mathematics.assign_nearest(stacked, coded)
    else:
        coded = mathematics.assign_with_feedback(stacked, feedback, coded)
        if config.learning == "joint":
            coded = _learn_jointly(config, stacked, gram, coded)
        elif config.learning != "feedback":
            coded = gradient.descend(stacked, gram, coded, config.learning, config.integer_scales)
    coded = as_stored(mathematics.constant_rows(stacked, coded), config.integer_scales)
    return split(coded, starts)


def _learn_jointly(config: CodebookConfig, weight: Tensor, gram: Tensor, coded: Coded) -> Coded:
    """Codes, scales and codebooks in turn, each at its optimum given the others, rounded as they are stored."""
    coded = mathematics.sweep_codes(weight, gram, coded)
    for _ in range(config.rounds):
        coded = mathematics.refit_scales(weight, gram, coded)
        coded = mathematics.refit_codebooks(weight, gram, coded)
        coded = as_stored(coded, config.integer_scales)
        coded = mathematics.sweep_codes(weight, gram, coded)
    return coded
