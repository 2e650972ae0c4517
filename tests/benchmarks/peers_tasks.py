"""The models and measures of `codebook_peers.py`: a decoder, a sentence encoder and a vision model."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peers_methods import Inputs
from setting import Setting
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_compress import CalibrationConfig


class Task(Protocol):
    """A model that can be loaded afresh, something to calibrate on, and scores.

    `requires` names the command line's arguments that it cannot do without.
    """

    requires: ClassVar[tuple[str, ...]]
    inputs: Inputs

    def __init__(self, arguments: argparse.Namespace) -> None: ...

    def load(self) -> Any: ...

    def evaluate(self, model: Any) -> dict[str, float]: ...


class Perplexity:
    """A causal language model, the perplexity of texts, context 2048."""

    requires = ("model", "calibration", "evaluation")

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.setting = Setting(arguments)
        self.inputs = Inputs(self.setting.source)

    def load(self) -> Any:
        return self.setting.load()

    def evaluate(self, model: Any) -> dict[str, float]:
        return self.setting.evaluate(model)


class Sentences:
    """A sentence encoder in float32, STS-B: rank correlation of the cosine of mean-pooled sentences with the grade."""

    requires = ("minilm_model", "stsb")

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path = arguments.minilm_model
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        training = [
            sentence for first, second, _ in self._pairs(arguments.stsb, "train") for sentence in (first, second)
        ]
        self.test = self._pairs(arguments.stsb, "test")
        self.inputs = Inputs(
            CalibrationConfig(
                training,
                data_collator=self._tokenize,
                num_samples=arguments.num_sentences,
                num_held_out=0,
                batch_size=64,
            ),
            self.tokenizer,
        )

    @staticmethod
    def _pairs(folder: Path, split: str) -> list[tuple[str, str, float]]:
        with (folder / f"stsb-en-{split}.csv").open(newline="", encoding="utf-8") as file:
            return [(first, second, float(grade)) for first, second, grade in csv.reader(file)]

    def _tokenize(self, sentences: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt"))

    def load(self) -> Any:
        return AutoModel.from_pretrained(self.path, dtype=torch.float32).eval()

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        first, second = (self._embed(model, [pair[side] for pair in self.test]) for side in (0, 1))
        cosines = (first * second).sum(-1).double().numpy()
        return {"spearman": round(_spearman(cosines, np.array([grade for *_, grade in self.test])), 4)}

    def _embed(self, model: Any, sentences: list[str]) -> Float[Tensor, "sentences width"]:
        batches = []
        for start in range(0, len(sentences), 64):
            batch = self._tokenize(sentences[start : start + 64])
            mask = batch["attention_mask"][..., None]
            hidden = model(**batch).last_hidden_state
            batches.append((hidden * mask).sum(1) / mask.sum(1))
        return F.normalize(torch.cat(batches), dim=-1)


class Images:
    """A vision transformer in float32 on CIFAR-10: features beside the dense model's, and a ridge probe on them.

    The probe sees the class token and the mean of the patches after `--probe-layer` blocks.
    """

    requires = ("vit_model", "cifar10")
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path, self.size, self.layer = arguments.vit_model, arguments.image_size, arguments.probe_layer
        self.num_training = arguments.train_images
        self.training = self._read(arguments.cifar10 / "train.parquet", self.num_training + arguments.num_images)
        self.test = self._read(arguments.cifar10 / "test.parquet", arguments.test_images)
        # Not the images of the probe, so that it learns nothing from having been calibrated on.
        calibration = self.training[0][self.num_training :]
        self.inputs = Inputs(
            CalibrationConfig(
                calibration,
                data_collator=lambda images: {"pixel_values": self._pixels(images)},
                num_samples=len(calibration),
                num_held_out=0,
                batch_size=32,
            )
        )
        with torch.no_grad():
            self.dense = torch.cat([last for last, _ in self._features(self.load(), self.test[0])])

    @staticmethod
    def _read(path: Path, count: int) -> tuple[list[bytes], Int[Tensor, "images"]]:
        import pyarrow.parquet

        columns = pyarrow.parquet.read_table(path).slice(0, count).to_pydict()
        images = [image["bytes"] if isinstance(image, dict) else image for image in columns["img"]]
        return images, torch.tensor(columns["label"])

    def _pixels(self, images: list[bytes]) -> Float[Tensor, "images 3 size size"]:
        from PIL import Image

        size = (self.size, self.size)
        arrays = [
            np.asarray(Image.open(io.BytesIO(image)).convert("RGB").resize(size, Image.BICUBIC)) for image in images
        ]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.deviation).view(3, 1, 1)

    def load(self) -> Any:
        return AutoModel.from_pretrained(self.path, dtype=torch.float32).eval()

    def _features(self, model: Any, images: list[bytes]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch: last hidden states (images, tokens, width), features for the probe (images, 2 · width)."""
        for start in range(0, len(images), 50):
            output = model(pixel_values=self._pixels(images[start : start + 50]), output_hidden_states=True)
            hidden = output.hidden_states[self.layer]
            yield output.last_hidden_state, torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        training = torch.cat([probe for _, probe in self._features(model, self.training[0][: self.num_training])])
        hidden, test = (torch.cat(parts) for parts in zip(*self._features(model, self.test[0]), strict=True))
        labels = self.training[1][: self.num_training]
        return {
            "relative_error": round(float((hidden - self.dense).norm() / self.dense.norm()), 4),
            "cosine": round(float(F.cosine_similarity(hidden, self.dense, dim=-1).mean()), 4),
            "probe": round(100 * float((_ridge(training, labels, test) == self.test[1]).double().mean()), 2),
        }


def _ridge(
    features: Float[Tensor, "images width"], labels: Int[Tensor, "images"], test: Float[Tensor, "tests width"]
) -> Int[Tensor, "tests"]:
    """Classes by ridge regression on one-hot labels, penalty the mean eigenvalue of the Gram."""
    mean = features.double().mean(0)
    inputs, targets = features.double() - mean, F.one_hot(labels).double()
    gram = inputs.T @ inputs
    gram += gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, inputs.T @ (targets - targets.mean(0)))
    return ((test.double() - mean) @ weight + targets.mean(0)).argmax(1)


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of ranks, ties sharing their mean rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[position]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


TASKS: dict[str, type[Task]] = {"smollm": Perplexity, "minilm": Sentences, "vit": Images}
