"""How far a compressed model's predictions are from the dense model's: KL divergence and the share of equal tops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigurationError, NumericalError
from .forward import LOGIT_ELEMENTS, check_length, evaluation_mode, input_device
from .perplexity import as_token_ids, check_token_ids


@dataclass(frozen=True)
class AgreementResult:
    """How much of the dense model's predictions is left.

    Attributes:
        kl: KL(dense ‖ model) of the next token's distribution, in nats, a mean over the tokens.
        top1: share of the tokens after which both models expect the same token.
        num_tokens: tokens after which the models were compared.
        context: length of a window in tokens.
    """

    kl: float
    top1: float
    num_tokens: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def agreement(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    data: Int[Tensor, "..."] | Sequence[int] | str | Sequence[str],
    processing_class: Any = None,
    *,
    context: int = 2048,
    batch_size: int = 1,
) -> AgreementResult:
    """Compare the predictions of `model` with those of `reference` after every token of `data`, read as one text.

    The windows are disjoint. Memory holds the logits of one batch of windows of both models in their own dtype;
    float32 copies are made of a piece at a time.

    Args:
        reference: the dense model, of the same vocabulary.
        model: the compressed one; on another device if need be.
        data, processing_class: as in [`perplexity`].
        context: length of a window in tokens.
        batch_size: windows a forward pass.

    Raises:
        ConfigurationError: for models of two vocabularies, an empty text, or windows longer than the models take.
        NumericalError: when a divergence is NaN.
    """
    if context < 1 or batch_size < 1:
        raise ConfigurationError(
            f"agreement needs context >= 1 and batch_size >= 1; got context={context}, batch_size={batch_size}."
        )
    token_ids = as_token_ids(data, processing_class)
    for one in (reference, model):
        check_token_ids(one, token_ids)
        check_length(one, min(context, len(token_ids)), "the context of the agreement")
    whole = len(token_ids) // context * context
    batches = list(torch.split(token_ids[:whole].view(-1, context), batch_size)) if whole else []
    if whole < len(token_ids):
        batches.append(token_ids[None, whole:])
    divergence, equal = 0.0, 0
    with evaluation_mode(reference, model), torch.no_grad():
        for batch in batches:
            expected, found = (
                one(input_ids=batch.to(input_device(one)), use_cache=False).logits.flatten(end_dim=1)
                for one in (reference, model)
            )
            if expected.shape != found.shape:
                raise ConfigurationError(
                    f"the models have {expected.shape[-1]} and {found.shape[-1]} logits a token; agreement compares "
                    f"models of one vocabulary."
                )
            some_divergence, some_equal = compare_logits(expected, found)
            divergence, equal = divergence + some_divergence, equal + some_equal
    if math.isnan(divergence):
        raise NumericalError(
            "the divergence between the models is NaN: the logits of one of them are not finite; try "
            "dtype=torch.float32."
        )
    return AgreementResult(divergence / len(token_ids), equal / len(token_ids), len(token_ids), context)


def compare_logits(
    expected: Float[Tensor, "tokens vocabulary"], found: Float[Tensor, "tokens vocabulary"]
) -> tuple[float, int]:
    """Sum of KL(expected ‖ found) in nats, and in how many rows both have their maximum at the same place."""
    rows = max(1, LOGIT_ELEMENTS // expected.shape[-1])
    divergence, equal = 0.0, 0
    for some_expected, some_found in zip(torch.split(expected, rows), torch.split(found, rows), strict=True):
        log_p = F.log_softmax(some_expected.to(some_found.device).float(), dim=-1)
        log_q = F.log_softmax(some_found.float(), dim=-1)
        each = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
        # Moved before the cast: not every accelerator has float64.
        divergence += float(each.cpu().double().sum())
        equal += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
    return divergence, equal
