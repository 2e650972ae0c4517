"""The run-time type checks of the tests: beartype, with an int accepted where a float is expected, and jaxtyping for
shapes."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped
_SHAPE = re.compile(r"\b(Shaped|Bool|U?Int\d*|Float\d*)\[")


@contextmanager
def checked_imports(package: str) -> Iterator[None]:
    """Check what is imported from `package`.

    jaxtyping's own decorator binds the arguments of every call and checks them twice, which took a third of the tests'
    time; here a function is checked once, and names of dimensions are kept where there are some.
    """
    with patch("jaxtyping.jaxtyped", _checked), jaxtyping.install_import_hook(package, "typechecking.check"):
        yield


def _checked(*, typechecker: Any) -> Callable[[Any], Any]:
    def decorate(target: Any) -> Any:
        # A generator looks at its arguments once it runs, in whatever scope that is.
        if not inspect.isfunction(target) or inspect.isgeneratorfunction(target):
            return _jaxtyped(typechecker=typechecker)(target)
        checked = check(_resolved(target))
        has_shapes = any(_SHAPE.search(str(annotation)) for annotation in target.__annotations__.values())

        @functools.wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            if jaxtyping.config.jaxtyping_disable:
                return target(*args, **kwargs)
            if not has_shapes:
                return checked(*args, **kwargs)
            with _jaxtyped("context"):
                return checked(*args, **kwargs)

        return call

    return decorate


def _resolved(function: Any) -> Any:
    """A copy whose annotations are types, and `Any` where their names are for type checkers alone."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(copy, function, updated=())
    del copy.__wrapped__
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = {}
    for name, annotation in function.__annotations__.items():
        try:
            found = eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
        except NameError:
            found = Any
        copy.__annotations__[name] = found
    return copy
