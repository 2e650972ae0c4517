"""Calibration images: which data hold them, and how an image processor makes batches of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CalibrationError
from .configuration import CalibrationConfig, is_image
from .local import holds_only_images, local_images
from .sources import Columns, open_rows, title


def find_images(
    config: CalibrationConfig,
    processing_class: Any,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Any | None:
    """The images to calibrate on: files, images of PIL or a column of them; `None` where the data are texts.

    An image processor reads images alone. A processor of texts and images reads the images of data without texts.

    Raises:
        `CalibrationError`: for images without an image processor, for data without images, or with several columns of
            them, for an image processor.
    """
    processor = _image_processor(processing_class)
    if config.kind == "images":
        if processor is None:
            raise CalibrationError(
                f"`dataset` is a list of images, and there is {_shown(processing_class)}. Pass "
                "`processing_class=image_processor`; a model of text needs texts."
            )
        return config.dataset
    if processor is None:
        return None
    reads_texts = processor is not processing_class and getattr(processing_class, "tokenizer", None) is not None
    if reads_texts and (config.kind == "texts" or config.text_column is not None):
        return None
    if config.kind == "texts" or config.text_column is not None:
        found = "is a list of texts" if config.kind == "texts" else f"is read by text_column={config.text_column!r}"
        raise CalibrationError(
            f"`dataset` {found}, and `processing_class` is {_shown(processing_class)}, which reads images. Give "
            "images (a dataset with a column of images, a folder of image files, or a list of PIL images), or pass a "
            "tokenizer with a model of text."
        )
    if config.kind == "source" and (not reads_texts or holds_only_images(config)) and (files := local_images(config)):
        return files
    rows = open_rows(config, token=token, cache_dir=cache_dir)
    columns = Columns.of(config, rows)
    if not columns.names:
        return None if reads_texts else []
    if reads_texts and (columns.text(config) or not columns.images):
        return None
    if not columns.images:
        raise CalibrationError(
            f"{title(config)} has no column of images; its columns are {columns.names}, and `processing_class` is "
            f"{_shown(processing_class)}, which reads images. Give a column of type `datasets.Image`, a folder of "
            "image files or a list of PIL images, or pass a tokenizer with a model of text."
        )
    if len(columns.images) > 1:
        raise CalibrationError(
            f"{title(config)} has several columns of images: {columns.images}. Load it with `datasets` and pass the "
            f"one to read, such as dataset.select_columns({columns.images[0]!r})."
        )
    # Selected first, so that the columns beside it are neither read nor decoded.
    return rows.with_format(None).select_columns(columns.images)[columns.images[0]]


def image_collator(processing_class: Any) -> Callable[[list[Any]], dict[str, Tensor]]:
    """What turns a list of images, or of their files, into a batch for `model(**batch)`."""
    processor: Any = _image_processor(processing_class)

    def collate(images: list[Any]) -> dict[str, Tensor]:
        opened = [_opened(image) for image in images]
        try:
            made = processor(images=opened, return_tensors="pt")
        except (TypeError, ValueError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CalibrationError(
                f"{type(processor).__name__} could not make a batch of {len(images)} images: {reason} Give images "
                "that it takes or, if their sizes differ, an image processor that resizes them."
            ) from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    return collate


def _opened(image: Any) -> Any:
    name = image.name if isinstance(image, Path) else "an image"
    try:
        if isinstance(image, Path):
            from PIL import Image

            with Image.open(image) as opened:
                return opened.convert("RGB")
        if is_image(image):
            return image.convert("RGB")
    except ImportError as error:
        raise CalibrationError("images need Pillow: pip install pillow.") from error
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise CalibrationError(f"{name!r} is no image that can be read: {error}. Remove or replace it.") from error
    raise CalibrationError(f"a row of the column of images holds a {type(image).__name__}; expected an image.")


def _image_processor(processing_class: Any) -> Any | None:
    from transformers import ImageProcessingMixin

    if isinstance(processing_class, ImageProcessingMixin):
        return processing_class
    return getattr(processing_class, "image_processor", None)


def _shown(processing_class: Any) -> str:
    return "no processing_class" if processing_class is None else f"a {type(processing_class).__name__}"
