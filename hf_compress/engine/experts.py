"""What calibration sees of the experts of a block: every expert its own tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ..anatomy import Experts
from ..anatomy.experts import chosen_tokens, routed
from ..calibration.statistics import gram
from .blocks import real_tokens

# What an expert's up projection reads, and its down projection.
Place = Literal["input", "inner"]


@dataclass
class ExpertStatistics:
    """Sums over the calibration tokens that the router gave to each expert, float64.

    An expert's output is multiplied by the router's weight, so a token counts by the square of it: the sums are those
    of the errors that arrive in the residual stream.

    Args:
        grams: by place, one Gram an expert, (hidden, hidden) or (width, width).
        tokens: how many tokens every expert got, (experts,).
    """

    grams: dict[Place, list[Float64[Tensor, "n n"]]]
    tokens: Int64[Tensor, " experts"]

    @classmethod
    def of(cls, experts: Experts, places: tuple[Place, ...]) -> ExpertStatistics:
        sizes = {"input": experts.hidden, "inner": experts.width}
        grams = {
            place: [torch.zeros(sizes[place], sizes[place], dtype=torch.float64) for _ in range(experts.count)]
            for place in places
        }
        return cls(grams, torch.zeros(experts.count, dtype=torch.int64))

    def observe(self, experts: Experts, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Add what a module of experts is called with; padding is left out."""
        hidden, index, weights = (real_tokens(tensor.detach()) for tensor in routed(arguments, keywords))
        for expert, tokens, places in chosen_tokens(index, experts.count):
            rows = hidden[tokens]
            wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
            weight = weights[tokens, places, None].to(wide)
            self.tokens[expert] += len(tokens)
            for place, grams in self.grams.items():
                seen = rows if place == "input" else experts.inner(rows, expert)
                product = gram(seen.to(wide) * weight)
                grams[expert] = grams[expert].to(product.device).add_(product)

    def sums(self) -> dict[str, Tensor]:
        """Everything that adds up over calibration data, by name."""
        found = {f"{place}.{at}": own for place, grams in self.grams.items() for at, own in enumerate(grams)}
        return {**found, "tokens": self.tokens}

    def floors(self, place: Place) -> Float64[Tensor, "..."]:
        """What stands for a token that an expert did not get: of inputs the mean over all experts' tokens, (n, n); of
        inner channels, which differ from expert to expert, their mean square alone, ()."""
        grams, tokens = self.grams[place], max(int(self.tokens.sum()), 1)
        if place == "input":
            total = torch.zeros_like(grams[0])
            for own in grams:
                total += own.to(total.device)
            return total / tokens
        return sum((own.diagonal().mean().cpu() for own in grams), start=torch.zeros(()).double()) / tokens

    def gram(self, place: Place, expert: int, floor: Float64[Tensor, "..."]) -> Float64[Tensor, "n n"]:
        """An expert's Gram for a factorisation, (n, n), with `floor`, of `floors`, in place of tokens that it lacks.

        An expert without a token gets n of them, one with n tokens, which would fit its own noise, n / 2, one with
        many hardly any: n² / (n + tokens).
        """
        own = self.grams[place][expert].clone()
        floor, size = floor.to(own.device), len(own)
        lacking = size**2 / (size + int(self.tokens[expert]))
        if floor.dim() == 0:
            own.diagonal().add_(lacking * floor)
        else:
            own.add_(floor, alpha=lacking)
        if not own.diagonal().any():
            own.diagonal().fill_(1)  # no activation at all: the weights alone decide
        return own

    def warn_rare(self, path: str) -> None:
        """Say which experts no token went to, or that half of them got too few to tell signal from noise."""
        unseen = (self.tokens == 0).nonzero().flatten().tolist()
        size = min(len(grams[0]) for grams in self.grams.values())
        middle = int(self.tokens.median())
        if unseen:
            found = f"no calibration token went to {len(unseen)} of {len(self.tokens)} experts ({_listed(unseen)})"
        elif middle < size:
            found = f"half of the experts got no more than {middle} tokens, and have {size} channels or more"
        else:
            return
        warnings.warn(
            f"{path}: {found}. What others saw and their own weights decide as well. Give more, or more varied, "
            "calibration data.",
            stacklevel=2,
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


@contextmanager
def collect_experts(experts: Experts, places: tuple[Place, ...]) -> Iterator[ExpertStatistics]:
    """Within the context, count what the module of experts is called with."""
    statistics = ExpertStatistics.of(experts, places)
    handle = experts.module.register_forward_pre_hook(
        lambda _module, arguments, keywords: statistics.observe(experts, arguments, keywords), with_kwargs=True
    )
    try:
        yield statistics
    finally:
        handle.remove()
