"""The recipe of a bitsandbytes stage: Transformers' own configuration, as a stage."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ...configuration import MethodConfig, register_method_config
from ...errors import ConfigurationError

# Fields of Transformers' BitsAndBytesConfig that have no meaning for a stage, with the values that ask for nothing.
_WITHOUT_EFFECT = {"llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False}


@register_method_config
class BitsAndBytesStage(MethodConfig):
    """Quantization by bitsandbytes, of the blocks' linear layers.

    `CompressionConfig` makes it of a `transformers.BitsAndBytesConfig` among its stages.

    Args:
        load_in_4bit, load_in_8bit (`bool`): one of the two.
        bnb_4bit_quant_type (`"fp4"` or `"nf4"`): of 4 bits.
        bnb_4bit_use_double_quant (`bool`): quantize the scales of 4 bits as well.
        bnb_4bit_compute_dtype (`str`, *optional*): dtype to compute in with 4 bits.
        llm_int8_threshold (`float`, defaults to 6.0): inputs above it are multiplied in 16 bits, with 8 bits.
    """

    method: ClassVar[str] = "bitsandbytes"

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    llm_int8_threshold: float = Field(default=6.0, ge=0)

    @model_validator(mode="after")
    def _one_of_both(self) -> Any:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("set either `load_in_4bit` or `load_in_8bit`")
        return self

    @property
    def needs_data(self) -> bool:
        return False

    @classmethod
    def of(cls, config: Any) -> BitsAndBytesStage:
        """From Transformers' `BitsAndBytesConfig`. Raises `ConfigurationError` for what a stage cannot do."""
        given = {name.removeprefix("_"): value for name, value in config.to_dict().items()}
        for name, nothing in _WITHOUT_EFFECT.items():
            if given.get(name, nothing) != nothing:
                raise ConfigurationError(f"BitsAndBytesConfig: `{name}` is not supported in a stage.")
        if given.get("bnb_4bit_quant_storage", "uint8") != "uint8":
            raise ConfigurationError("BitsAndBytesConfig: a stage stores 4 bits as `bnb_4bit_quant_storage=uint8`.")
        fields = {name: value for name, value in given.items() if name in cls.model_fields}
        compute = fields.get("bnb_4bit_compute_dtype")
        # Transformers' default is float32; the layer itself follows its input where nothing is asked for.
        fields["bnb_4bit_compute_dtype"] = None if compute == "float32" else compute
        return cls(**fields, modules_to_not_convert=tuple(given.get("llm_int8_skip_modules") or ()))
