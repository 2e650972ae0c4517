"""The models and data of `pruning_accuracy.py`."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

# Mean and standard deviation of ImageNet's channels, which vision models are trained with.
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

# The backward pass of torch's own attention in bfloat16 takes a CPU 0.4 of a step on sequences as short as these.
ATTENTION = None if torch.accelerator.is_available() else "eager"


@dataclass
class Task:
    """A model to tune, examples to tune it on, and others to test it on."""

    load: Callable[[], Any]
    train: list[Any]
    test: list[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]


def _images(arguments: argparse.Namespace, train: tuple[Any, Any], test: tuple[Any, Any]) -> Task:
    size, labels = arguments.image_size, int(train[1].max()) + 1

    def collate(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        pixels = torch.stack([image for image, _ in rows]).float() / 255
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        pixels = (pixels - MEAN.view(3, 1, 1)) / DEVIATION.view(3, 1, 1)
        return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in rows])}

    def load() -> Any:
        return AutoModelForImageClassification.from_pretrained(
            arguments.model, num_labels=labels, dtype=torch.float32, attn_implementation=ATTENTION
        )

    def pairs(data: tuple[Any, Any], count: int) -> list[tuple[Tensor, int]]:
        return [(image, int(label)) for image, label in zip(data[0][:count], data[1][:count], strict=True)]

    return Task(load, pairs(train, arguments.train_examples), pairs(test, arguments.test_examples), collate)


def fashion_mnist(arguments: argparse.Namespace) -> Task:
    """The files of Debian's package dataset-fashion-mnist in the folder `--data`."""

    def read(name: str) -> tuple[Tensor, np.ndarray]:
        folder = Path(arguments.data)
        images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
        grey = torch.frombuffer(bytearray(images), dtype=torch.uint8).view(-1, 1, 28, 28)
        return grey.expand(-1, 3, -1, -1), np.frombuffer(labels, dtype=np.uint8)

    return _images(arguments, read("train"), read("t10k"))


def cifar10(arguments: argparse.Namespace) -> Task:
    """`train.parquet` and `test.parquet` with JPEG images in the folder `--data`."""
    import pyarrow.parquet as parquet
    from PIL import Image

    def read(split: str, count: int) -> tuple[list[Tensor], np.ndarray]:
        table = parquet.read_table(Path(arguments.data) / f"{split}.parquet").slice(0, count)
        columns = table.column_names
        files = table[columns[0]].to_pylist()
        decoded = [np.array(Image.open(io.BytesIO(file["bytes"])).convert("RGB")) for file in files]
        return [torch.from_numpy(image).permute(2, 0, 1) for image in decoded], np.array(table[columns[1]])

    return _images(arguments, read("train", arguments.train_examples), read("test", arguments.test_examples))


def sst2(arguments: argparse.Namespace) -> Task:
    """`train.tsv` and `dev.tsv` in the folder `--data`: a sentence and its label a line."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def read(split: str, count: int) -> list[tuple[str, int]]:
        with (Path(arguments.data) / f"{split}.tsv").open(encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [(text, int(label)) for text, label in rows if label in "01"][:count]

    def collate(rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        batch = tokenizer(
            [text for text, _ in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        return {**batch, "labels": torch.tensor([label for _, label in rows])}

    def load() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            arguments.model, num_labels=2, dtype=torch.float32, attn_implementation=ATTENTION
        )

    return Task(load, read("train", arguments.train_examples), read("dev", arguments.test_examples), collate)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "sst2": sst2,
}
