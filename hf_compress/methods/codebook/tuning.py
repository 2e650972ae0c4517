"""A whole block tuned towards the dense block's output: codebooks, scales, codes and norms together.

At 2 bits the errors of single matrices no longer add up: what one layer loses, another has to make up for. As in
blockwise quantization-aware training (M. Chen et al., "EfficientQAT", arXiv 2407.11062), every weight has a dense
value behind its code and receives the gradient of `Ŵ` (straight-through); codebooks and scales are trained beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...engine.blocks import BlockStream, real_tokens, run_calls
from ...engine.session import BlockResult
from ...kernels.packing import unpack_codes
from .coded import Coded, as_stored
from .configuration import CodebookConfig
from .mathematics import nearest_codes
from .weight import FORMAT_TENSORS, PackedWeight

# Adam's rates: of the values behind the codes in units of the scale, of codebooks in the same units, and of scales and
# norms relative to themselves.
LATENT_RATE, BOOK_RATE, RELATIVE_RATE = 0.002, 0.002, 0.002
# One in so many sequences decides whether the tuned block is kept.
VALIDATION = 8
TINY = 1e-30


class TunedWeight(nn.Module):
    """The weight of a packed layer while it is tuned.

    Args:
        layer: packed; its codes, codebooks and scales are the start.
        dense: the weight it stands for. Values behind the codes start as near to it as the codes allow.
    """

    def __init__(self, layer: PackedWeight, dense: Float[Tensor, "rows columns"]) -> None:
        super().__init__()
        coded = _coded(layer)
        self.column_group, self.row_codebook = coded.column_group, coded.row_codebook
        self.empty = coded.scales == 0
        self.log_scales = nn.Parameter(coded.scales.clamp_min(TINY).log())
        self.codebooks = nn.Parameter(coded.codebooks)
        table = coded.tables()
        at = table.gather(1, coded.codes)
        low = table.gather(1, (coded.codes - 1).clamp_min(0))
        high = table.gather(1, (coded.codes + 1).clamp_max(table.shape[1] - 1))
        wished = torch.where(coded.wide_scales() > 0, dense / coded.wide_scales().clamp_min(TINY), at)
        at = torch.minimum(torch.maximum(wished, at + 0.45 * (low - at)), at + 0.45 * (high - at))
        self.latent = nn.Parameter(at)

    def coded(self) -> Coded:
        """The present codes, codebooks in ascending order."""
        with torch.no_grad():
            # Training may let two codes of a book change places.
            self.codebooks.copy_(self.codebooks.sort(dim=1).values)
            return self._coded()

    def _coded(self) -> Coded:
        codes = nearest_codes(self.latent.detach(), self.codebooks.detach()[self.row_codebook])
        scales = self.log_scales.exp().masked_fill(self.empty, 0)
        return Coded(codes, self.codebooks, scales, self.row_codebook, self.column_group)

    def forward(self) -> Float[Tensor, "rows columns"]:
        with torch.no_grad():
            self.codebooks.copy_(self.codebooks.sort(dim=1).values)
        coded = self._coded()
        # What the straight-through estimate adds is 0, and has the gradient of the values behind the codes.
        return coded.matrix() + coded.wide_scales() * (self.latent - self.latent.detach())


def _coded(layer: PackedWeight) -> Coded:
    matrix = layer.as_matrix()
    scales = matrix.scales.float()
    if matrix.row_scales is not None:
        scales = scales * matrix.row_scales.float()[:, None]
    rows = torch.arange(matrix.rows, device=scales.device)
    books_of_rows = matrix.books_of(rows)
    index = torch.zeros_like(rows) if books_of_rows is None else books_of_rows.long()
    codes = unpack_codes(matrix.packed, matrix.bits, matrix.columns).long()
    books = matrix.codebooks.detach().float()[:, : layer.format.codes]
    return Coded(codes, books, scales.detach(), index, matrix.column_group)


def tune_block(
    config: CodebookConfig,
    block: int,
    dense: Mapping[str, Callable[[], Tensor]],
    result: BlockResult,
    stream: BlockStream,
    targets: Sequence[Tensor],
) -> BlockResult:
    """Tune the packed layers of a block, and its norms and biases, where they stand.

    What does not lower the error on the validation sequences is undone.

    Args:
        dense: by path what gives the weight that a layer stands for, (rows, columns).
        stream: before the block.
        targets: the dense model's outputs of the block.
    """
    module = stream.anatomy.block(block)
    # Experts, whose tokens a step changes, stay as they are.
    layers: dict[str, Any] = {path: layer for path, layer in result.modules.items() if isinstance(layer, PackedWeight)}
    prefix = f"{stream.anatomy.block_paths[block]}."
    tables = {id(getattr(layer, name)) for layer in layers.values() for name in FORMAT_TENSORS}
    beside = {
        prefix + name: parameter
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.dim() < 2 and id(parameter) not in tables
    }
    before = {name: parameter.detach().clone() for name, parameter in beside.items()}
    stored = {path: _coded(layer) for path, layer in layers.items()}
    tuned = {path: TunedWeight(layer, dense[path]()) for path, layer in layers.items()}
    # A step a sequence: few tokens a step are worth more than few steps.
    task = _Task(module, stream.by_sequence(), block, [row for target in targets for row in target.split(1)])
    cut = max(len(task.targets) - max(len(task.targets) // VALIDATION, 1), 1)
    validation = range(cut, len(task.targets)) if len(task.targets) > 1 else range(1)
    generator = torch.Generator().manual_seed(config.seed + block)
    with torch.enable_grad(), _in_float32(module):
        start = task.error(validation)
        with _trained(list(beside.values())):
            _train(task, tuned, layers, list(beside.values()), config.block_epochs, cut, generator)
        for path, layer in layers.items():
            layer.fill(as_stored(tuned[path].coded(), layer.format.integer_scales))
        kept = task.error(validation) < start
    if kept:
        inside = {f"{path}.bias" for path in layers}
        changed = {name: parameter.detach().clone() for name, parameter in beside.items() if name not in inside}
        return replace(result, parameters=changed)
    with torch.no_grad():
        for path, layer in layers.items():
            layer.fill(stored[path])
        for name, parameter in beside.items():
            parameter.copy_(before[name])
    return result


def _train(
    task: _Task,
    tuned: dict[str, TunedWeight],
    layers: dict[str, Any],
    beside: list[nn.Parameter],
    epochs: int,
    sequences: int,
    generator: torch.Generator,
) -> None:
    """Adam with a falling rate, a sequence a step."""
    weights = list(tuned.values())
    groups: list[dict[str, Any]] = [
        {"params": [weight.latent for weight in weights], "lr": LATENT_RATE},
        {"params": [weight.codebooks for weight in weights], "lr": BOOK_RATE},
        {"params": [weight.log_scales for weight in weights], "lr": RELATIVE_RATE},
    ]
    for parameter in beside:
        groups.append({"params": [parameter], "lr": RELATIVE_RATE * float(parameter.detach().abs().mean())})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps = epochs * sequences
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.02))
    for _ in range(epochs):
        for sequence in torch.randperm(sequences, generator=generator).tolist():
            with _weights(tuned, layers):
                optimizer.zero_grad()
                task.loss(sequence).backward()
            optimizer.step()
            schedule.step()


@dataclass(frozen=True)
class _Task:
    """A block, the stream before it and the outputs that it should have, a sequence each."""

    module: nn.Module
    stream: BlockStream
    block: int
    targets: list[Tensor]

    def loss(self, sequence: int) -> Tensor:
        """Squared error of the block's output, every token's relative to the target's energy there: a few tokens of
        very large activations would outweigh all others."""
        with self.stream.text_positions(sequence):
            output, target = real_tokens(self._run(sequence)), real_tokens(self.targets[sequence].float())
            energy = target.square().mean(dim=-1)
            loss: Tensor = ((output - target).square().mean(dim=-1) / energy.clamp_min(TINY)).mean()
            return loss

    def error(self, sequences: range) -> float:
        with torch.no_grad():
            return sum(float(self.loss(sequence)) for sequence in sequences) / len(sequences)

    def _run(self, sequence: int) -> Tensor:
        calls = self.stream.calls(self.block, sequence)
        return run_calls(self.module, *tree_map(_float32, (self.stream.hidden[sequence], calls)))


@contextmanager
def _trained(parameters: list[nn.Parameter]) -> Iterator[None]:
    flags = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


@contextmanager
def _weights(tuned: dict[str, TunedWeight], layers: dict[str, Any]) -> Iterator[None]:
    """Let the layers compute with the weights that are tuned."""
    for path, layer in layers.items():
        weight = tuned[path]()
        layer.forward = lambda x, _layer=layer, _weight=weight: _layer.with_weight(x, _weight)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    dtypes = {parameter: parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    module.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
        for part, name, buffer in buffers:
            if buffer is not None and buffer.dtype != part._buffers[name].dtype:  # type: ignore[union-attr]
                part._buffers[name] = buffer


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
