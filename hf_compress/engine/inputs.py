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
        processing_class: tokenizer or image processor; `None`: loaded from `base` where texts need it.
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
        if processing_class is None and _reads_texts(source):
            processing_class = _load_processing_class(self.base, self.load_arguments)
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


def _reads_texts(source: CalibrationConfig) -> bool:
    if source.kind == "mixture":
        return any(_reads_texts(part) for part in source.dataset)
    return source.data_collator is None and source.kind != "tokens"


def _load_processing_class(base: str, load_arguments: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base, **load_arguments)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            "the calibration texts need a tokenizer and none could be loaded from "
            f"{base or 'a model without a name'!r} ({error}). "
            "Pass processing_class=tokenizer to compress(), or calibrate on token ids."
        ) from error


def is_hub_id(name: str) -> bool:
    """Whether a model's name may stand in a published file: a path of this machine may not."""
    return name.count("/") <= 1 and not Path(name).exists() and not name.startswith((".", "/", "~"))
