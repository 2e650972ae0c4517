"""Perplexity of a causal language model over one long text, with the window and the stride said out loud."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigurationError, NumericalError
from .forward import (
    LOGIT_ELEMENTS,
    accepts_logits_to_keep,
    check_length,
    evaluation_mode,
    input_device,
    vocabulary_size,
)


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured.

    Attributes:
        perplexity: `exp(nll)`.
        nll: mean negative log-likelihood, in nats a token.
        num_tokens: tokens that were scored.
        context: length of a window in tokens.
        stride: distance between the starts of two windows in tokens.
    """

    perplexity: float
    nll: float
    num_tokens: int
    context: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


class Window(NamedTuple):
    """Tokens `[start, end)` go in; tokens `[first, end)` are scored."""

    start: int
    first: int
    end: int


def sliding_windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score every token once, but for those at the head of a window that no earlier one covers.

    The last window may be shorter than `context`.
    """
    scored = start = 0
    while True:
        end = min(start + context, num_tokens)
        first = max(scored, start + 1)
        if first < end:
            yield Window(start, first, end)
        if end == num_tokens:
            return
        scored = end
        start += stride


def perplexity(
    model: PreTrainedModel,
    data: Int[Tensor, "..."] | Sequence[int] | str | Sequence[str],
    processing_class: Any = None,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 1,
) -> PerplexityResult:
    """Perplexity of `model` on `data`, read as one text.

    With `stride=None` the windows are disjoint and the first token of each is not scored, as in most papers on
    compression. With a smaller stride each token is scored once, with at least `context - stride` tokens before it
    (those of the first window excepted). The last, shorter window counts. Losses are fp32, their sum is float64.

    Args:
        model: a causal language model; offloaded and sharded ones too. Its training mode is restored.
        data: token ids of shape `(tokens,)` or `(1, tokens)`, a list of ids, a text, or texts, which are joined by
            blank lines.
        processing_class: the tokenizer, needed for texts; it adds its special tokens once, at the head.
        context: length of a window in tokens.
        stride: distance between the starts of windows in tokens, in [1, context]; defaults to `context`.
        batch_size: windows a forward pass. Memory grows with the logits of one batch, `(windows, context, vocabulary)`
            in the model's dtype.

    Raises:
        ConfigurationError: for a context or stride out of range, fewer than two tokens, ids outside the vocabulary,
            or texts without a tokenizer.
        NumericalError: when a loss is NaN.
    """
    stride = context if stride is None else stride
    if context < 2 or not 1 <= stride <= context or batch_size < 1:
        raise ConfigurationError(
            f"perplexity needs context >= 2, 1 <= stride <= context and batch_size >= 1; got context={context}, "
            f"stride={stride}, batch_size={batch_size}."
        )
    token_ids = as_token_ids(data, processing_class)
    check_token_ids(model, token_ids)
    check_length(model, min(context, len(token_ids)), "the context of the perplexity")
    total = 0.0
    num_tokens = 0
    # Not inference mode: a model evaluated between training steps must keep no inference tensors in its buffers.
    with evaluation_mode(model), torch.no_grad():
        # The last window alone may be shorter, so windows of one length are neighbours.
        for _, group in groupby(sliding_windows(len(token_ids), context, stride), key=lambda w: w.end - w.start):
            windows = list(group)
            for index in range(0, len(windows), batch_size):
                batch = windows[index : index + batch_size]
                total += _batch_loss(model, token_ids, batch)
                num_tokens += sum(window.end - window.first for window in batch)
    nll = total / num_tokens
    return PerplexityResult(math.exp(nll) if nll < 700 else math.inf, nll, num_tokens, context, stride)


def as_token_ids(
    data: Int[Tensor, "..."] | Sequence[int] | str | Sequence[str], processing_class: Any = None
) -> Int[Tensor, "tokens"]:
    """Token ids on the CPU, of shape `(tokens,)`, int64; texts are joined by blank lines and tokenized once.

    Raises:
        ConfigurationError: for texts without a tokenizer, or data of another shape or type.
    """
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.dim() not in (1, 2) or (data.dim() == 2 and data.shape[0] != 1):
            raise ConfigurationError(
                f"expected integer token ids of shape (tokens,) or (1, tokens), got {tuple(data.shape)} {data.dtype}."
            )
        return data.reshape(-1).long().cpu()
    parts = [data] if isinstance(data, str) else list(data)
    if all(isinstance(part, str) for part in parts):
        if processing_class is None:
            raise ConfigurationError("perplexity of texts needs `processing_class=` (the model's tokenizer).")
        text = "\n\n".join(str(part) for part in parts)
        # The text is cut into windows, so its length says nothing about the model's limit: no warning about it.
        return torch.tensor(processing_class(text, verbose=False)["input_ids"], dtype=torch.long)
    if all(isinstance(part, int) for part in parts):
        return torch.tensor(parts, dtype=torch.long)
    raise ConfigurationError("expected token ids, a text or a list of texts, got a mixture or something else.")


def check_token_ids(model: PreTrainedModel, token_ids: Int[Tensor, "tokens"]) -> None:
    """Raise `ConfigurationError` for fewer than two tokens, or ids that the model has no embedding for."""
    if len(token_ids) < 2:
        raise ConfigurationError(f"the evaluation text needs at least two tokens, got {len(token_ids)}.")
    low, high, size = int(token_ids.min()), int(token_ids.max()), vocabulary_size(model)
    if low < 0 or high >= size:
        raise ConfigurationError(
            f"token ids lie in [{low}, {high}], outside the model's vocabulary of {size}: "
            f"is the tokenizer the model's own?"
        )


def _batch_loss(model: PreTrainedModel, token_ids: Int[Tensor, "tokens"], batch: list[Window]) -> float:
    """Sum of the negative log-likelihoods (nats) of the scored tokens of windows of one length."""
    length = batch[0].end - batch[0].start
    inputs = torch.stack([token_ids[window.start : window.end] for window in batch]).to(input_device(model))
    # The position before the first scored token predicts it; logits before that are not needed.
    keep = max(window.end - window.first for window in batch) + 1
    options = {"logits_to_keep": keep} if accepts_logits_to_keep(model) else {}
    logits = model(input_ids=inputs, use_cache=False, **options).logits
    skipped = length - logits.shape[1]
    total = 0.0
    for row, window in zip(logits, batch, strict=True):
        predictions = row[window.first - 1 - window.start - skipped : length - 1 - skipped]
        total += _loss(predictions, token_ids[window.first : window.end].to(row.device))
    if math.isnan(total):
        raise NumericalError(
            f"the loss of tokens {batch[0].start} to {batch[-1].end} is NaN: the model's weights or activations are "
            f"not finite in {logits.dtype}; try dtype=torch.float32."
        )
    return total


def _loss(logits: Float[Tensor, "scored vocabulary"], targets: Int[Tensor, "scored"]) -> float:
    rows = max(1, LOGIT_ELEMENTS // logits.shape[-1])
    total = 0.0
    for some_logits, some_targets in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        losses = F.cross_entropy(some_logits.float(), some_targets, reduction="none")
        # Moved before the cast: not every accelerator has float64.
        total += float(losses.cpu().double().sum())
    return total
