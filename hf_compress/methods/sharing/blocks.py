"""The list of blocks of a model that shares them; it decides which of them run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.albert.modeling_albert import AlbertTransformer

from ...checked import short
from ...errors import CompressionError
from ...layout import register_module_type
from . import mathematics
from .modules import SharedLinear
from .stepping import Schedule, Stepping, checked_stepping

# Attribute of an adapter's layer: what its output is scaled by.
_STEP = "_hf_compress_step"


@register_module_type
class SharedBlocks(Stepping, nn.ModuleList):
    """The blocks of a model, of which iterating yields those that run."""

    layout_type: ClassVar[str] = "shared_blocks"

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> SharedBlocks:
        if not isinstance(dense, nn.ModuleList):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an nn.ModuleList")
        checked_stepping(spec, len(dense), len(dense))
        blocks = cls(list(dense))
        blocks._remember(spec)
        return blocks

    def check_tensors(self) -> None:
        """The blocks inside have been replaced by now: give them their steps. Raises `ValueError` for blocks without
        the layers that are scaled."""
        _check_scaled(self._modules.values(), self.scaled or [])
        self.apply_schedule()

    def apply_schedule(self) -> None:
        for every in self._modules.values():
            _set_steps(every, self.scaled or [], 1.0)
        self._hand_on_steps()
        for position, loop in enumerate(self.schedule.loops):
            block: Any = self._modules[str(loop)]
            inside: list[Any] = list(block.modules())
            for module in inside:
                if hasattr(module, "layer_idx"):
                    module.layer_idx = position  # its slot in the cache

    def _hand_on_steps(self) -> None:
        for loop, step in zip(self.schedule.loops, self.schedule.steps, strict=True):
            _set_steps(self._modules[str(loop)], self.scaled or [], step)

    def _running(self) -> list[Any]:
        if not torch.compiler.is_compiling():
            self._hand_on_steps()  # an adapter may have been attached or removed since
        blocks: list[Any] = [self._modules[str(loop)] for loop in self.schedule.loops]
        if torch.compiler.is_compiling() and self.solver == "euler":
            return blocks
        blocks[0] = _CacheGuard(blocks[0], self.schedule)
        if self.solver == "adams_bashforth":
            trail: list[tuple[Tensor, float]] = []
            return [_Extrapolated(block, step, trail) for block, step in zip(blocks, self.schedule.steps, strict=True)]
        return blocks

    def __iter__(self) -> Iterator[Any]:
        return iter(self._running())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(iter(self))[index]
        return super().__getitem__(index)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # a list's shows what iterating yields

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        return _dense_state(self, dense)


class _Delegate:
    """Called like a block, and otherwise the block itself."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


class _CacheGuard(_Delegate):
    """The first block looks whether a cache was filled with other iterations."""

    def __init__(self, block: Any, schedule: Schedule) -> None:
        super().__init__(block)
        self.schedule = schedule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            filled_with = cache.__dict__.get("_hf_compress_schedule", self.schedule)
            if filled_with != self.schedule and cache.get_seq_length():
                before, now = len(filled_with.loops), len(self.schedule.loops)
                raise CompressionError(
                    f"the cache was filled with {before} iterations and the model now runs {now}"
                    f"{' of other sizes' if before == now else ''}: they must not change within a sequence. Start "
                    "with an empty cache."
                )
            cache.__dict__["_hf_compress_schedule"] = self.schedule
        return self.block(*args, **kwargs)


class _Extrapolated(_Delegate):
    """An iteration of the second-order Adams-Bashforth method: the increments of a forward pass leave a trail."""

    def __init__(self, block: Any, step: float, trail: list[tuple[Tensor, float]]) -> None:
        super().__init__(block)
        self.step, self.trail = step, trail

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.block(hidden, *args, **kwargs)
        after: Tensor = output[0] if isinstance(output, tuple) else output
        increment = after - hidden
        before, size = self.trail[-1] if self.trail else (None, 1.0)
        self.trail[:] = [(increment, self.step)]
        moved = hidden + mathematics.adams_bashforth(increment, before, self.step, size)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved


def _set_steps(block: Any, scaled: list[str], step: float) -> None:
    for path in scaled:
        module = inner = block.get_submodule(path)
        while not isinstance(inner, SharedLinear):
            inner = inner.base_layer  # an adapter has been attached: its part of the output is scaled as well
        inner.step = step if inner is module else 1.0
        if inner is not module:
            _scale_output(module, step)


def _check_scaled(blocks: Iterable[Any], scaled: list[str]) -> None:
    """Raise `ValueError` unless every block has shared layers at these paths."""
    for block in blocks:
        inside = dict(block.named_modules())
        strange = next((path for path in scaled if not isinstance(inside.get(path), SharedLinear)), None)
        if strange is not None:
            raise ValueError(f"`scaled` names {short(strange)}, which is no shared layer of a {type(block).__name__}")


def _scale_output(module: nn.Module, step: float) -> None:
    if _STEP not in module.__dict__:
        module.register_forward_hook(lambda own, _, output: output * own.__dict__[_STEP])
    module.__dict__[_STEP] = step


def _dense_state(shared: Any, dense: nn.Module) -> dict[str, Tensor]:
    """All below a container, as the dense model holds it. Raises `NotImplementedError` for larger steps."""
    if shared.schedule != Schedule(tuple(range(shared.depth)), (1.0,) * shared.depth):
        raise NotImplementedError(
            f"a model of {shared.iterations} iterations with larger steps has no dense form; set_iterations("
            f"{shared.depth}) first"
        )
    state: dict[str, Tensor] = {}
    below = ""
    for path, module in shared.named_modules():
        if not path or (below and path.startswith(below)):
            continue
        expand: Callable[[nn.Module], dict[str, Tensor]] | None = getattr(module, "dequantize", None)
        if expand is not None:
            below = f"{path}."
            state.update({f"{path}.{name}": tensor for name, tensor in expand(dense.get_submodule(path)).items()})
            continue
        own = module.state_dict(prefix=f"{path}.")
        names = [name for name, _ in module.named_parameters(recurse=False)]
        names += [name for name, _ in module.named_buffers(recurse=False)]
        state.update({f"{path}.{name}": own[f"{path}.{name}"] for name in names if f"{path}.{name}" in own})
    return state


@register_module_type
class SharedAlbertTransformer(Stepping, AlbertTransformer):  # type: ignore[misc]
    """ALBERT's encoder with fewer, larger steps: it shares its blocks by itself."""

    layout_type: ClassVar[str] = "shared_albert"

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> SharedAlbertTransformer:
        if not isinstance(dense, AlbertTransformer):
            raise ValueError(f"replaces a {type(dense).__name__}, expected an AlbertTransformer")
        checked_stepping(spec, dense.config.num_hidden_layers, len(dense.albert_layer_groups))
        encoder = cls.__new__(cls)
        encoder.__dict__.update(dense.__dict__)
        encoder._remember(spec)
        return encoder

    def check_tensors(self) -> None:
        """Raises `ValueError` for layers without those that are scaled."""
        layers = [layer for group in self.albert_layer_groups for layer in group.albert_layers]
        _check_scaled(layers, self.scaled or [])

    def apply_schedule(self) -> None:
        """Steps are set as the groups run: one group has many."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.embedding_hidden_mapping_in(hidden_states)
        trail: list[tuple[Tensor, float]] = []
        for loop, step in zip(self.schedule.loops, self.schedule.steps, strict=True):
            group = self.albert_layer_groups[self.assigned[loop]]
            for layer in group.albert_layers:
                _set_steps(layer, self.scaled or [], step)
            block = _Extrapolated(group, step, trail) if self.solver == "adams_bashforth" else group
            hidden = block(hidden, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden)

    def dequantize(self, dense: nn.Module) -> dict[str, Tensor]:
        return _dense_state(self, dense)
