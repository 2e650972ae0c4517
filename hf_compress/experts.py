"""Experts with fewer channels than the dense model's: what decomposition leaves of them."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from .anatomy.experts import Experts, up_name
from .layout import checked_size, register_module_type
from .resized import widened


@register_module_type
class ResizedExperts(nn.Module):
    """All experts of a block, each with the same number of channels, fewer than the dense model has.

    An instance is also one of the dense class: its forward pass, with every implementation that Transformers has for
    it, and the names and the order of dimensions of its parameters, so that Transformers' conversions between files
    and parameters hold as they are.
    """

    layout_type: ClassVar[str] = "experts"
    down_proj: nn.Parameter

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made when it is needed: pickles name the dense one.
        return _empty, (dense_class(self),), self.__dict__

    def spec(self) -> dict[str, Any]:
        return {"width": int(self.down_proj.shape[2])}

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> ResizedExperts:
        experts = dense_experts(dense)
        if set(spec) != {"width"}:
            raise ValueError(f"expected the field `width` alone, got {sorted(spec)}")
        width = checked_size(spec, "width", experts.width)
        shape = (experts.count, width * (2 if experts.gated else 1), experts.hidden)
        up = experts.down.new_empty(shape)
        return cls.from_tensors(dense, up, experts.down.new_empty((experts.count, experts.hidden, width)))

    @classmethod
    def from_tensors(
        cls, dense: Any, up: Float[Tensor, "experts rows hidden"], down: Float[Tensor, "experts hidden width"]
    ) -> ResizedExperts:
        """Experts that own `up` and `down`, in place of `dense` ones."""
        module = _empty(dense_class(dense))
        nn.Module.__init__(module)
        take_settings(module, dense)
        module.register_parameter(up_name(dense), nn.Parameter(up, requires_grad=up.is_floating_point()))
        module.register_parameter("down_proj", nn.Parameter(down, requires_grad=down.is_floating_point()))
        module.__dict__["intermediate_dim"] = int(down.shape[2])
        return module.train(dense.training)

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        """Zero rows and columns for the removed channels: an expert with them computes the same function."""
        name = up_name(self)
        up: dict[str, Tensor] = {name: self.get_parameter(name)}
        down: dict[str, Tensor] = {"down_proj": self.down_proj}
        return {**widened(up, dense, 2 if dense_experts(dense).gated else 1), **widened(down, dense)}


_CLASSES: dict[type[nn.Module], type[ResizedExperts]] = {}


def _resized(kind: type[nn.Module]) -> type[ResizedExperts]:
    """The class of smaller experts of a dense class."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Resized{kind.__name__}", (ResizedExperts, kind), {"__module__": __name__})
    return _CLASSES[kind]


def _empty(kind: type[nn.Module]) -> ResizedExperts:
    """An instance of that class with nothing in it yet."""
    module: ResizedExperts = object.__new__(_resized(kind))
    return module


def dense_class(module: nn.Module) -> type[nn.Module]:
    """The model's own class of a module of experts that may be a smaller one."""
    bases: list[type[nn.Module]] = [base for base in type(module).__mro__ if issubclass(base, nn.Module)]
    return next(base for base in bases if not issubclass(base, ResizedExperts))


def take_settings(module: nn.Module, dense: nn.Module) -> None:
    """What a module of experts knows beside its parameters: sizes, flags, the config, and its activation."""
    for name, value in dense.__dict__.items():
        # Not the hooks of Accelerate, and not what torch keeps in every module.
        if name == "_is_expert_parallel" or not (name.startswith("_") or name in ("training", "forward")):
            module.__dict__[name] = value
    for name, child in dense.named_children():
        module.add_module(name, child)


def dense_experts(dense: nn.Module) -> Experts:
    """The experts that a layout's entry replaces. Raises `ValueError` for any other module."""
    found = Experts.of(dense)
    if found is None:
        raise ValueError(f"replaces a {type(dense).__name__}, expected one with the experts of a block")
    return found
