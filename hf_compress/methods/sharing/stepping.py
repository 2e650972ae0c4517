"""Steps through shared blocks: which loops run, with what size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from ...anatomy import text_config
from ...checked import is_integer, is_number, is_path
from ...errors import ConfigurationError
from . import mathematics
from .configuration import Solver


@dataclass(frozen=True)
class Schedule:
    """Which loops run, and with what steps."""

    loops: tuple[int, ...]
    steps: tuple[float, ...]


def schedule_of(assigned: list[int], order: str, iterations: int | None, steps: list[float] | None) -> Schedule:
    """Raises `ConfigurationError` for iterations or steps that the sharing does not allow."""
    depth, groups = len(assigned), max(assigned) + 1
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int)):
        raise ConfigurationError(f"{iterations!r} iterations: expected a whole number from 1 to {depth}.")
    if steps is not None:
        numbers = all(isinstance(step, (int, float)) and 0 < step < float("inf") for step in steps)
        if not steps or not numbers:
            raise ConfigurationError(f"`steps` must be positive numbers, got {steps!r}.")
        if iterations not in (None, len(steps)):
            raise ConfigurationError(f"{iterations} iterations, and {len(steps)} `steps`; give one of the two.")
        if abs(sum(steps) - depth) > 1e-6 * depth:
            raise ConfigurationError(f"`steps` sum to {sum(steps):g}, and the model has a depth of {depth}.")
        iterations = len(steps)
    iterations = depth if iterations is None else iterations
    if not 1 <= iterations <= depth:
        raise ConfigurationError(f"{iterations} iterations: expected 1 to {depth}, the depth of the model.")
    if iterations == depth and steps is None:
        return Schedule(tuple(range(depth)), (1.0,) * depth)
    if groups == 1:
        found = mathematics.uniform_steps(iterations, depth) if steps is None else steps
        return Schedule(tuple(mathematics.loops_in_time(found, depth)), tuple(found))
    if steps is not None:
        raise ConfigurationError(f"`steps` are for a model of one shared block; this one has {groups}.")
    if order == "cycle":
        passes, rest = divmod(depth, groups)
        turns, left = divmod(iterations, groups)
        if rest or left or not turns:
            raise ConfigurationError(
                f"{iterations} iterations of a cycle of {groups} blocks: expected a multiple of {groups}"
                + (f" in a depth that is one (it is {depth})." if rest else ".")
            )
        size = passes / turns
        starts = mathematics.loops_in_time([size] * turns, passes)
        loops = [start * groups + block for start in starts for block in range(groups)]
        return Schedule(tuple(loops), (size,) * iterations)
    sizes = [assigned.count(group) for group in range(groups)]
    if iterations < groups:
        raise ConfigurationError(f"{iterations} iterations for {groups} groups of blocks: expected at least {groups}.")
    loops, found, first = [], [], 0
    for size, own in zip(sizes, mathematics.steps_of_groups(iterations, sizes), strict=True):
        loops += [first + loop for loop in mathematics.loops_in_time(own, size)]
        found += own
        first += size
    return Schedule(tuple(loops), tuple(found))


class Stepping:
    """Mixin of what runs the loops: iterations, steps and solver."""

    assigned: list[int]
    order: str
    solver: Solver
    scaled: list[str] | None
    schedule: Schedule
    #: Functions that a model with such a module offers as methods.
    model_methods: ClassVar[dict[str, Callable[..., Any]]] = {}

    def _remember(self, spec: dict[str, Any]) -> None:
        self.assigned, self.order, self.solver = list(spec["assigned"]), spec["order"], spec["solver"]
        self.scaled = None if spec["scaled"] is None else list(spec["scaled"])
        self.schedule = Schedule(tuple(spec["loops"]), tuple(spec["steps"]))

    def spec(self) -> dict[str, Any]:
        return {
            "assigned": self.assigned,
            "order": self.order,
            "solver": self.solver,
            "scaled": self.scaled,
            "loops": list(self.schedule.loops),
            "steps": list(self.schedule.steps),
        }

    @property
    def depth(self) -> int:
        """Loops of the full model."""
        return len(self.assigned)

    @property
    def iterations(self) -> int:
        """Block evaluations of a forward pass."""
        return len(self.schedule.loops)

    def set_schedule(self, schedule: Schedule, solver: Solver) -> None:
        """Raises `ConfigurationError` where the blocks cannot take steps of another size."""
        if any(step != 1.0 for step in schedule.steps) and self.scaled is None:
            raise ConfigurationError(
                "fewer iterations need blocks all of whose matrices are shared and whose two outputs go to the "
                "residual stream with no norm between."
            )
        self.schedule, self.solver = schedule, solver
        self.apply_schedule()

    def apply_schedule(self) -> None:
        """Hand steps and cache slots on to the blocks."""
        raise NotImplementedError


def checked_stepping(spec: dict[str, Any], depth: int, blocks: int) -> None:
    """Raises `ValueError` or `KeyError` for a spec that does not fit a model of this depth, which has so many blocks
    to choose from."""
    assigned, loops, steps = spec["assigned"], spec["loops"], spec["steps"]
    if not isinstance(assigned, list) or len(assigned) != depth:
        raise ValueError(f"`assigned` must name a block for each of {depth} layers")
    if not all(is_integer(block, 0, blocks - 1) for block in assigned):
        raise ValueError(f"`assigned` names a block that is not there: they are 0 to {blocks - 1}")
    if not isinstance(loops, list) or not isinstance(steps, list) or not 1 <= len(loops) == len(steps) <= depth:
        raise ValueError(f"`loops` and `steps` must be equally long, 1 to {depth}")
    if not all(is_integer(loop, 0, depth - 1) for loop in loops):
        raise ValueError("`loops` names a layer that is not there")
    if sorted(set(loops)) != loops:
        raise ValueError("`loops` must ascend: every layer runs once, in its place of the cache")
    if not all(is_number(step) and step > 0 for step in steps):
        raise ValueError("`steps` must be positive and finite numbers")
    if spec["solver"] not in ("euler", "adams_bashforth") or spec["order"] not in ("cycle", "sequence"):
        raise ValueError("`solver` or `order` is unknown")
    scaled = spec["scaled"]
    if scaled is not None and not (isinstance(scaled, list) and all(is_path(path) for path in scaled)):
        raise ValueError("`scaled` must be a list of module paths or null")
    if scaled is not None and len(set(scaled)) != len(scaled):
        raise ValueError("`scaled` names a module twice")
    if scaled is None and any(step != 1 for step in steps):
        raise ValueError("`steps` of another size than 1 need the modules that they scale")


def running_blocks(model: nn.Module) -> Any:
    """What runs the loops of a model that shares its blocks; `None` if it does not."""
    return next((module for module in model.modules() if isinstance(module, Stepping)), None)


def set_iterations(model: PreTrainedModel, iterations: int | None = None, steps: list[float] | None = None) -> None:
    """Let a model with shared blocks run fewer, larger steps, or all of them again.

    Args:
        model: one that `LayerSharingConfig` has made.
        iterations: block evaluations of a forward pass; all loops if neither this nor steps is given.
        steps: step sizes that sum to the depth.

    Raises:
        ConfigurationError: a model without shared blocks, or iterations that its sharing does not allow.
    """
    running = running_blocks(model)
    if running is None:
        raise ConfigurationError(f"{type(model).__name__} has no shared blocks; see LayerSharingConfig.")
    schedule = schedule_of(running.assigned, running.order, iterations, steps)
    check_layer_types(model, schedule)
    running.set_schedule(schedule, running.solver)


def check_layer_types(model: PreTrainedModel, schedule: Schedule) -> None:
    """Raises `ConfigurationError` where a loop would run with the attention mask of another kind of layer: models hand
    masks out by position."""
    types = getattr(text_config(model), "layer_types", None)
    if types is None:
        return
    wrong = next((loop for position, loop in enumerate(schedule.loops) if types[position] != types[loop]), None)
    if wrong is not None:
        raise ConfigurationError(
            f"with {len(schedule.loops)} iterations layer {wrong} ({types[wrong]}) would run in the place of a layer "
            "of another kind, and with its mask. Fewer iterations need layers of one kind."
        )


Stepping.model_methods = {"set_iterations": set_iterations}
