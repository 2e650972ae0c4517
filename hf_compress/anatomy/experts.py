"""The experts of a block, as Transformers keeps them: all in one module, in parameters of three dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

# What the module is called with, in the order of its arguments.
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


@dataclass(frozen=True)
class Experts:
    """A module of experts, dense or of fewer channels: `down(activation(gate(x)) * up(x))`, or
    `down(activation(up(x)))` without a gate.

    Args:
        path: of the module in the model.
        module: its parameters are (experts, 2 · width, hidden), the gate's rows first, and (experts, hidden, width).
    """

    path: str
    module: Any

    @classmethod
    def of(cls, module: nn.Module, path: str = "") -> Experts | None:
        """The experts in a module; `None` if it has none that are dense."""
        both = [getattr(module, name, None) for name in (up_name(module), "down_proj")]
        dense = all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in both)
        return cls(path, module) if dense else None

    @property
    def up(self) -> Float[Tensor, "experts rows hidden"]:
        weight: Tensor = getattr(self.module, up_name(self.module)).detach()
        return weight

    @property
    def down(self) -> Float[Tensor, "experts hidden width"]:
        weight: Tensor = self.module.down_proj.detach()
        return weight

    @property
    def gated(self) -> bool:
        """Whether the first half of the rows of `up` is a gate."""
        return bool(getattr(self.module, "has_gate", True))

    @property
    def count(self) -> int:
        return int(self.down.shape[0])

    @property
    def hidden(self) -> int:
        return int(self.down.shape[1])

    @property
    def width(self) -> int:
        return int(self.down.shape[2])

    @property
    def weights(self) -> int:
        return self.up.numel() + self.down.numel()

    def inner(self, rows: Float[Tensor, "tokens hidden"], expert: int) -> Float[Tensor, "tokens width"]:
        """What the down projection of an expert reads."""
        return gated(self.module, nn.functional.linear(rows, self.up[expert]))


def up_name(module: Any) -> str:
    """The parameter with the gate and what it is multiplied with, or without a gate the latter alone."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def gated(module: Any, rows: Float[Tensor, "tokens rows"]) -> Float[Tensor, "tokens width"]:
    """The activation of a module of experts, with its gate if it has one."""
    found: Tensor = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    return found


def routed(
    arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Float[Tensor, "tokens hidden"], Tensor, Float[Tensor, "tokens chosen"]]:
    """What a module of experts was called with: hidden states, the experts of every token, and their weights."""
    given = dict(zip(ARGUMENTS, arguments, strict=False)) | keywords
    return given["hidden_states"], given["top_k_index"], given["top_k_weights"]


def chosen_tokens(index: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert that some token goes to: its number, the tokens, and where among their choices it stands.

    Args:
        index: (tokens, chosen); numbers of `count` and above stand for experts elsewhere.
    """
    flat = index.flatten()
    order = flat.argsort(stable=True)  # the tokens of an expert follow each other, in their own order
    numbers, sizes = flat[order].unique_consecutive(return_counts=True)
    for expert, own in zip(numbers.tolist(), order.split(sizes.tolist()), strict=True):
        if 0 <= expert < count:
            yield expert, own // index.shape[1], own % index.shape[1]


def expert_faults(path: str, module: Any) -> Iterator[str]:
    """What a module lacks to be one of experts as `ExpertsAnatomy` describes them."""
    if hasattr(type(module), "layout_type"):
        return  # of an earlier stage
    where = f"the {type(module).__name__} at {path!r}"
    experts = Experts.of(module, path)
    if experts is None:
        names = f"{up_name(module)!r} and 'down_proj'"
        yield f"`experts` needs parameters {names} of three dimensions, which {where} lacks"
        return
    for flag, wanted in (("has_bias", False), ("is_transposed", False), ("is_concatenated", True)):
        if getattr(module, flag, wanted) is not wanted:
            yield f"`experts` expects `{flag}` to be {wanted}, and it is not in {where}"
    takes = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    if (
        getattr(module, "has_post_expert_norm", False)
        or not hasattr(module, "act_fn")
        or not hasattr(type(module), "_apply_gate")
    ):
        yield (
            f"`experts` expects a class made with Transformers' `use_experts_implementation`, with an `act_fn` and no "
            f"norm after an expert; {where} takes {', '.join(takes)}"
        )
    up, down = tuple(experts.up.shape), tuple(experts.down.shape)
    wide = (experts.count, experts.width * (2 if experts.gated else 1), experts.hidden)
    if up != wide:
        yield f"{up_name(module)!r} is {up}, expected {wide} for a 'down_proj' of {down}, in {where}"
