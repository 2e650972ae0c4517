"""Pruning as the engine runs it: scores of all matrices, masks under one exact count, then block by block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...anatomy import ModelAnatomy, dense_rows
from ...engine.blocks import real_tokens, warn_unreached
from ...engine.registry import register_method
from ...engine.report import ModuleReport
from ...engine.session import BlockResult, Expectation, Method, Session
from ...errors import ConfigurationError, NumericalError
from .configuration import PruningConfig
from .expected import expected_layout, expected_structure
from .masks import has_lost_masks, lost_masks_error, open_layers, sparse_layer
from .mathematics import keep_best, keep_best_of_rows, kept_count
from .modules import SparseLinear
from .parts import Part, prunable_parts
from .scores import pruned_before, score_matrices
from .selection import select, sparsity_of, warn_if_undecided
from .structured import Structure, removable_groups

# More tokens than any batch has: gradients are taken of whole ones.
WHOLE_BATCH = 2**62
# Sums of squares of the inputs of a block's matrices.
Energies = dict[str, Float[Tensor, "columns"]]


@register_method
class Pruning(Method[PruningConfig, Energies | None]):
    """Single weights, or whole heads and columns, by a score."""

    config_class = PruningConfig
    continues = (SparseLinear.layout_type, "linear", "conv1d", "experts", "attention")
    leaves = (SparseLinear.layout_type,)

    def __init__(self, config: PruningConfig, anatomy: ModelAnatomy) -> None:
        super().__init__(config, anatomy)
        if has_lost_masks(anatomy.model):
            raise lost_masks_error()
        self.needs_calibration = config.needs_data
        self.sequential = self.spreads = config.criterion == "wanda"
        self.parts, self.left_alone = prunable_parts(config, anatomy)
        if config.criterion != "wanda":
            self.needs_whole_model = f"compares scores of all blocks with criterion={config.criterion!r}"
        self.structure: Structure | None = None
        if config.structured:
            if any(isinstance(anatomy.model.get_submodule(part.path), SparseLinear) for part in self.parts):
                raise ConfigurationError(
                    "PruningConfig: `structured=True` removes heads and columns of a dense model, and in this one "
                    "single weights are pruned already. Begin with the dense original."
                )
            self.structure = removable_groups(anatomy, self.parts)
            inside = {path for group in self.structure.groups for path in group.paths}
            self.left_alone += [f"{part.path}: no head or column" for part in self.parts if part.path not in inside]
        self.masks: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] | None = None

    @classmethod
    def continues_with(cls, config: PruningConfig) -> tuple[str, ...]:
        # Heads that were decomposed have sizes of their own, and cannot be counted off in the matrices.
        return (SparseLinear.layout_type, "linear") if config.structured else cls.continues

    @property
    def collects(self) -> bool:
        return self.config.criterion == "wanda"

    @staticmethod
    def reopen(model: PreTrainedModel, config: Any) -> None:
        open_layers(model, config.modules_to_not_convert)

    def expect(self) -> Expectation:
        model, config = self.anatomy.model, self.config
        if self.structure is not None:
            layout, slack = expected_structure(self.structure, config.sparsity)
            return Expectation(layout, slack_bytes=slack)
        weights = [dense_rows(model.get_submodule(part.path)) for part in self.parts]
        layout, slack = expected_layout(model, [part.path for part in self.parts], config)
        total, width = sum(weight.numel() for weight in weights), weights[0].element_size()
        # Scores in float32 and masks of all matrices at once, and gradients and their sums where they are asked for.
        scores = 0 if config.criterion == "wanda" else 5 * total
        gradients = (4 + width) * total if config.needs_gradients else 0
        # The places of the kept weights are unpacked, and blocks that run may keep a dense copy.
        growth = 4 * kept_count(total, config.sparsity) + (width * total if self.collects else 0)
        return Expectation(
            layout,
            statistics_bytes=scores + gradients,
            growth_bytes=growth,
            gradient_tokens=WHOLE_BATCH if config.needs_gradients else 0,
            slack_bytes=slack,
        )

    def survey(self, session: Session) -> None:
        session.left_alone.extend(self.left_alone)
        paths = [part.path for part in self.parts]
        self.before = pruned_before(self.anatomy, paths)
        if self.config.criterion == "wanda":
            return
        scores = score_matrices(session, self.config, paths)
        if self.structure is not None:
            self.structure.choose(scores, self.config.sparsity, self.config.compared)
            session.notes["removed_share"] = self.structure.warn_if_short(self.config)
            return
        transposed = [path for path in paths if isinstance(self.anatomy.model.get_submodule(path), Conv1D)]
        try:
            self.masks = select(scores, self.config.sparsity, self.config.compared, self.before, transposed)
        except NumericalError as failure:
            raise NumericalError(f"criterion {self.config.criterion!r}: {failure}.") from failure
        reached = sparsity_of(list(self.masks.values()))
        session.notes["sparsity"] = round(reached, 6)
        if self.before is not None and reached > self.config.sparsity + 0.005:
            warnings.warn(
                f"a sparsity of {self.config.sparsity} was asked for, and the model is pruned to {reached:.3f} "
                "already; nothing is un-pruned.",
                stacklevel=2,
            )
        warn_if_undecided(scores, self.masks)

    def decisions(self) -> None:
        """The masks are as large as the model: an interrupted run surveys again, which takes most of its time anyway,
        and finds the same."""
        return None

    def restore(self, decisions: dict[str, Any]) -> None:
        raise AssertionError("nothing was kept")

    def collect(self, block: int) -> AbstractContextManager[Energies | None]:
        if not self.collects:
            return nullcontext()
        paths = [part.path for part in self.parts if part.block == block]
        return _input_energies(self.anatomy.model, paths)

    def sums(self, statistics: Energies | None) -> dict[str, Tensor]:
        assert statistics is not None
        return statistics

    def compress_block(self, block: int, statistics: Energies | None) -> BlockResult:
        if self.structure is not None:
            return self.structure.compress_block(block)
        result = BlockResult({}, [])
        for part in self.parts:
            if part.block != block:
                continue
            module = self.anatomy.model.get_submodule(part.path)
            mask = self.masks.pop(part.path) if statistics is None else self._wanda(part, module, statistics)
            result.modules[part.path] = layer = sparse_layer(module, mask, self.config.values)
            result.rows.append(report_row(part, module, layer))
        return result

    def _wanda(self, part: Part, module: nn.Module, statistics: Energies) -> Tensor:
        """M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695)."""
        weight = dense_rows(module).float()
        score = weight.abs()
        if part.path in statistics:
            score = score * statistics[part.path].sqrt().to(weight)
        else:
            warn_unreached([part.path])
        among = None if self.before is None else self.before[part.path]
        among = among.T if among is not None and isinstance(module, Conv1D) else among
        try:
            if self.config.compared == "row":
                mask = keep_best_of_rows(score, kept_count(weight.shape[1], self.config.sparsity), among)
            else:
                kept = kept_count(weight.numel(), self.config.sparsity)
                mask = keep_best([score], kept, None if among is None else [among])[0]
        except NumericalError as failure:
            raise NumericalError(f"{part.path}: {failure}.") from failure
        return mask.T if isinstance(module, Conv1D) else mask


def report_row(part: Part, module: nn.Module, layer: SparseLinear) -> ModuleReport:
    """A matrix in the report; the error is that of the weights, relative and squared."""
    weight = dense_rows(module).double()
    lost = (weight - layer.matrix().detach().to(weight)).square().sum() / weight.square().sum().clamp_min(1e-300)
    count, bytes_before = weight.numel(), weight.numel() * dense_rows(module).element_size()
    kept = layer.format.nonzeros
    sizes = (1.0, float(f"{layer.density:.4g}"))
    return ModuleReport(
        part.block, part.path, part.kind, *sizes, count, kept, float(lost), bytes_before, layer.stored_bytes()
    )


@contextmanager
def _input_energies(model: nn.Module, paths: list[str]) -> Iterator[Energies]:
    energies: Energies = {}

    def add(path: str, states: Tensor) -> None:
        found = real_tokens(states.detach()).float().square().sum(dim=0, dtype=torch.float64)
        energies[path] = energies[path] + found if path in energies else found

    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, inputs, path=path: add(path, inputs[0]))
        for path in paths
    ]
    try:
        yield energies
    finally:
        for handle in handles:
            handle.remove()
