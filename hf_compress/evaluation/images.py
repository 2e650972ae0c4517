"""Accuracy of an image classifier on images of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..errors import ConfigurationError, UnsupportedModelError
from .examples import spread
from .forward import evaluation_mode, input_device
from .measurement import Score, accuracy_score

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tiff"}


@dataclass(frozen=True)
class ImageClassification:
    """Share of images whose label is the classifier's first choice.

    Args:
        images: files, or images of PIL.
        labels: a class each, by number or by the name that it has in the model's `label2id`.
        batch_size: images a forward pass.
    """

    images: Sequence[Any]
    labels: Sequence[int | str]
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not self.images or len(self.images) != len(self.labels) or self.batch_size < 1:
            raise ConfigurationError(
                f"image classification needs images, a label for each and batch_size >= 1; got {len(self.images)} "
                f"images, {len(self.labels)} labels, batch_size={self.batch_size}."
            )

    @classmethod
    def from_path(
        cls, path: str | os.PathLike[str], *, limit: int | None = None, batch_size: int = 16
    ) -> ImageClassification:
        """Images from a folder with one folder a class, named by number or as in the model's `label2id`, or from a
        Parquet file with a column of images (`image` or `img`) and one of labels (`label` or `labels`)."""
        root = Path(path)
        if root.is_dir():
            found = spread(
                [
                    (file, folder.name)
                    for folder in sorted(root.iterdir())
                    if folder.is_dir()
                    for file in sorted(folder.rglob("*"))
                    if file.suffix.lower() in _SUFFIXES
                ],
                limit,
            )
            if not found:
                raise ConfigurationError(f"{str(path)!r} holds no folder of images: one folder a class is expected.")
            return cls([file for file, _ in found], [label for _, label in found], batch_size)
        if not root.is_file() or root.suffix.lower() != ".parquet":
            raise ConfigurationError(f"{str(path)!r} is neither a folder of images nor a .parquet file.")
        return cls(*_read_parquet(root, limit), batch_size)

    def __call__(self, model: PreTrainedModel, processing_class: Any) -> list[Score]:
        if processing_class is None:
            raise ConfigurationError("image classification needs `processing_class=` (the model's image processor).")
        if model.main_input_name != "pixel_values":
            raise UnsupportedModelError(f"{type(model).__name__} reads {model.main_input_name!r}, not images.")
        targets = class_numbers(model, self.labels)
        device, hits = input_device(model), 0
        with evaluation_mode(model), torch.no_grad():
            for index in range(0, len(targets), self.batch_size):
                images = [_open(image) for image in self.images[index : index + self.batch_size]]
                pixels = processing_class(images=images, return_tensors="pt")["pixel_values"]
                logits = getattr(model(pixel_values=pixels.to(device, model.dtype)), "logits", None)
                if logits is None:
                    raise UnsupportedModelError(f"{type(model).__name__} has no classification head.")
                chosen = logits.argmax(dim=-1).cpu().tolist()
                hits += sum(a == b for a, b in zip(chosen, targets[index : index + self.batch_size], strict=True))
        return [accuracy_score("image accuracy", hits, len(targets))]


def class_numbers(model: PreTrainedModel, labels: Sequence[int | str]) -> list[int]:
    """The model's class numbers; raises `ConfigurationError` for a label that it does not know."""
    known = {str(name): int(number) for name, number in (model.config.label2id or {}).items()}
    numbers = []
    for label in labels:
        number = known.get(str(label))
        if number is None and str(label).isdecimal():
            number = int(label)
        if number is None or number >= model.config.num_labels:
            some = ", ".join(list(known)[:5]) + (", …" if len(known) > 5 else "")
            raise ConfigurationError(
                f"the model has no class {label!r}: labels are its class names ({some}) or "
                f"numbers below {model.config.num_labels}."
            )
        numbers.append(number)
    return numbers


def _open(image: Any) -> Image:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigurationError("images need Pillow: pip install pillow.") from error
    try:
        opened = Image.open(image) if isinstance(image, (str, os.PathLike)) else image
        return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigurationError(f"{str(image)!r} is no image that can be read: {error}.") from error


def _read_parquet(path: Path, limit: int | None) -> tuple[list[Any], list[int | str]]:
    from ..calibration.configuration import CalibrationConfig
    from ..calibration.sources import open_rows

    rows = open_rows(CalibrationConfig(str(path)))
    image = next((name for name in ("image", "img") if name in rows.column_names), None)
    label = next((name for name in ("label", "labels") if name in rows.column_names), None)
    if image is None or label is None:
        raise ConfigurationError(
            f"{str(path)!r}: expected a column of images (image or img) and one of labels (label or labels); found "
            f"{', '.join(rows.column_names)}."
        )
    chosen = rows.select(spread(range(len(rows)), limit))
    return [row[image] for row in chosen], [row[label] for row in chosen]
