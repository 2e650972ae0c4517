"""Mixed bits: how many each matrix gets, so that an average is kept and the loss grows least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import ModelAnatomy, dense_rows
from ...engine.blocks import (
    Batch,
    model_inputs,
    next_token_labels,
    only_these_train,
    real_tokens,
    take_tokens,
    text_positions,
)
from ...engine.input_grams import patches
from ...engine.session import Session
from . import mathematics
from .configuration import CodebookConfig

CHOICES = (2, 3, 4)
# Tokens of the pass that measures gradients, and rows of a matrix whose rounding error is measured.
GRADIENT_TOKENS = 4096
SAMPLED_ROWS = 128


@dataclass
class _Energies:
    """Squares of a matrix's inputs and of the loss's gradients to its outputs, summed over tokens (or patches)."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def mean_inputs(self, path: str) -> Tensor:
        return self.inputs[path] / self.counts[path]


def estimate_losses(session: Session, config: CodebookConfig, paths: Sequence[str]) -> list[dict[int, float]]:
    """For every matrix and number of bits the growth of the loss that rounding it alone is estimated to cause.

    A second-order estimate with a diagonal Kronecker approximation of the Fisher matrix: `½ Σ_rc γ_r h_c E_rc²` with
    the gradient energies γ of the outputs, the energies h of the inputs and the error E of a k-means start. Rounding
    with feedback shrinks all errors alike.
    """
    energies = _measure(session.anatomy, session.batches, paths)
    losses = []
    for path in paths:
        weight = dense_rows(session.anatomy.model.get_submodule(path)).float()
        inputs, gradients = energies.mean_inputs(path).to(weight), energies.gradients[path].to(weight)
        generator = torch.Generator().manual_seed(config.seed)
        chosen = torch.randperm(len(weight), generator=generator)[:SAMPLED_ROWS].to(weight.device)
        sample, found = weight[chosen], {}
        for bits in CHOICES:
            coded = mathematics.start(
                sample,
                inputs,
                codes=2**bits,
                column_group=min(config.column_group or sample.shape[1], sample.shape[1]),
                rows_per_codebook=config.rows_per_codebook,
                generator=generator,
            )
            error = (sample - coded.matrix()).square() @ inputs
            found[bits] = 0.5 * float(error @ gradients[chosen]) * len(weight) / len(sample)
        losses.append(found)
    return losses


def allocate_bits(losses: Sequence[dict[int, float]], sizes: Sequence[int], average: float) -> list[int]:
    """Bits for every matrix: least total loss with at most `average` bits a weight.

    Greedy on the lower convex hull of each matrix's losses, in the order of loss saved a bit spent: exact up to the
    last step that no longer fits.

    Args:
        losses: by bits, for every matrix.
        sizes: weights of every matrix.
    """
    chosen = [min(found) for found in losses]
    budget = average * sum(sizes) - sum(bits * size for bits, size in zip(chosen, sizes, strict=True))
    steps = [
        (slope, index, upper)
        for index, found in enumerate(losses)
        for upper, slope in _hull(found)
        if slope > 0  # more bits that bring nothing are not spent
    ]
    steps = [(slope / sizes[index], index, upper) for slope, index, upper in steps]
    blocked: set[int] = set()
    for _, index, upper in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        price = (upper - chosen[index]) * sizes[index]
        if index in blocked or price > budget:
            blocked.add(index)
            continue
        budget -= price
        chosen[index] = upper
    return chosen


def _hull(found: dict[int, float]) -> list[tuple[int, float]]:
    """The corners of the lower convex hull after the first: bits, and loss saved a bit on the way there."""
    bits, corners = sorted(found), []
    at = bits[0]
    while at != bits[-1]:
        slope, upper = max(((found[at] - found[b]) / (b - at), b) for b in bits if b > at)
        corners.append((upper, slope))
        at = upper
    return corners


def _measure(anatomy: ModelAnatomy, batches: list[Batch], paths: Sequence[str]) -> _Energies:
    model, energies = anatomy.model, _Energies()
    generator = torch.Generator().manual_seed(0)
    with only_these_train(model), _observed(model, paths, energies):
        for batch in take_tokens(batches, GRADIENT_TOKENS):
            with torch.enable_grad(), text_positions(batch):
                _objective(anatomy, model(**model_inputs(model, batch)), batch, generator).backward()
    return energies


def _objective(anatomy: ModelAnatomy, output: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """The sum over tokens of the loss of a causal language model; elsewhere a random projection of the output, whose
    squared gradients are those of its squared error on average."""
    targets = next_token_labels(batch)
    logits = getattr(output, "logits", None)
    if anatomy.predicts_tokens() and logits is not None and targets is not None and logits.shape[:2] == targets.shape:
        flat = logits[:, :-1].flatten(end_dim=1).float()
        return nn.functional.cross_entropy(flat, targets[:, 1:].flatten().to(flat.device), reduction="sum")
    named = [output[name] for name in output if name.endswith("logits")] or [output[0]]
    drawn = [torch.randn(states.shape, generator=generator).to(states.device) for states in named]
    return torch.stack([(states.float() * draw).sum() for states, draw in zip(named, drawn, strict=True)]).sum()


@contextmanager
def _observed(model: nn.Module, paths: Sequence[str], energies: _Energies) -> Iterator[None]:
    def add(sums: dict[str, Tensor], path: str, rows: Tensor) -> None:
        energy = rows.float().square().sum(dim=0).double()
        sums[path] = sums[path] + energy if path in sums else energy

    def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, path: str) -> Tensor:
        states, image = inputs[0].detach(), isinstance(module, nn.Conv2d)
        if isinstance(module, nn.Conv2d):
            rows = torch.cat([patches(module, one) for one in states.reshape(-1, *states.shape[-3:])])
        else:
            rows = real_tokens(states)
        add(energies.inputs, path, rows)
        energies.counts[path] = energies.counts.get(path, 0) + len(rows)
        if not output.requires_grad:
            output = output.detach().requires_grad_()

        def keep(gradient: Tensor) -> None:
            by_token = gradient.movedim(1, -1).flatten(end_dim=-2) if image else real_tokens(gradient)
            add(energies.gradients, path, by_token)

        # Accelerators go backward in a thread of their own, which does not know the padding.
        context = copy_context()
        output.register_hook(lambda gradient: context.run(keep, gradient))
        return output

    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: observe(module, inputs, output, path)
        )
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
