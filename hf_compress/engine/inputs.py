"""What a compression reads beside the model: calibration data, and what prepares them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..anatomy import text_config
from ..calibration.configuration import CalibrationConfig
from ..calibration.data import CalibrationData, load_calibration_data, warn_if_few_tokens
from ..errors import CalibrationError
from .session import Method


@dataclass(frozen=True)
class Inputs:
    """Where calibration data come from.

    Args:
        processing_class: tokenizer or image processor; `None`: loaded from `base` where the data need it.
        load_arguments: of `from_pretrained`, for that load.
        base: name or path of the model.
    """

    processing_class: Any
    load_arguments: dict[str, Any]
    base: str

    def load(
        self, model: PreTrainedModel, method: Method[Any, Any], source: CalibrationConfig | None
    ) -> CalibrationData | None:
        """The data of a stage; `None` where it needs none. Raises `CalibrationError`."""
        if not method.needs_calibration:
            return None
        assert source is not None
        processing_class = self.processing_class
        if processing_class is None and _needs_processing(source):
            images = model.main_input_name == "pixel_values"
            processing_class = _load_processing_class(self.base, self.load_arguments, images)
        config = text_config(model)
        data = load_calibration_data(
            source,
            processing_class,
            vocab_size=getattr(config, "vocab_size", None),
            max_length=getattr(config, "max_position_embeddings", None),
            token=self.load_arguments.get("token"),
            cache_dir=self.load_arguments.get("cache_dir"),
        )
        if all("input_ids" in batch for batch in data.batches):  # images have many positions, and no count of them
            warn_if_few_tokens(data.num_tokens, method.expect().largest_gram)
        return data


def _needs_processing(source: CalibrationConfig) -> bool:
    if source.kind == "mixture":
        return any(_needs_processing(part) for part in source.dataset)
    return source.data_collator is None and source.kind != "tokens"


def _load_processing_class(base: str, load_arguments: dict[str, Any], images: bool) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    kind: Any = AutoImageProcessor if images else AutoTokenizer
    try:
        return kind.from_pretrained(base, **load_arguments)
    except (OSError, ValueError, ImportError) as error:
        needed = "images need an image processor" if images else "texts need a tokenizer"
        remedy = (
            "Pass processing_class=image_processor to compress(), or a data_collator that makes `pixel_values`."
            if images
            else "Pass processing_class=tokenizer to compress(), or calibrate on token ids."
        )
        raise CalibrationError(
            f"the calibration {needed} and none could be loaded from {base or 'a model without a name'!r} ({error}). "
            f"{remedy}"
        ) from error


def is_hub_id(name: str) -> bool:
    """Whether a model's name may stand in a published file: a path of this machine may not."""
    return name.count("/") <= 1 and not Path(name).exists() and not name.startswith((".", "/", "~"))
