"""Decomposed encoders beside simpler ways to the same size: sentence embeddings and features of images.

    python tests/benchmarks/encoders.py text --model all-MiniLM-L6-v2 --data shared/data/stsb --threads 1
    python tests/benchmarks/encoders.py images --model dinov2-small --data shared/data/cifar10 --threads 1

A line of JSON for every variant and reduction. `text` calibrates on sentences of STS-B's training part and reports
Spearman's correlation on its test part; `images` calibrates on CIFAR-10 training images that the probe does not see,
and fits the probe (ridge regression, and 10 nearest neighbours by cosine) on frozen features of others.

The variants: `auto` (all kinds, divided by measurement), `mlp` (MLPs alone, each block its own width), `uniform` (one
width for all MLPs, as `portable=True` has it), `magnitude` (the same width, the channels of the largest products of
weight norms, no refit) and `layers` (whole blocks of the least influence left out, as many as come nearest).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import hf_compress
from hf_compress import CalibrationConfig, ModularDecompositionConfig
from hf_compress.anatomy import resolve_anatomy
from hf_compress.engine.registry import create_method
from hf_compress.engine.weights import count_weights
from hf_compress.evaluation.examples import read_records
from hf_compress.evaluation.similarity import SentenceSimilarity

VARIANTS = ("auto", "mlp", "uniform", "magnitude", "layers")
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@dataclass
class Task:
    """What to calibrate on, and the quality of a model."""

    calibration: CalibrationConfig
    quality: Callable[[Any], dict[str, float]]


def sentences(arguments: argparse.Namespace) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = read_records(arguments.data / "stsb-en-train.csv", ("sentence1", "sentence2", "score"))
    texts = list(dict.fromkeys(str(row[name]) for row in rows for name in ("sentence1", "sentence2")))

    def collate(chosen: list[str]) -> dict[str, Tensor]:
        encoded = tokenizer(chosen, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return dict(encoded)

    similarity = SentenceSimilarity.from_file(arguments.data / "stsb-en-test.csv")
    calibration = CalibrationConfig(
        texts, data_collator=collate, num_samples=arguments.num_samples, num_held_out=256, batch_size=64
    )
    return Task(calibration, lambda model: {"sts_spearman": round(similarity(model, tokenizer)[0].value, 4)})


def images(arguments: argparse.Namespace) -> Task:
    def read(file: str, count: int) -> tuple[list[Any], Int[Tensor, "images"]]:
        rows = hf_compress.calibration.sources.open_rows(CalibrationConfig(str(arguments.data / file)))
        rows = rows.select(range(count))
        return [row["img"] for row in rows], torch.tensor([row["label"] for row in rows])

    def collate(chosen: list[Any]) -> dict[str, Tensor]:
        pixels = torch.stack([_pixels(image, arguments.image_size) for image in chosen])
        return {"pixel_values": (pixels - MEAN.view(3, 1, 1)) / DEVIATION.view(3, 1, 1)}

    probe, samples = arguments.train_images, arguments.num_samples + 64
    training, labels = read("train.parquet", probe + samples)
    test, test_labels = read("test.parquet", arguments.test_images)

    @torch.no_grad()
    def features(model: Any, pictures: list[Any]) -> Float[Tensor, "images width"]:
        parts = []
        for start in range(0, len(pictures), 50):
            states = model(**collate(pictures[start : start + 50])).last_hidden_state
            parts.append(torch.cat((states[:, 0], states[:, 1:].mean(dim=1)), dim=1))
        return torch.cat(parts).double()

    def quality(model: Any) -> dict[str, float]:
        known, asked = features(model, training[:probe]), features(model, test)
        found = {
            "probe": _ridge(known, labels[:probe], asked),
            "neighbours": _neighbours(known, labels[:probe], asked),
        }
        return {name: round(float((chosen == test_labels).double().mean()), 4) for name, chosen in found.items()}

    calibration = CalibrationConfig(
        training[probe:],
        data_collator=collate,
        num_samples=arguments.num_samples,
        num_held_out=64,
        batch_size=32,
    )
    return Task(calibration, quality)


def _pixels(image: Any, size: int) -> Float[Tensor, "3 size size"]:
    picture = image.convert("RGB").resize((size, size))
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, 3).permute(2, 0, 1).float() / 255


def _ridge(
    known: Float[Tensor, "images width"], labels: Int[Tensor, "images"], asked: Float[Tensor, "tests width"]
) -> Int[Tensor, "tests"]:
    """Classes by ridge regression on one-hot labels, penalty the mean eigenvalue of the Gram."""
    mean, targets = known.mean(0), F.one_hot(labels).double()
    inputs = known - mean
    gram = inputs.T @ inputs
    gram += gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, inputs.T @ (targets - targets.mean(0)))
    return ((asked - mean) @ weight + targets.mean(0)).argmax(1)


def _neighbours(
    known: Float[Tensor, "images width"], labels: Int[Tensor, "images"], asked: Float[Tensor, "tests width"]
) -> Int[Tensor, "tests"]:
    mean = known.mean(0)
    cosines = F.normalize(asked - mean) @ F.normalize(known - mean).T
    votes = F.one_hot(labels[cosines.topk(10).indices]).sum(dim=1)
    return votes.argmax(1)


def variant(name: str, dense: Any, reduction: float, task: Task, influence: list[float]) -> Any:
    """A smaller copy of the model."""
    model = copy.deepcopy(dense)
    if name == "layers":
        return _without_layers(model, reduction, influence)
    fields: dict[str, Any] = {} if name == "auto" else {"kinds": ["mlp"]}
    if name in ("uniform", "magnitude"):
        fields["allocation"] = "uniform"
    recipe = ModularDecompositionConfig(reduction=reduction, calibration=task.calibration, **fields)
    if name != "magnitude":
        return hf_compress.compress(model, recipe)
    anatomy = resolve_anatomy(model)
    entries = {entry["path"]: entry["spec"] for entry in create_method(recipe, anatomy).expect().layout}
    for block in range(len(anatomy)):
        up, down = (model.get_submodule(anatomy.mlp_path(block, role)) for role in ("up", "down"))
        width = entries[anatomy.mlp_path(block, "down")]["in_features"]
        kept = (up.weight.norm(dim=1) * down.weight.norm(dim=0)).topk(width).indices.sort().values
        up.weight, up.bias = nn.Parameter(up.weight[kept]), nn.Parameter(up.bias[kept])
        down.weight = nn.Parameter(down.weight[:, kept])
    return model


def _without_layers(model: Any, reduction: float, influence: list[float]) -> Any:
    count = round(reduction * len(influence))
    dropped = sorted(range(len(influence)), key=influence.__getitem__)[:count]
    paths = resolve_anatomy(model).block_paths
    blocks = model.get_submodule(paths[0].rpartition(".")[0])
    for index in sorted(dropped, reverse=True):
        del blocks[index]
    model.config.num_hidden_layers = len(blocks)
    return model


def _matrices(model: Any) -> int:
    return count_weights(resolve_anatomy(model))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("text", "images"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--reductions", type=float, nargs="+", default=(0.2, 0.3))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--num-samples", type=int, default=1024, help="sentences or images to calibrate on")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--train-images", type=int, default=600)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dense = AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    task = (sentences if arguments.task == "text" else images)(arguments)
    before = _matrices(dense)

    def show(name: str, reduction: float, model: Any, seconds: float) -> None:
        left = 1 - _matrices(model) / before
        figures = {"variant": name, "asked": reduction, "removed": round(left, 4), "seconds": round(seconds, 1)}
        kinds = getattr(getattr(model, "compression_report", None), "notes", {}).get("kind_reductions", {})
        print(json.dumps({**figures, **task.quality(model), **kinds}), flush=True)

    show("dense", 0.0, dense, 0.0)
    probe = ModularDecompositionConfig(reduction=0.2, kinds=["mlp"], calibration=task.calibration)
    influence = hf_compress.compress(copy.deepcopy(dense), probe).compression_report.notes["block_influence"]
    for reduction in arguments.reductions:
        for name in arguments.variants:
            began = time.monotonic()
            model = variant(name, dense, reduction, task, influence)
            show(name, reduction, model, time.monotonic() - began)


if __name__ == "__main__":
    main()
