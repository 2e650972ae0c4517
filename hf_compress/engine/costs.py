"""What a stage has to do, counted from shapes: operations and bytes, as the code does them. No rates here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..anatomy import ModelAnatomy, resolve_anatomy, text_config, weight_count
from ..configuration import CompressionConfig
from ..errors import ConfigurationError
from ..layout import replay
from .memory import Workload
from .registry import create_method
from .scaling import gram_flops
from .session import Method
from .weights import count_weights, stored_bytes

KINDS = ("mlp", "query_key", "value_output")
DOUBLE = 8
# Of a symmetric eigendecomposition with vectors, times n³: reduction to three diagonals, its solution, and the way
# back. What the solution takes depends on the data; head-sized ones hardly count beside the MLP.
EIGENVECTORS = 9


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a block that its work depends on.

    Args:
        hidden, inner: of the residual stream, and between the MLP's projections.
        heads, key_heads, head_dim: of the attention.
        weights: of all matrices.
        rotary: whether queries and keys are turned.
        reduced: what is left of the kinds that give: MLP width, query and key dimensions, value dimensions.
    """

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    weights: int
    rotary: bool
    reduced: tuple[tuple[str, int], ...]

    def forward_flops(self, length: int) -> int:
        """A token of a sequence of `length`; scores are counted in full, which a causal kernel halves."""
        return 2 * self.weights + 4 * length * self.heads * self.head_dim

    def statistics_flops(self, kinds: Collection[str], sequential: bool) -> int:
        """A token: Grams of the MLP's inner channels and of the heads; in sequential order also the drift."""
        of_head = 2 * self.head_dim**2
        total = 0
        if "mlp" in kinds:
            total += gram_flops(1, self.inner) + (2 * self.inner * self.hidden if sequential else 0)
        if "query_key" in kinds:
            total += (self.heads + self.key_heads) * of_head
        return total + (self.key_heads * of_head if "value_output" in kinds else 0)

    def sum_bytes(self, kinds: Collection[str], sequential: bool) -> int:
        """Of the sums, whole matrices in float64."""
        of_head = self.key_heads * self.head_dim**2
        total = 0
        if "mlp" in kinds:
            total += self.inner**2 + (self.inner * self.hidden if sequential else 0)
        if "query_key" in kinds:  # also the sum of the keys and how many they are
            total += 2 * of_head + self.key_heads * self.head_dim + 1
        return DOUBLE * (total + (of_head if "value_output" in kinds else 0))

    def tasks(self, sizes: Mapping[str, int], sequential: bool) -> tuple[int, ...]:
        """Operations of the MLP's solution and of the attention's, where they are reduced."""
        n, d = self.inner, self.hidden
        found = []
        if "mlp" in sizes:
            # Two Cholesky factorisations, an inverse from the first, LᵀW, and the triangular system of what is kept.
            mlp = 2 * n**3 // 3 + 2 * n**3 // 3 + 2 * n**2 * d + sizes["mlp"] ** 2 * d
            found.append(mlp + (n**2 * d if sequential else 0))
        attention, side = 0, self.head_dim
        if "query_key" in sizes and not self.rotary:  # turned ones are chosen from diagonals
            attention += self.key_heads * (2 * EIGENVECTORS + 8) * side**3
        if "value_output" in sizes:
            outputs, kept = self.heads // self.key_heads * d, sizes["value_output"]
            # Two eigendecompositions and roots; products with the outputs for the basis, the error and the weights.
            products = 10 * side**2 * outputs + 2 * side * kept * (outputs + d)
            attention += self.key_heads * ((2 * EIGENVECTORS + 8) * side**3 + products)
        if attention:
            found.append(attention)
        return tuple(found)


@dataclass(frozen=True)
class SurveyCosts:
    """What is done before the first block: one dense pass for the blocks' influence, and a walk for every probe that
    compares allocations: a stream for the statistics of all kinds, and one of held-out text an allocation.

    Args:
        length: tokens of a sequence.
        influence_tokens, probe_tokens, judged_tokens: of the pass for the influence, of a probe's statistics, and
            held-out ones of an allocation.
        allocations: of every probe.
        forward_flops, head_flops, statistics_flops: a token of one pass through all blocks, the head, all statistics.
        solve_flops: of every block's factorisation, which serves all allocations.
        sum_bytes: of the statistics of all blocks.
        dealt: whether the held-out sequences of all allocations are dealt out over the processes, not only those of
            one.
        seconds: that the recipe gives a search.
    """

    length: int
    influence_tokens: int = 0
    probe_tokens: int = 0
    judged_tokens: int = 0
    allocations: tuple[int, ...] = ()
    forward_flops: int = 0
    head_flops: int = 0
    statistics_flops: int = 0
    solve_flops: tuple[int, ...] = ()
    sum_bytes: int = 0
    dealt: bool = True
    seconds: float = 0.0

    @property
    def passes(self) -> int:
        """How often all blocks are gone through."""
        return bool(self.influence_tokens) + len(self.allocations)

    def flops(self, devices: int) -> dict[str, int]:
        """Operations of the busiest device, by their kind."""

        def own(tokens: int, streams: int = 1) -> int:
            sequences = -(-tokens // self.length)
            each = -(-streams * sequences // devices) if self.dealt else streams * -(-sequences // devices)
            # Alone it is as many tokens; otherwise whole sequences.
            return streams * tokens if devices == 1 else each * self.length

        probes = len(self.allocations)
        judged = sum(own(self.judged_tokens, count) for count in self.allocations)
        looked = own(self.influence_tokens) + probes * own(self.probe_tokens)
        groups = range(0, len(self.solve_flops), devices)
        return {
            "forward_flops": looked * self.forward_flops + judged * (self.forward_flops + self.head_flops),
            "statistics_flops": probes * own(self.probe_tokens) * self.statistics_flops,
            "solve_flops": probes * sum(max(self.solve_flops[start : start + devices]) for start in groups),
        }

    def traffic(self, result_bytes: int) -> int:
        """Bytes that a device sends: sums to their owner, and every allocation's new modules to everybody."""
        return len(self.allocations) * self.sum_bytes + sum(self.allocations) * result_bytes


@dataclass(frozen=True)
class StageCosts:
    """All blocks of a model in one stage.

    Args:
        forward_flops: a token of calibration data, all passes through all blocks.
        statistics_flops: the same of the statistics, which one of the passes gathers.
        tasks: operations of every block's factorisations that do not depend on each other.
        sum_bytes: of the statistics that processes add up, one number a block, float64.
        result_bytes: of the new modules of all blocks, which every process receives.
        sequential: whether a block waits for the results of the one before.
        model_bytes, block_bytes: of the whole model, and of all its blocks.
        survey: what comes before the first block.
    """

    forward_flops: int
    statistics_flops: int
    tasks: tuple[tuple[int, ...], ...]
    sum_bytes: tuple[int, ...]
    result_bytes: int
    sequential: bool
    model_bytes: int
    block_bytes: int
    survey: SurveyCosts

    def solved_in_turn(self, devices: int) -> int:
        """Operations one after the other: in dense order a block a device, in sequential order a task a device."""
        if self.sequential:
            return sum(max(sum(tasks[rank::devices]) for rank in range(devices)) for tasks in self.tasks)
        solved = [sum(tasks) for tasks in self.tasks]
        return sum(max(solved[start : start + devices]) for start in range(0, len(solved), devices))

    def traffic(self, devices: int) -> int:
        """Bytes that a device sends: sums to their owner (in sequential order to all, for which a ring goes round
        twice without each one's own share), and results to everybody."""
        if devices == 1:
            return 0
        sums = sum(self.sum_bytes)
        blocks = (2 * (devices - 1) * sums // devices if self.sequential else sums) + self.result_bytes
        return blocks + self.survey.traffic(self.result_bytes)

    def readings(self, devices: int) -> int:
        """How often the blocks are read where one is in memory at a time: once for every pass over all of them, and
        again to solve and replace those of a group, as the probes do."""
        again = (not self.sequential) + len(self.survey.allocations)
        return self.survey.passes + 1 + again * (devices > 1)


def count_costs(skeleton: PreTrainedModel, recipe: CompressionConfig, load: Workload) -> list[StageCosts]:
    """The stages of a recipe on a dense model on the meta device, whose modules are replaced on the way.

    Raises:
        ConfigurationError: a method whose work cannot be told from shapes.
    """
    costs = []
    for stage in recipe.stages:
        if stage.method != "modular_decomposition":
            raise ConfigurationError(
                f"on paper there is modular decomposition alone: the work of {type(stage).__name__} is not made of a "
                "few large products. measure_time=True (--time) rehearses it on this machine."
            )
        anatomy = resolve_anatomy(skeleton)
        if any(anatomy.experts_path(block) is not None for block in range(len(anatomy))):
            raise ConfigurationError(
                "on paper there are no experts: how many tokens each of them gets is not known from shapes. "
                "measure_time=True (--time) rehearses a run on this machine."
            )
        method = create_method(stage, anatomy)
        layout = method.expect().layout
        shapes = [block_shape(anatomy, block, layout) for block in range(len(anatomy))]
        sizes = {
            "model_bytes": count_weights(anatomy)[2],
            "block_bytes": sum(stored_bytes(anatomy.block(block)) for block in range(len(anatomy))),
        }
        survey = _survey(method, shapes, load)
        if layout:
            replay(skeleton, layout)
        new = sum(stored_bytes(skeleton.get_submodule(entry["path"])) for entry in layout)
        costs.append(_costs(shapes, method, load, result_bytes=new, survey=survey, **sizes))
    return costs


def _costs(shapes: list[BlockShape], method: Method[Any, Any], load: Workload, **counted: Any) -> StageCosts:
    order = method.sequential
    reduced = [dict(shape.reduced) for shape in shapes]
    # In sequential order a block runs dense, for its statistics, and compressed, which counts as dense.
    passes = (3 if order else 1) if method.needs_calibration else 0
    pairs = list(zip(shapes, reduced, strict=True))
    return StageCosts(
        forward_flops=passes * sum(shape.forward_flops(load.sequence_length) for shape in shapes),
        statistics_flops=sum(shape.statistics_flops(sizes, order) for shape, sizes in pairs),
        tasks=tuple(shape.tasks(sizes, order) for shape, sizes in pairs),
        sum_bytes=tuple(shape.sum_bytes(sizes, order) for shape, sizes in pairs),
        sequential=order,
        **counted,
    )


def block_shape(anatomy: ModelAnatomy, block: int, layout: list[dict[str, Any]]) -> BlockShape:
    """The sizes of a block, and what a layout leaves of them."""
    get, config = anatomy.model.get_submodule, text_config(anatomy.model)
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    specs = {entry["path"]: entry["spec"] for entry in layout}
    inner, reduced = 0, {}
    if anatomy.mlp(block) is not None:
        down = anatomy.mlp_path(block, "down")
        inner = weight_count(get(down)) // hidden
        if down in specs:
            reduced["mlp"] = int(specs[down]["in_features"])
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    rotary = False
    if anatomy.record.attention is not None:
        rotary = anatomy.record.attention.rotary is not None
        spec = specs.get(anatomy.attention_path(block), {})
        for kind, name in (("query_key", "query_key_dim"), ("value_output", "value_dim")):
            if spec.get(name, head_dim) < head_dim:
                reduced[kind] = int(spec[name])
    return BlockShape(
        hidden=hidden,
        inner=inner,
        heads=heads,
        key_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        weights=sum(weight_count(get(path)) for path, _ in anatomy.block_matrices(block)),
        rotary=rotary,
        reduced=tuple(reduced.items()),
    )


def _survey(method: Method[Any, Any], shapes: list[BlockShape], load: Workload) -> SurveyCosts:
    # The methods import the engine, so they cannot be imported above.
    from ..methods.modular.method import GROWTH_EXPONENTS, INFLUENCE_TOKENS, TEMPERATURES
    from ..methods.modular.trial import HELD_OUT_TOKENS, TRIAL_TOKENS

    config: Any = method.config
    if not method.needs_calibration or config.portable:
        return SurveyCosts(load.sequence_length)
    allocations: list[int] = []
    if config.kinds == "auto" and isinstance(config.reduction, float):
        # The dense model and every kind alone; then the simplest division and one for every way of growth.
        allocations += [1 + len(KINDS), 1 + len(GROWTH_EXPONENTS)]
    if config.temperature == "auto" and config.allocation != "uniform":
        allocations.append(len(TEMPERATURES))
    by_tokens = method.anatomy.record.decoder
    # Encoders are judged by their hidden states.
    vocabulary = int(text_config(method.anatomy.model).vocab_size) if by_tokens else 0
    return SurveyCosts(
        length=load.sequence_length,
        influence_tokens=0 if config.allocation == "uniform" else min(INFLUENCE_TOKENS, load.tokens),
        probe_tokens=min(TRIAL_TOKENS, load.tokens),
        judged_tokens=min(HELD_OUT_TOKENS, load.num_held_out * load.sequence_length),
        allocations=tuple(allocations),
        forward_flops=sum(shape.forward_flops(load.sequence_length) for shape in shapes),
        head_flops=2 * vocabulary * shapes[0].hidden,
        statistics_flops=sum(shape.statistics_flops(KINDS, False) for shape in shapes),
        # Heads are solved for every allocation, and hardly count.
        solve_flops=tuple(sum(shape.tasks({"mlp": shape.inner}, False)) for shape in shapes),
        sum_bytes=sum(shape.sum_bytes(KINDS, False) for shape in shapes),
        dealt=by_tokens,
        seconds=60 * config.search_minutes if config.allocation == "search" else 0.0,
    )
