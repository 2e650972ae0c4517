"""How far a student's distribution is from its teacher's: tensors in, tensors out."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


def log_probabilities(logits: Float[Tensor, "rows classes"], temperature: float) -> Float[Tensor, "rows classes"]:
    """Of the softmax at a temperature, in float32."""
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def divergence(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"], kind: Divergence
) -> Float[Tensor, "rows"]:
    """Between log-probabilities, in nats: KL(teacher‖student), KL(student‖teacher), or the mean of both to their
    mixture."""
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    return 0.5 * (_kl(student, mixture) + _kl(teacher, mixture))


def _kl(first: Tensor, second: Tensor) -> Tensor:
    # A class of probability 0 adds nothing, whatever the other says of it.
    terms = first.exp() * (first - second)
    return torch.where(first.isneginf(), torch.zeros_like(terms), terms).sum(dim=-1)


def top_classes(
    log_probability: Float[Tensor, "rows classes"], count: int
) -> tuple[Int[Tensor, "rows count"], Float[Tensor, "rows count"]]:
    """The likeliest classes and their log-probabilities."""
    found = log_probability.topk(count, dim=-1)
    return found.indices, found.values


def with_the_rest(log_probability: Float[Tensor, "rows count"]) -> Float[Tensor, "rows count_and_one"]:
    """Some classes' log-probabilities, and after them that of all others together."""
    named = log_probability.exp().sum(dim=-1, keepdim=True)
    # Rounding may leave a little less than nothing.
    rest = torch.log((1 - named).clamp_min(torch.finfo(torch.float32).eps))
    return torch.cat((log_probability, rest), dim=-1)
