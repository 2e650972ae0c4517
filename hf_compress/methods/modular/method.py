"""Modular decomposition as the engine runs it: survey and allocate, then block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...anatomy import ModelAnatomy, require_parts, text_config
from ...calibration.statistics import cosine_distances
from ...engine.blocks import every_nth, real_tokens, take_tokens
from ...engine.registry import register_method
from ...engine.session import BlockResult, Expectation, Method, Session
from ...errors import ConfigurationError
from ...experts import ResizedExperts, dense_class
from ...resized import ResizedConv1D, ResizedLinear
from .compress import compress_block
from .configuration import KINDS, Kind, ModularDecompositionConfig
from .expected import attention_extras, layout_for_sizes
from .modules import DecomposedAttention
from .search import improve
from .sizes import Geometry, Sizes, allocate, divide_between_kinds, kind_reductions
from .statistics import BlockStatistics, collect_statistics
from .trial import shown, trial_losses

# Tokens of the dense pass that measures the blocks' influence: it settles long before the Grams do.
INFLUENCE_TOKENS = 8192
# How a kind's loss may grow with what it gives; the held-out sequences decide which comes nearest.
GROWTH_EXPONENTS = (1.3, 1.6, 2.0)
# A held-out loss within this of the best, in nats a token, is as good: then the division is taken that leaves more of
# the attention dense. Decomposed attention saves little time a generated token; smaller MLPs save what they give.
WORTH = 0.01
# The same for the relative error of an encoder's hidden states: within this share of the least.
WORTH_SHARE = 0.05
# The last one spreads the reduction almost evenly.
TEMPERATURES = (0.02, 0.035, 0.05, 0.08, 0.15, 1.0)


@register_method
class ModularDecomposition(Method[ModularDecompositionConfig, BlockStatistics]):
    """Nyström for MLPs, CR or SVD for query/key, SVD for value/output, sizes by block influence."""

    config_class = ModularDecompositionConfig
    leaves = tuple(kind.layout_type for kind in (ResizedLinear, ResizedConv1D, ResizedExperts, DecomposedAttention))
    spreads = surveys_together = True
    reaches_experts = True
    reaches_left_dense = True

    def __init__(self, config: ModularDecompositionConfig, anatomy: ModelAnatomy) -> None:
        super().__init__(config, anatomy)
        require_parts(anatomy, "modular decomposition")
        self.sequential = config.is_sequential
        self.geometry = Geometry.of(anatomy, config)
        self.sizes: Sizes = self.geometry.dense()
        wanted = config.reduction if isinstance(config.reduction, float) else max(config.reduction.values())
        self.needs_calibration = wanted > 0
        if self.needs_calibration:
            # Checked here so that an unreachable reduction stops before any data is read.
            kind_reductions(self.geometry, config, self._kinds())
        if config.portable:
            self._check_portable()

    def _kinds(self) -> list[Kind]:
        """The kinds that may give."""
        if self.config.portable:
            return ["mlp"]
        if self.config.kinds == "auto":
            return self.geometry.kinds()
        return [kind for kind in KINDS if kind in self.config.kinds]

    def _check_portable(self) -> None:
        field = self._width_field()
        widths = {m.size for m in self.geometry.modules if m.kind == "mlp"}
        blocks = sum(m.kind == "mlp" for m in self.geometry.modules)
        if len(widths) != 1 or blocks != len(self.anatomy):
            raise ConfigurationError(
                f"portable=True needs one MLP width in all {len(self.anatomy)} blocks and all of them compressible; "
                f"found widths {sorted(widths)} in {blocks} blocks. Leave `portable` out."
            )
        config = text_config(self.anatomy.model)
        if field is None or not hasattr(config, field):
            raise ConfigurationError(
                f"portable=True needs one field for the width of all MLPs in the model's config, which "
                f"{type(config).__name__} does not have. Leave `portable` out."
            )
        outside = self._other_users_of(field, 2 * max(widths))
        if outside:
            raise ConfigurationError(
                f"portable=True changes {field!r} of the model's config, which is also the width of {outside[0]!r}, "
                "outside the blocks: the result could not be loaded. Leave `portable` out."
            )

    def _width_field(self) -> str | None:
        anatomy = self.anatomy
        parts = {anatomy.mlp(block) or anatomy.record.experts for block in range(len(anatomy))}
        fields = {part.width_field for part in parts if part is not None}
        # Of several none is the width of all.
        return fields.pop() if len(fields) == 1 else None

    def _other_users_of(self, field: str, width: int) -> list[str]:
        """Parameters outside the blocks whose shapes change with the field of the config."""
        model: Any = self.anatomy.model
        config = copy.deepcopy(model.config)
        setattr(_holder(config), field, width)
        with torch.device("meta"):
            wider = type(model)(config).state_dict()
        lists = tuple(f"{path}." for path in self.anatomy.block_paths)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(lists)}
        return [name for name, shape in shapes.items() if name in wider and wider[name].shape != shape]

    def expect(self) -> Expectation:
        geometry, config = self.geometry, self.config
        if not self.needs_calibration:
            return Expectation()
        shares = self._expected_shares()
        sizes = allocate(geometry, shares, None, config, 1.0)
        if config.portable:
            sizes = self._one_width(shares["mlp"])
        width = max((m.size for m in geometry.modules if m.kind == "mlp"), default=0)
        dtype_bytes = next(self.anatomy.model.parameters()).element_size()
        slack = 0
        if not (config.portable or (config.allocation == "uniform" and self._shares_are_fixed())):
            # Both this guess and the run's sizes are within half a step of the total.
            slack = max((m.multiple * m.cost for m in geometry.modules), default=0) * dtype_bytes
            slack += attention_extras(self.anatomy, self._kinds())
        held = 8 * width**2
        experts = [self.anatomy.experts(m.block) for m in geometry.modules if m.kind == "mlp"]
        several = max((found.count for found in experts if found is not None), default=0)
        # The float64 Gram, its factor and its inverse; of experts the Grams of all, and what solves one.
        judges = not self._shares_are_fixed() or config.allocation == "search" or config.temperature == "auto"
        return Expectation(
            layout_for_sizes(self.anatomy, geometry, sizes),
            largest_gram=width,
            statistics_bytes=(several + 3) * held,
            sums_bytes=max(several, 1) * held,
            judges=judges,
            slack_bytes=slack,
        )

    def _shares_are_fixed(self) -> bool:
        config = self.config
        return isinstance(config.reduction, dict) or config.kinds != "auto" or len(self._kinds()) == 1

    def _expected_shares(self) -> dict[Kind, float]:
        """What the probe will most likely choose: all from the MLPs, where they can give so much."""
        config, mlp = self.config, self.geometry.weights("mlp")
        if not self._shares_are_fixed() and isinstance(config.reduction, float) and mlp:
            share = config.reduction * self.geometry.block_linear / mlp
            if share <= config.max_module_reduction:
                return {"mlp": share}
        return kind_reductions(self.geometry, config, self._kinds())

    def survey(self, session: Session) -> None:
        config = self.config
        session.left_alone.extend(self.geometry.left_alone)
        if not self.needs_calibration:
            return
        influence = None if config.allocation == "uniform" or config.portable else block_influence(session)
        if influence is not None:
            session.notes["block_influence"] = [round(value, 4) for value in influence.tolist()]
        temperature = 0.05 if config.temperature == "auto" else config.temperature
        shares = self._shares(session, influence, temperature)
        session.notes["kind_reductions"] = {kind: round(share, 4) for kind, share in shares.items()}
        if config.temperature == "auto" and influence is not None:
            temperature = self._choose_temperature(session, shares, influence)
            session.notes["temperature"] = temperature
        self.sizes = allocate(self.geometry, shares, influence, config, temperature)
        if config.allocation == "search":
            self._require_held_out(session, 'allocation="search"', 'set allocation="block_influence"')
            self.sizes = improve(session, config, self.geometry, self.sizes)
        if config.portable:
            self.sizes = self._one_width(shares["mlp"])

    def _shares(self, session: Session, influence: torch.Tensor | None, temperature: float) -> dict[Kind, float]:
        """What share of its weights each kind gives: from the recipe, or divided by a probe of every kind alone."""
        config, kinds = self.config, self._kinds()
        if self._shares_are_fixed():
            return kind_reductions(self.geometry, config, kinds)
        assert isinstance(config.reduction, float)
        self._require_held_out(session, 'kinds="auto"', 'name the kinds, e.g. kinds=["mlp"]')
        probe = min(config.reduction, config.max_module_reduction)
        candidates = [allocate(self.geometry, {kind: probe}, influence, config, temperature) for kind in kinds]
        losses = trial_losses(session, config, [self.geometry.dense(), *candidates])
        dense, alone = losses[0], dict(zip(kinds, losses[1:], strict=True))
        name = shown(self.anatomy, dense)[0]
        session.notes["probe"] = {
            "reduction_of_each_kind_alone": probe,
            f"dense_{name}": shown(self.anatomy, dense)[1],
            **{kind: shown(self.anatomy, loss)[1] for kind, loss in alone.items()},
        }
        divisions = [self._simplest_division(config.reduction, alone, dense)] + [
            divide_between_kinds(self.geometry, alone, dense, config.reduction, config.max_module_reduction, exponent)
            for exponent in GROWTH_EXPONENTS
        ]
        trials = [allocate(self.geometry, division, influence, config, temperature) for division in divisions]
        losses = trial_losses(session, config, trials)
        session.notes["division_trials"] = [
            {**{kind: round(share, 4) for kind, share in division.items()}, name: shown(self.anatomy, loss)[1]}
            for division, loss in zip(divisions, losses, strict=True)
        ]
        worth = WORTH if self.anatomy.record.decoder else WORTH_SHARE * min(losses)
        good = [division for division, loss in zip(divisions, losses, strict=True) if loss <= min(losses) + worth]
        return min(good, key=self._attention_given)

    def _simplest_division(self, reduction: float, alone: dict[Kind, float], dense: float) -> dict[Kind, float]:
        """All from the MLPs where they can give so much, otherwise from the cheapest kind first."""
        cap = self.config.max_module_reduction
        share = reduction * self.geometry.block_linear / max(self.geometry.weights("mlp"), 1)
        if share <= cap:
            return {"mlp": share}
        return divide_between_kinds(self.geometry, alone, dense, reduction, cap, exponent=1.0)

    def _attention_given(self, division: dict[Kind, float]) -> float:
        """Weights that a division takes from attention."""
        return sum(share * self.geometry.weights(kind) for kind, share in division.items() if kind != "mlp")

    def _choose_temperature(self, session: Session, shares: dict[Kind, float], influence: torch.Tensor) -> float:
        self._require_held_out(session, 'temperature="auto"', "give a number, e.g. temperature=0.05")
        candidates = [allocate(self.geometry, shares, influence, self.config, t) for t in TEMPERATURES]
        losses = trial_losses(session, self.config, candidates)
        session.notes["temperature_trials"] = {
            str(t): shown(self.anatomy, loss)[1] for t, loss in zip(TEMPERATURES, losses, strict=True)
        }
        return TEMPERATURES[losses.index(min(losses))]

    def _require_held_out(self, session: Session, option: str, way_out: str) -> None:
        by_tokens, found = self.anatomy.record.decoder, None
        if by_tokens and self.anatomy.model.get_output_embeddings() is None:
            found = f"no head on {type(self.anatomy.model).__name__}"
        elif not session.held_out:
            found = "no held-out sequence"
        elif by_tokens and any("input_ids" not in batch for batch in session.held_out):
            found = "a batch without `input_ids`"
        if found is not None:
            what = "the language-model loss" if by_tokens else "the error of the hidden states"
            head = ", load the model with its head" if by_tokens else ""
            raise ConfigurationError(
                f"{option} measures {what} on held-out calibration sequences, but there is {found}. "
                f"Give more data and num_held_out of 1 or more{head}, or {way_out}."
            )

    def _one_width(self, share: float) -> Sizes:
        """The same MLP width in every block, the nearest to the share that a step allows."""
        module = next(m for m in self.geometry.modules if m.kind == "mlp")
        steps = round(module.size * (1 - share) / module.multiple)
        width = min(max(steps, 1) * module.multiple, module.size)
        return [{**sizes, "mlp": width} for sizes in self.geometry.dense()]

    def decisions(self) -> dict[str, Any]:
        return {"sizes": self.sizes}

    def restore(self, decisions: dict[str, Any]) -> None:
        self.sizes = decisions["sizes"]

    def _reduced(self, block: int) -> dict[Kind, int]:
        """The new size of every kind of a block that gives something."""
        modules = [m for m in self.geometry.modules if m.block == block]
        return {m.kind: self.sizes[block][m.kind] for m in modules if self.sizes[block][m.kind] < m.size}

    def collect(self, block: int) -> AbstractContextManager[BlockStatistics]:
        return collect_statistics(self.anatomy, block, set(self._reduced(block)))

    def observe(self, statistics: BlockStatistics, output: Tensor, dense_output: Tensor) -> None:
        statistics.observe_drift(output, dense_output)

    def sums(self, statistics: BlockStatistics) -> dict[str, Tensor]:
        return statistics.sums()

    def compress_block(self, block: int, statistics: BlockStatistics) -> BlockResult:
        return compress_block(self.anatomy, self.config, block, self._reduced(block), statistics)

    def tasks(self, block: int, statistics: BlockStatistics) -> list[Callable[[], BlockResult]]:
        """MLP and attention, each by itself."""
        reduced = self._reduced(block)
        parts: list[dict[Kind, int]] = [{}, {}]
        for kind, size in reduced.items():
            parts[kind != "mlp"][kind] = size
        return [partial(compress_block, self.anatomy, self.config, block, part, statistics) for part in parts if part]

    def finish(self) -> None:
        """In portable mode, turn the MLPs into the ones that the model's class builds by itself."""
        if not self.config.portable or not self.needs_calibration:
            return
        model, field = self.anatomy.model, self._width_field()
        assert field is not None
        for block in range(len(self.anatomy)):
            experts = self.anatomy.experts(block)
            if experts is not None:
                experts.module.__class__ = dense_class(experts.module)
                inputs = experts.width
                continue
            for path in self.anatomy.mlp_paths(block).values():
                layer: Any = model.get_submodule(path)
                with torch.device("meta"):
                    inputs, outputs = layer.in_features, layer.out_features
                    plain = Conv1D(outputs, inputs) if isinstance(layer, Conv1D) else nn.Linear(inputs, outputs)
                plain.weight, plain.bias = layer.weight, layer.bias
                model.set_submodule(path, plain)
            owner = model.get_submodule(path.rpartition(".")[0])
            if hasattr(owner, field):
                setattr(owner, field, inputs)
        # An encoder and a decoder have copies of the config.
        parents = {path[: path.rindex(".")] for path in self.anatomy.block_paths}
        parts = [part for path in parents for part in _ancestors(model, path) if isinstance(part, PreTrainedModel)]
        for config in [_holder(model.config), *(_holder(part.config) for part in parts)]:
            if hasattr(config, field):
                setattr(config, field, inputs)


def _holder(config: Any) -> Any:
    """The config of the language part where it is one of its own; Transformers hands out a copy of the whole for an
    encoder-decoder."""
    found = config.get_text_config(decoder=True)
    return found if any(value is found for value in vars(config).values()) else config


def _ancestors(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The model and the modules on the way to a path."""
    yield model
    for name in path.split("."):
        model = model.get_submodule(name)
        yield model


def block_influence(session: Session) -> torch.Tensor:
    """`s_i = 1 − E[cos(x_in, x_out)]` over the residual stream of a dense pass (MoDeGPT, section 3.3), (blocks,)."""
    processes, blocks = session.processes, range(len(session.anatomy))

    def sums() -> list[tuple[float, int]]:
        """The distances and how many they are, over the sequences of this process."""
        batches = every_nth(take_tokens(session.batches, INFLUENCE_TOKENS), processes.rank, processes.size)
        if not batches:
            return [(0.0, 0)] * len(blocks)
        stream, found = session.stream(batches), []
        for block in session.progress(blocks, "survey"):
            stream.come_to(block)
            before = stream.hidden.copy()
            stream.advance(block)
            distance, count = 0.0, 0
            for batch, (x, y) in enumerate(zip(before, stream.hidden, strict=True)):
                with stream.text_positions(batch):
                    part = cosine_distances(real_tokens(x), real_tokens(y))
                distance, count = distance + part[0], count + part[1]
            found.append((distance, count))
        return found

    parts = processes.each(sums)
    influence = [sum(own[block][0] for own in parts) / sum(own[block][1] for own in parts) for block in blocks]
    return torch.tensor(influence, dtype=torch.float64)
