"""How this package's functions become torch.library operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Decorator: define an operator with this implementation for all devices and `fake` for tracing."""

    def decorate(function: _Function) -> _Function:
        qualified = f"hf_compress::{name}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "default", function)
        torch.library.register_fake(qualified, fake)
        return function

    return decorate


def is_eager(x: Tensor) -> bool:
    """Whether a function may be called past torch's dispatcher, which takes longer than a small product."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def any_requires_grad(*values: Any) -> bool:
    """Whether autograd has to see what is done with these."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)
