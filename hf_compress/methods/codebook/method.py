"""Learned codebooks as the engine runs them: matrix by matrix within a block."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import ModelAnatomy
from ...engine.exclusion import is_excluded
from ...engine.registry import register_method
from ...engine.report import ModuleReport
from ...engine.session import BlockResult, Expectation, Method, Session
from ...errors import ConfigurationError, NumericalError
from . import mathematics
from .configuration import CODED_KINDS, CodebookConfig, CodedKind
from .mathematics import Coded
from .modules import CodebookLinear
from .statistics import InputStatistics, collect_inputs

# How much of the residual stream's drift the last matrix of a block makes up for.
DRIFT_SHARE = 0.5


@dataclass(frozen=True)
class Part:
    """One matrix to be coded."""

    path: str
    kind: CodedKind
    bits: int


@register_method
class LearnedCodebooks(Method[CodebookConfig, InputStatistics | None]):
    """k-means start, assignment with error feedback, then codebooks, scales and codes learned in turn."""

    config_class = CodebookConfig

    def __init__(self, config: CodebookConfig, anatomy: ModelAnatomy) -> None:
        super().__init__(config, anatomy)
        self.needs_calibration = config.learning != "none"
        self.sequential = self.needs_calibration and config.order == "sequential"
        self.left_alone: list[str] = []
        self.parts = [self._parts_of(block) for block in range(len(anatomy))]

    def _parts_of(self, block: int) -> list[Part]:
        parts = []
        for path, kind in self.anatomy.block_matrices(block):
            assert kind in CODED_KINDS
            bits = self.config.bits_of(kind)
            if bits is None or is_excluded(path, self.config.modules_to_not_convert):
                self.left_alone.append(f"{path}: " + ("no bits for its kind" if bits is None else "excluded"))
                continue
            part = Part(path, kind, bits)
            columns = self._matrix(part).in_features
            if columns < 2**bits:
                raise ConfigurationError(
                    f"{path!r} has rows of {columns} weights, shorter than a codebook of {2**bits} codes. "
                    "Add it to modules_to_not_convert, or take fewer bits."
                )
            parts.append(part)
        return parts

    def expect(self) -> Expectation:
        width = saved = 0
        for part in itertools.chain.from_iterable(self.parts):
            matrix = self._matrix(part)
            width = max(width, matrix.in_features)
            saved += matrix.weight.numel() * matrix.weight.element_size() - _stored_bytes(self._empty(part))
        # The Gram, its inverse's factor and the solver's copy.
        return Expectation(0, width, 3 * 8 * width**2, saved_bytes=saved)

    def _empty(self, part: Part) -> CodebookLinear:
        """The layer of a part without memory, for its sizes."""
        dense = self._matrix(part)
        return CodebookLinear(
            dense.in_features,
            dense.out_features,
            bias=False,
            bits=part.bits,
            books=max(1, round(dense.out_features / self.config.rows_per_codebook)),
            column_group=self._column_group(dense.in_features),
            integer_scales=self.config.integer_scales,
            device="meta",
        )

    def _column_group(self, columns: int) -> int:
        return min(self.config.column_group or columns, columns)

    def survey(self, session: Session) -> None:
        session.left_alone.extend(self.left_alone)

    def decisions(self) -> dict[str, Any]:
        return {}

    def restore(self, decisions: dict[str, Any]) -> None:
        """Nothing is decided before the walk."""

    def collect(self, block: int) -> AbstractContextManager[InputStatistics | None]:
        if not self.needs_calibration:
            return nullcontext()
        paths = [part.path for part in self.parts[block]]
        last = None
        if self.anatomy.record.mlp is not None and self.anatomy.mlp_feeds_residual():
            last = self.anatomy.mlp_path(block, "down")
        return collect_inputs(self.anatomy.model, paths, last if last in paths else None)

    def observe(self, statistics: InputStatistics | None, output: Tensor, dense_output: Tensor) -> None:
        assert statistics is not None
        statistics.observe_drift(output, dense_output)

    def compress_block(self, block: int, statistics: InputStatistics | None) -> BlockResult:
        result = BlockResult({}, [])
        generator = torch.Generator().manual_seed(self.config.seed + block)
        for parts in self._together(block, statistics):
            try:
                coded, errors = self._code(parts, statistics, generator)
            except NumericalError as failure:
                raise NumericalError(f"{parts[0].path}: {failure}.") from failure
            for part, own, error in zip(parts, coded, errors, strict=True):
                dense = self._matrix(part)
                new = CodebookLinear.from_coded(dense, own, self.config.integer_scales)
                before, weights = 8 * dense.weight.element_size(), dense.weight.numel()
                sizes = (before * weights // 8, _stored_bytes(new))
                result.modules[part.path] = new
                result.rows.append(
                    ModuleReport(block, part.path, part.kind, before, part.bits, weights, weights, error, *sizes)
                )
        return result

    def _matrix(self, part: Part) -> nn.Linear:
        matrix = self.anatomy.model.get_submodule(part.path)
        assert isinstance(matrix, nn.Linear)
        return matrix

    def _together(self, block: int, statistics: InputStatistics | None) -> list[list[Part]]:
        """The matrices of a block, those with the same inputs and bits together: they share sweeps over columns."""
        groups: dict[Any, list[Part]] = {}
        for part in self.parts[block]:
            alone = statistics is None or part.path == statistics.drift_path
            key = part.path if alone or statistics is None else id(statistics.grams[part.path])
            groups.setdefault((key, part.bits), []).append(part)
        return list(groups.values())

    def _code(
        self, parts: list[Part], statistics: InputStatistics | None, generator: torch.Generator
    ) -> tuple[list[Coded], list[float]]:
        """Matrices over the same inputs as codes, and the relative squared errors of their outputs (without data: of
        their weights)."""
        config = self.config
        weights = [self._matrix(part).weight.detach().float() for part in parts]
        columns, path = weights[0].shape[1], parts[0].path
        gram = torch.eye(columns, dtype=torch.float64, device=weights[0].device)
        if statistics is not None:
            gram = mathematics.damped(statistics.grams[path].to(gram.device), config.damping)
            if statistics.drift is not None and path == statistics.drift_path:
                drift = DRIFT_SHARE * statistics.drift.to(gram)
                weights[0] = weights[0] + torch.linalg.solve(gram, drift).T.to(weights[0])
        starts = [
            mathematics.start(
                weight,
                gram.diagonal(),
                codes=2 ** parts[0].bits,
                column_group=self._column_group(columns),
                rows_per_codebook=config.rows_per_codebook,
                generator=generator,
            )
            for weight in weights
        ]
        coded, stacked = mathematics.as_stored(mathematics.join(starts), config.integer_scales), torch.cat(weights)
        if statistics is None:
            coded = mathematics.assign_nearest(stacked, coded)
        else:
            coded = mathematics.assign_with_feedback(stacked, gram, coded)
            if config.learning == "joint":
                coded = self._learn(stacked, gram, coded)
        result = mathematics.split(coded, starts)
        errors = [
            mathematics.relative_error(weight, own.matrix(), gram.float())
            for weight, own in zip(weights, result, strict=True)
        ]
        return result, errors

    def _learn(self, weight: Tensor, gram: Tensor, coded: Coded) -> Coded:
        """Codes, scales and codebooks in turn, each at its optimum given the others, rounded as they are stored."""
        coded = mathematics.sweep_codes(weight, gram, coded)
        for _ in range(self.config.rounds):
            coded = mathematics.refit_scales(weight, gram, coded)
            coded = mathematics.refit_codebooks(weight, gram, coded)
            coded = mathematics.as_stored(coded, self.config.integer_scales)
            coded = mathematics.sweep_codes(weight, gram, coded)
        return coded


def _stored_bytes(module: CodebookLinear) -> int:
    """Bytes of everything that stands for the matrix, without the bias."""
    return sum(t.numel() * t.element_size() for t in module.buffers())
