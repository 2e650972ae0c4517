"""Which class carries out which configuration: data and behaviour apart, so that a new method touches no old file."""

from __future__ import annotations

from typing import Any, TypeVar

from ..anatomy import ModelAnatomy
from ..configuration import MethodConfig
from ..errors import ConfigurationError
from .session import Method

_METHODS: dict[type[MethodConfig], type[Method[Any, Any]]] = {}
MethodType = TypeVar("MethodType", bound=type[Method[Any, Any]])


def register_method(method: MethodType) -> MethodType:
    """Class decorator: let the engine carry out `method.config_class` with this class."""
    _METHODS[method.config_class] = method
    return method


def method_class(config: MethodConfig) -> type[Method[Any, Any]]:
    """The class for a configuration. Raises `ConfigurationError` where there is none."""
    if type(config) not in _METHODS:
        raise ConfigurationError(f"no method is registered for {type(config).__name__}.")
    return _METHODS[type(config)]


def create_method(config: MethodConfig, anatomy: ModelAnatomy) -> Method[Any, Any]:
    """The method for a configuration, checked against the model. Raises `ConfigurationError`."""
    return method_class(config)(config, anatomy)
