"""A whole block tuned towards the dense block's output: codebooks, scales, codes and norms together.

At 2 bits the errors of single matrices no longer add up: what one layer loses, another has to make up for. As in
blockwise quantization-aware training (M. Chen et al., "EfficientQAT", arXiv 2407.11062), every weight has a dense
value behind its code and receives the gradient of `Ŵ` (straight-through); codebooks and scales are trained beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...engine.blocks import BlockStream, real_tokens
from ...engine.session import BlockResult
from ...kernels.packing import unpack_codes
from .configuration import CodebookConfig
from .mathematics import Coded, as_stored
from .modules import CodebookConv2d
from .weight import PackedWeight

# Adam's rates: of the values behind the codes in units of the scale, of codebooks in the same units, and of scales and
# norms relative to themselves.
LATENT_RATE, BOOK_RATE, RELATIVE_RATE = 0.002, 0.002, 0.002
# The share of batches that decides whether the tuned block is kept.
VALIDATION = 8


class TunedWeight(nn.Module):
    """The weight of a packed layer while it is tuned.

    Args:
        layer: packed; its codes, codebooks and scales are the start.
        dense: the weight it stands for. Values behind the codes start as near to it as the codes allow.
    """

    def __init__(self, layer: PackedWeight, dense: Float[Tensor, "rows columns"] | None) -> None:
        super().__init__()
        self.layer = layer
        coded = _coded(layer)
        self.column_group, self.row_codebook = coded.column_group, coded.row_codebook
        self.empty = coded.scales == 0
        self.log_scales = nn.Parameter(coded.scales.clamp_min(1e-30).log())
        self.codebooks = nn.Parameter(coded.codebooks)
        table = coded.tables()
        at = table.gather(1, coded.codes)
        if dense is not None:
            low = table.gather(1, (coded.codes - 1).clamp_min(0))
            high = table.gather(1, (coded.codes + 1).clamp_max(table.shape[1] - 1))
            wished = torch.where(coded.wide_scales() > 0, dense / coded.wide_scales().clamp_min(1e-30), at)
            at = torch.minimum(torch.maximum(wished, at + 0.45 * (low - at)), at + 0.45 * (high - at))
        self.latent = nn.Parameter(at)

    def coded(self) -> Coded:
        """The present codes, codebooks in ascending order."""
        with torch.no_grad():
            books = self.codebooks.sort(dim=1).values
            table = books[self.row_codebook]
            between = (table[:, 1:] + table[:, :-1]) / 2
            codes = torch.zeros(self.latent.shape, dtype=torch.long, device=self.latent.device)
            for boundary in between.T:
                codes += self.latent > boundary[:, None]
            scales = self.log_scales.exp().masked_fill(self.empty, 0)
            return Coded(codes, books, scales, self.row_codebook, self.column_group)

    def forward(self) -> Float[Tensor, "rows columns"]:
        with torch.no_grad():
            # Training may let two codes of a book change places.
            self.codebooks.copy_(self.codebooks.sort(dim=1).values)
            codes = self.coded().codes
        chosen = self.codebooks[self.row_codebook].gather(1, codes)
        scales = self.log_scales.exp().masked_fill(self.empty, 0)
        wide = scales.repeat_interleave(self.column_group, dim=1)[:, : codes.shape[1]]
        return wide * (chosen + self.latent - self.latent.detach())


def _coded(layer: PackedWeight) -> Coded:
    matrix = layer.as_matrix()
    scales = matrix.scales.float()
    if matrix.row_scales is not None:
        scales = scales * matrix.row_scales.float()[:, None]
    rows = matrix.row_codebook
    index = torch.zeros(matrix.rows, dtype=torch.long, device=scales.device) if rows is None else rows.long()
    codes = unpack_codes(matrix.packed, matrix.bits, matrix.columns).long()
    books = matrix.codebooks.detach().float()[:, : layer.format.codes]
    return Coded(codes, books, scales.detach(), index, matrix.column_group)


def tune_block(
    config: CodebookConfig,
    block: int,
    dense: dict[str, Tensor],
    result: BlockResult,
    stream: BlockStream,
    targets: list[Tensor],
    epochs: int,
) -> BlockResult:
    """Tune the packed layers of a block, and its norms and biases, where they stand.

    What does not lower the error on the validation batches is undone.

    Args:
        dense: weights that the layers stand for, (rows, columns), by path; may lack some.
        stream: before the block.
        targets: the dense model's outputs of the block.
    """
    module, model = stream.anatomy.block(block), stream.anatomy.model
    # A step a sequence: few tokens a step are worth more than few steps.
    stream, targets = stream.by_sequence(), [row for target in targets for row in target.split(1)]
    layers: dict[str, Any] = dict(result.modules)
    tuned = {path: TunedWeight(layer, dense.get(path)) for path, layer in layers.items()}
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    biases = {id(layer.bias) for layer in layers.values() if getattr(layer, "bias", None) is not None}
    prefix = f"{stream.anatomy.block_paths[block]}."
    beside = {
        prefix + name: parameter
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and (id(parameter) not in inside or id(parameter) in biases)
    }
    before = {name: parameter.detach().clone() for name, parameter in beside.items()}
    own_dtype = model.dtype
    cut = max(len(stream) - max(len(stream) // VALIDATION, 1), 1)
    training, validation = range(cut), range(cut, len(stream)) if len(stream) > 1 else range(1)
    stored = [_coded(layer) for layer in layers.values()]
    with torch.enable_grad(), _in_float32(module), _seeded(config.seed + block):
        start = _error(module, stream, block, targets, validation)
        groups = [
            {"params": [weight.latent for weight in tuned.values()], "lr": LATENT_RATE},
            {"params": [weight.codebooks for weight in tuned.values()], "lr": BOOK_RATE},
            {"params": [weight.log_scales for weight in tuned.values()], "lr": RELATIVE_RATE},
            *(
                {"params": [parameter], "lr": RELATIVE_RATE * float(parameter.detach().abs().mean())}
                for parameter in beside.values()
            ),
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        steps = epochs * len(training)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.02))
        flags = {parameter: parameter.requires_grad for parameter in beside.values()}
        for parameter in beside.values():
            parameter.requires_grad_(True)
        for _ in range(epochs):
            for batch in torch.randperm(len(training)).tolist():
                with _weights(tuned, layers):
                    loss = _loss(module, stream, block, targets, batch)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
                schedule.step()
        for path, layer in layers.items():
            layer.fill(as_stored(tuned[path].coded(), layer.format.integer_scales))
        end = _error(module, stream, block, targets, validation)
    kept = end < start
    with torch.no_grad():
        for layer, coded in zip(layers.values(), stored, strict=True):
            if not kept:
                layer.fill(coded)
        for name, parameter in beside.items():
            parameter.requires_grad_(flags[parameter])
            if not kept:
                parameter.copy_(before[name])
    parameters = {
        name: parameter.detach().to(own_dtype) for name, parameter in beside.items() if id(parameter) not in biases
    }
    return replace(result, parameters=parameters) if kept else result


@contextmanager
def _weights(tuned: dict[str, TunedWeight], layers: dict[str, Any]) -> Iterator[None]:
    """Let the layers compute with the weights that are tuned."""
    for path, layer in layers.items():
        weight = tuned[path]()
        layer.forward = lambda x, _layer=layer, _weight=weight: _product(_layer, x, _weight)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _product(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, CodebookConv2d):
        convolved: Tensor = layer._conv_forward(x, weight.unflatten(1, layer.filter_shape), layer.bias)
        return convolved
    return nn.functional.linear(x, weight, layer.bias)


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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _run(module: nn.Module, stream: BlockStream, block: int, batch: int) -> Tensor:
    args, kwargs = stream.arguments(block, batch)
    wide = tree_map(_float32, (stream.hidden[batch], args, kwargs))
    output = module(wide[0], *wide[1], **wide[2])
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _loss(module: nn.Module, stream: BlockStream, block: int, targets: list[Tensor], batch: int) -> Tensor:
    """Squared error of the block's output, every token's relative to the target's energy there: a few tokens of very
    large activations would outweigh all others."""
    with stream.text_positions(batch):
        output, target = real_tokens(_run(module, stream, block, batch)), real_tokens(targets[batch].float())
        energy = target.square().mean(dim=-1)
        return ((output - target).square().mean(dim=-1) / energy.clamp_min(1e-30)).mean()


def _error(module: nn.Module, stream: BlockStream, block: int, targets: list[Tensor], batches: range) -> float:
    with torch.no_grad():
        return sum(float(_loss(module, stream, block, targets, batch)) for batch in batches) / len(batches)
