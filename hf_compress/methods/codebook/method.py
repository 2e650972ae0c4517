"""Learned codebooks as the engine runs them: embedding and head, then matrix by matrix within a block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...anatomy import Experts, ModelAnatomy, dense_rows, weight_count
from ...engine.blocks import Batch, BlockStream, model_inputs, run_until, text_positions, warn_unreached
from ...engine.experts import ExpertStatistics, Place
from ...engine.input_grams import InputStatistics, collect_inputs
from ...engine.registry import register_method
from ...engine.report import ModuleReport
from ...engine.results import merged
from ...engine.session import OUTSIDE, BlockResult, Expectation, Method, Session
from ...errors import ConfigurationError, NumericalError
from ..sharing.method import LayerSharing
from ..sharing.modules import other_loops
from ..sharing.stepping import running_blocks
from . import mathematics
from .allocation import GRADIENT_TOKENS, allocate_bits, estimate_losses
from .coded import Coded
from .configuration import TERNARY, Bits, CodebookConfig
from .expected import expected_layout
from .experts import CodebookExperts
from .learning import code_matrices
from .modules import CodebookConv2d, CodebookEmbedding, CodebookLinear, CodebookSharedLinear, coded_layer
from .parts import Part, coded_experts, format_of, parts_of_block, parts_outside
from .tuning import tune_block

# How much of the residual stream's drift the last matrix of a block makes up for.
DRIFT_SHARE = 0.5
# Between the random numbers of the pieces of a block: more than any model has blocks.
SEEDS_APART = 2**20
# Tokens of the dense pass that measures the inputs of the head.
HEAD_TOKENS = 16384


@register_method
class LearnedCodebooks(Method[CodebookConfig, InputStatistics | None]):
    """k-means start, assignment with error feedback, then codebooks, scales and codes learned together."""

    config_class = CodebookConfig
    continues = ("linear", "conv1d", "experts", "attention", *LayerSharing.leaves)
    quick_weights = 2**20
    reaches_experts = True
    leaves = tuple(
        layer.layout_type
        for layer in (CodebookLinear, CodebookSharedLinear, CodebookConv2d, CodebookEmbedding, CodebookExperts)
    )

    def __init__(self, config: CodebookConfig, anatomy: ModelAnatomy) -> None:
        super().__init__(config, anatomy)
        self.needs_calibration = config.needs_data
        running = running_blocks(anatomy.model)
        if self.needs_calibration and running is not None and running.iterations != running.depth:
            raise ConfigurationError(
                f"the model runs {running.iterations} iterations in place of {running.depth} loops, and calibration "
                "goes through all loops. Call set_iterations(model) first, and with your number again after."
            )
        self.sequential = self.needs_calibration and config.order == "sequential"
        if config.reorder_channels and running is not None:
            raise ConfigurationError(
                "reorder_channels=True is for layers of their own: those that share a matrix would need one order for "
                "all of them. Leave it out."
            )
        found = [parts_of_block(config, anatomy, block) for block in range(len(anatomy))]
        self.parts = [parts for parts, _ in found]
        self.outside, alone = parts_outside(config, anatomy)
        # Where several loops share a matrix, its codes are for the inputs of all of them.
        self.other_loops = other_loops(anatomy.model) if self.needs_calibration else {}
        # Tuning takes a step a sequence, and all loops run outside the stream.
        self.spreads = self.needs_calibration and not config.block_epochs and not self.other_loops
        if config.average_bits is not None:
            self.needs_whole_model = "takes gradients through all blocks with average_bits"
        elif self.other_loops:
            self.needs_whole_model = "runs all loops of shared layers"
        self._batches: list[Batch] = []
        # Of the block that was compressed last, for its tuning.
        self._dense: dict[str, tuple[Part, Tensor, Tensor | None]] = {}
        self.left_alone = [*alone, *itertools.chain.from_iterable(reasons for _, reasons in found)]
        if not any([*self.parts, self.outside]):
            raise ConfigurationError("the recipe leaves every matrix of this model alone; there is nothing to do.")
        if config.reorder_channels and not any(part.channels for parts in self.parts for part in parts):
            raise ConfigurationError(
                f"reorder_channels=True: no channels of {type(anatomy.model).__name__} can be sorted: no MLP and no "
                "attention has all the matrices that share them among those that are coded. Leave it out."
            )

    def expect(self) -> Expectation:
        layout, slack = expected_layout(self.config, self.anatomy, [*itertools.chain(*self.parts), *self.outside])
        get = self.anatomy.model.get_submodule
        experts = [found for part in itertools.chain(*self.parts) if (found := Experts.of(get(part.path))) is not None]
        # Of the dense matrices; a block may have none.
        widths = [
            [dense_rows(get(part.path)).shape[1] for part in parts if Experts.of(get(part.path)) is None]
            for parts in (*self.parts, self.outside)
        ]
        width = max([*itertools.chain(*widths), *(max(found.width, found.hidden) for found in experts)])
        gradients = GRADIENT_TOKENS if self.config.average_bits is not None else 0
        if not self.needs_calibration:
            return Expectation(layout, width, gradient_tokens=gradients, slack_bytes=slack)
        of_experts = max((found.count * 8 * (found.width**2 + found.hidden**2) for found in experts), default=0)
        return Expectation(
            layout,
            width,
            # The Gram, its inverse's factor and the solver's copy; of experts, those of all.
            statistics_bytes=3 * 8 * width**2 + of_experts,
            sums_bytes=8 * max(sum(n**2 for n in own) for own in widths) + of_experts,
            gradient_tokens=gradients,
            slack_bytes=slack,
        )

    def survey(self, session: Session) -> None:
        session.left_alone.extend(self.left_alone)
        self._batches = session.batches if self.other_loops else []
        average = self.config.average_bits
        if average is None:
            return
        paths = [part.path for parts in self.parts for part in parts]
        sizes = [weight_count(self.anatomy.model.get_submodule(path)) for path in paths]
        losses = estimate_losses(session, self.config, paths)
        chosen = dict(zip(paths, allocate_bits(losses, sizes, average), strict=True))
        self._choose(chosen)
        share = sum(bits * size for bits, size in zip(chosen.values(), sizes, strict=True)) / sum(sizes)
        session.notes["average_bits"] = round(share, 4)

    def _choose(self, bits: dict[str, int]) -> None:
        self.parts = [[replace(part, bits=bits[part.path]) for part in parts] for parts in self.parts]

    def decisions(self) -> dict[str, Any] | None:
        if self.other_loops:
            return None  # a run that goes on needs the batches of the survey
        return {"bits": {part.path: part.bits for parts in self.parts for part in parts}}

    def restore(self, decisions: dict[str, Any]) -> None:
        self._choose(decisions["bits"])

    def compress_outside(self, session: Session) -> BlockResult | None:
        """Embedding and head, for the inputs of the head in the dense model."""
        result = BlockResult({}, [])
        away = [part.path for part in self.outside if dense_rows(self.anatomy.model.get_submodule(part.path)).is_meta]
        if away:
            raise ConfigurationError(f"{away} is offloaded; a table or head that is compressed has to be on a device.")
        head = self.anatomy.outside("head")
        statistics = None
        multiplied = [part.tied_head or part.path for part in self.outside if part.tied_head or part.path == head]
        if multiplied and self.needs_calibration:
            with session.whole_model(), collect_inputs(self.anatomy.model, multiplied, None) as statistics:
                run_until(self.anatomy.model, session.batches, multiplied[0], HEAD_TOKENS)
        for part in self.outside:
            generator = torch.Generator().manual_seed(self.config.seed - 1)
            gram = None if statistics is None else statistics.grams.get(part.tied_head or part.path)
            self._code(OUTSIDE, [part], gram, None, generator, result)
            if part.tied_head is not None:
                table: Any = result.modules[part.path]
                dense_head = self.anatomy.model.get_submodule(part.tied_head)
                result.modules[part.tied_head] = table.tied_head(dense_head, part.path)
        return result if self.outside else None

    def collect(self, block: int) -> AbstractContextManager[InputStatistics | None]:
        if not self.needs_calibration:
            return nullcontext()
        experts = self.anatomy.experts(block)
        paths = [part.path for part in self.parts[block]]
        own = None if experts is None or experts.path not in paths else experts
        paths = [path for path in paths if own is None or path != own.path]
        last = None
        if self.anatomy.mlp_feeds_residual(block):
            last = self.anatomy.mlp_path(block, "down")
        if not any(path in self.other_loops for path in paths):
            return collect_inputs(self.anatomy.model, paths, last if last in paths else None, experts=own)
        # What the stream has lost at one loop is nothing that the others should make up for.
        return collect_inputs(self.anatomy.model, paths, None, self._run_all_loops, self.other_loops, own)

    def _run_all_loops(self) -> None:
        """The whole model on the calibration data, as far as it is compressed by now."""
        model = self.anatomy.model.base_model
        for batch in self._batches:
            with torch.no_grad(), text_positions(batch):
                model(**model_inputs(model, batch))

    def sums(self, statistics: InputStatistics | None) -> dict[str, Tensor]:
        assert statistics is not None
        return statistics.sums()

    def observe(self, statistics: InputStatistics | None, output: Tensor, dense_output: Tensor) -> None:
        assert statistics is not None
        statistics.observe_drift(output, dense_output)

    def compress_block(self, block: int, statistics: InputStatistics | None) -> BlockResult:
        if self.sequential and self.config.block_epochs:  # for `refine_block`, which lets go of them
            get = self.anatomy.model.get_submodule
            coded = [part for part in self.parts[block] if Experts.of(get(part.path)) is None]
            self._dense = {part.path: (part, *self._dense_and_order(part)) for part in coded}
        return merged(task() for task in self.tasks(block, statistics))

    def tasks(self, block: int, statistics: InputStatistics | None) -> list[Callable[[], BlockResult]]:
        """The matrices with the same inputs together."""
        return [
            partial(self._code_together, block, number, parts, statistics)
            for number, parts in enumerate(self._together(block, statistics))
        ]

    def _code_together(
        self, block: int, number: int, parts: list[Part], statistics: InputStatistics | None
    ) -> BlockResult:
        experts = Experts.of(self.anatomy.model.get_submodule(parts[0].path), parts[0].path)
        gram = drift = None
        if statistics is not None and experts is None:
            gram = statistics.grams.get(parts[0].path)
            if gram is None:  # such as cross attention without an encoder
                warn_unreached([part.path for part in parts])
            drift = statistics.drift if parts[0].path == statistics.drift_path else None
        result = BlockResult({}, [])
        # Of its own: the pieces may be worked on by several processes.
        generator = torch.Generator().manual_seed(self.config.seed + block + SEEDS_APART * number)
        if experts is None:
            self._code(block, parts, gram, drift, generator, result)
        else:
            seen = None if statistics is None else statistics.experts
            self._code_experts(block, parts[0], experts, seen, generator, result)
        return result

    def _code_experts(
        self,
        block: int,
        part: Part,
        experts: Experts,
        seen: ExpertStatistics | None,
        generator: torch.Generator,
        result: BlockResult,
    ) -> None:
        """The experts of a block, one matrix after the other, added to `result` with a row of the report for each of
        the two kinds of matrices."""
        layer = coded_experts(self.config, experts, part.bits)
        if seen is not None:
            seen.warn_rare(part.path)
        places: tuple[Place, Place] = ("input", "inner")
        for name, weights, place in zip(layer.matrices, (experts.up, experts.down), places, strict=True):
            floor = None if seen is None else seen.floors(place)
            lost = energy = 0.0
            for expert in range(experts.count):
                gram = None if seen is None or floor is None else seen.gram(place, expert, floor)
                weight = weights[expert].float()
                try:
                    coded, gram = self._coded(part.bits, [weight], gram, None, generator)
                except NumericalError as failure:
                    raise NumericalError(f"{part.path}: expert {expert}: {failure}.") from failure
                layer.fill(name, expert, coded[0])
                lost += mathematics.output_energy(weight - coded[0].matrix(), gram)
                energy += mathematics.output_energy(weight, gram)
            count, width = weights.numel(), weights.element_size()
            stored, error = (count * width, layer.matrix_bytes(name)), lost / energy if energy > 0 else 0.0
            sizes = (8 * width, part.bits)
            result.rows.append(
                ModuleReport(block, f"{part.path}.{name}", part.kind, *sizes, count, count, error, *stored)
            )
        result.modules[part.path] = layer

    def refine_block(
        self, block: int, result: BlockResult, stream: BlockStream, targets: Sequence[Tensor]
    ) -> BlockResult:
        dense, self._dense = self._dense, {}
        if not self.config.block_epochs or not dense:
            return result
        # Written out one by one: a matrix in another order is a copy.
        weights = {path: partial(part.in_order, weight, order) for path, (part, weight, order) in dense.items()}
        return tune_block(self.config, block, weights, result, stream, targets)

    def _together(self, block: int, statistics: InputStatistics | None) -> list[list[Part]]:
        """The matrices of a block, those with the same inputs and bits together: they share sweeps over columns."""
        groups: dict[Any, list[Part]] = {}
        for part in self.parts[block]:
            alone = statistics is None or part.path == statistics.drift_path
            key = part.path if alone or statistics is None else id(statistics.grams.get(part.path, part))
            groups.setdefault((key, part.bits, part.reads), []).append(part)
        return list(groups.values())

    def _dense_and_order(self, part: Part) -> tuple[Float[Tensor, "rows columns"], Tensor | None]:
        """A dense matrix, and the order that its rows, or a reader's columns, are to have."""
        get = self.anatomy.model.get_submodule
        weight, channels = dense_rows(get(part.path)), part.channels
        if channels is None:
            return weight, None
        order = channels.order(dense_rows(get(channels.reader))).to(weight.device)
        return weight, channels.columns(order) if part.reads else channels.rows(order)

    def _code(
        self,
        block: int,
        parts: list[Part],
        gram: Float[Tensor, "n n"] | None,
        drift: Float[Tensor, "n d"] | None,
        generator: torch.Generator,
        result: BlockResult,
    ) -> None:
        """Matrices over the same inputs as packed layers, added to `result` with their rows of the report."""
        dense = [self.anatomy.model.get_submodule(part.path) for part in parts]
        found = [self._dense_and_order(part) for part in parts]
        weights = [part.in_order(*own).float() for part, own in zip(parts, found, strict=True)]
        order = found[0][1] if parts[0].reads else None  # alone then
        if drift is not None and order is not None:
            drift = drift[order.to(drift.device)]
        in_turn = [part.in_turn(self.config, len(weight)) for part, weight in zip(parts, weights, strict=True)]
        try:
            coded, gram = self._coded(parts[0].bits, weights, gram, drift, generator, order, in_turn)
        except NumericalError as failure:
            raise NumericalError(f"{parts[0].path}: {failure}.") from failure
        for part, module, (_, rows), weight, own in zip(parts, dense, found, weights, coded, strict=True):
            format = format_of(self.config, module, part, len(own.codebooks))
            layer = coded_layer(module, own, format, rows=None if part.reads else rows)
            result.modules[part.path] = layer
            count, width = weight.numel(), dense_rows(module).element_size()
            error = mathematics.relative_error(weight, own.matrix(), gram)
            sizes, stored = (8 * width, part.bits), (count * width, layer.stored_bytes())
            result.rows.append(ModuleReport(block, part.path, part.kind, *sizes, count, count, error, *stored))

    def _coded(
        self,
        bits: Bits,
        weights: list[Tensor],
        gram: Float[Tensor, "n n"] | None,
        drift: Float[Tensor, "n d"] | None,
        generator: torch.Generator,
        order: Tensor | None = None,
        in_turn: Sequence[bool] | None = None,
    ) -> tuple[list[Coded], Float[Tensor, "n n"] | None]:
        """Matrices over the same inputs as codes, and the damped Gram that they are for, in the `order` of columns if
        given; `weights` then hold what the drift asks for. Raises `NumericalError`."""
        if gram is not None and not gram.diagonal().any():
            gram = None  # inputs that are always zero tell nothing: the weights themselves count
        if gram is not None:
            gram = mathematics.damped(gram.to(weights[0].device), self.config.damping, order)
            if drift is not None:
                lost = torch.linalg.solve(gram, DRIFT_SHARE * drift.to(gram)).T.to(weights[0])
                # Weak inputs could make up for the drift with huge weights only.
                weights[0] = weights[0] + lost * (weights[0].norm() / lost.norm()).clamp_max(1).nan_to_num(0)
        codes = 3 if bits == TERNARY else 2 ** int(bits)
        return code_matrices(self.config, weights, gram, codes, generator, in_turn), gram
