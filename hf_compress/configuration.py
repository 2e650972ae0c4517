"""Recipes: what is done to a model. Strict, typed, immutable, and all that is serialised.

The *inputs* (calibration data) may ride along on a recipe for convenience; they are left out of every file.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator
from transformers.utils.quantization_config import BitsAndBytesConfig

from .calibration.configuration import CalibrationConfig
from .checked import short
from .errors import ConfigurationError
from .strict import StrictModel

QUANT_METHOD = "hf_compress"


class MethodConfig(StrictModel):
    """Base of the configuration of one method; a child sets `method` and registers a handler for it.

    Args:
        calibration (`CalibrationConfig`, *optional*): the data to calibrate on. An input, never saved.
        modules_to_not_convert (`list[str]`, *optional*): module names (full paths or parts of them) left as they are.
        seed (`int`, defaults to 0): seeds whatever the method draws at random.
    """

    method: ClassVar[str]
    # Transformers reads this attribute to choose the quantizer.
    quant_method: ClassVar[str] = QUANT_METHOD

    calibration: CalibrationConfig | None = Field(default=None, exclude=True, repr=False)
    modules_to_not_convert: tuple[str, ...] = ()
    seed: int = 0

    def check_in_one_call(self) -> None:
        """Raises `ConfigurationError` for a recipe that only a training can carry out."""

    @property
    def needs_data(self) -> bool:
        """Whether the method has to be calibrated."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON, without inputs."""
        return {"method": self.method, **self.model_dump(mode="json")}


_METHOD_CONFIGS: dict[str, type[MethodConfig]] = {}


def register_method_config(config: type[MethodConfig]) -> type[MethodConfig]:
    """Make a method's configuration known to [`CompressionConfig`] (class decorator)."""
    _METHOD_CONFIGS[config.method] = config
    return config


def method_config_from_dict(data: dict[str, Any]) -> MethodConfig:
    """Build the configuration that a stage's JSON describes; raises `ConfigurationError` for an unknown method."""
    if not isinstance(data, dict):
        raise ConfigurationError(f"a stage of a recipe must be an object with a `method`, got {short(data)}.")
    fields = dict(data)
    method = fields.pop("method", None)
    if not isinstance(method, str) or method not in _METHOD_CONFIGS:
        raise ConfigurationError(
            f"unknown method {short(method)} in a recipe; known methods: {sorted(_METHOD_CONFIGS)}."
        )
    return _METHOD_CONFIGS[method](**fields)


def _as_stage(stage: Any) -> Any:
    """A method's configuration from what a stage may be given as."""
    if isinstance(stage, dict):
        return method_config_from_dict(stage)
    if isinstance(stage, BitsAndBytesConfig):
        known: Any = _METHOD_CONFIGS["bitsandbytes"]
        return known.of(stage)
    return stage


class CompressionConfig(StrictModel):
    """A sequence of stages, each applied to the result of the one before.

    Args:
        stages: method configurations (or their dictionaries, or Transformers' `BitsAndBytesConfig`) in order.
        calibration (`CalibrationConfig`, *optional*): serves every stage that has none of its own.
    """

    quant_method: ClassVar[str] = QUANT_METHOD

    stages: tuple[MethodConfig, ...] = Field(min_length=1)
    calibration: CalibrationConfig | None = Field(default=None, exclude=True, repr=False)

    @field_validator("stages", mode="before")
    @classmethod
    def _parse_stages(cls, stages: Any) -> Any:
        if not isinstance(stages, (list, tuple)):
            raise ValueError("expected a list of method configurations")
        return tuple(_as_stage(stage) for stage in stages)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON, without inputs."""
        return {"stages": [stage.to_dict() for stage in self.stages]}

    @classmethod
    def wrap(cls, config: CompressionConfig | MethodConfig | BitsAndBytesConfig | dict[str, Any]) -> CompressionConfig:
        """Accept a single method's config, a `BitsAndBytesConfig`, or a recipe's dictionary, wherever a
        `CompressionConfig` is expected."""
        if isinstance(config, CompressionConfig):
            return config
        if isinstance(config, BitsAndBytesConfig):
            return cls(stages=(_as_stage(config),))
        if isinstance(config, MethodConfig):
            return cls(stages=(config,), calibration=config.calibration)
        if isinstance(config, dict):
            config = {name: value for name, value in config.items() if name != "quant_method"}
            return cls(**config) if "stages" in config else cls(stages=(method_config_from_dict(config),))
        raise ConfigurationError(
            "expected a CompressionConfig, a method's config, a BitsAndBytesConfig or a recipe dictionary, got "
            f"{type(config).__name__}."
        )
