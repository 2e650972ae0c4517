"""Accuracy of image classifiers on files of every accepted kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from encoders import make_encoder
from PIL import Image
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTImageProcessorPil

from hf_compress.errors import ConfigurationError, UnsupportedModelError
from hf_compress.evaluation import ImageClassification
from hf_compress.evaluation.images import class_numbers


@pytest.fixture
def classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "ship"}
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        initializer_range=0.5,
    )
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog", "ship")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            pixels = torch.randint(256, (20, 20, 3), generator=torch.Generator().manual_seed(10 * number + index))
            picture = Image.fromarray(pixels.to(torch.uint8).numpy())
            # One is grey, as some are in every real set.
            picture.convert("L" if index == 0 else "RGB").save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def image_processor() -> Any:
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def test_image_accuracy_equals_brute_force(classifier: PreTrainedModel, pictures: Path) -> None:
    (score,) = ImageClassification.from_path(pictures, batch_size=5)(classifier, image_processor())
    hits = 0
    for file in sorted(pictures.rglob("*.png")):
        pixels = image_processor()(images=[Image.open(file).convert("RGB")], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            chosen = int(classifier(pixels).logits.argmax())
        hits += classifier.config.id2label[chosen] == file.parent.name
    assert 0 < hits < 12
    assert (score.value, score.count) == (hits / 12, 12)


def test_images_of_a_parquet_file(classifier: PreTrainedModel, pictures: Path, tmp_path: Path) -> None:
    import datasets

    files = sorted(pictures.rglob("*.png"))
    labels = [("cat", "dog", "ship").index(file.parent.name) for file in files]
    rows = datasets.Dataset.from_dict({"img": [str(file) for file in files], "label": labels})
    rows.cast_column("img", datasets.Image()).to_parquet(tmp_path / "images.parquet")
    processor = image_processor()
    by_table = ImageClassification.from_path(tmp_path / "images.parquet")(classifier, processor)
    assert by_table == ImageClassification.from_path(pictures)(classifier, processor)
    some = ImageClassification.from_path(tmp_path / "images.parquet", limit=3)
    assert list(some.labels) == [0, 1, 2]
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ConfigurationError, match="column of images"):
        ImageClassification.from_path(tmp_path / "other.parquet")


def test_images_refuse(classifier: PreTrainedModel, pictures: Path, tmp_path: Path) -> None:
    assert class_numbers(classifier, ["dog", 2, "1"]) == [1, 2, 1]
    for label in ("horse", 3, "-1"):
        with pytest.raises(ConfigurationError, match="no class"):
            class_numbers(classifier, [label])
    with pytest.raises(UnsupportedModelError, match="not images"):
        ImageClassification.from_path(pictures)(make_model("llama"), image_processor())
    with pytest.raises(UnsupportedModelError, match="no classification head"):
        ImageClassification([pictures / "cat" / "0.png"], [0])(make_encoder("vit"), image_processor())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="one folder a class"):
        ImageClassification.from_path(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="neither a folder"):
        ImageClassification.from_path(tmp_path / "none")
    (pictures / "cat" / "0.png").write_text("no picture")
    with pytest.raises(ConfigurationError, match="no image that can be read"):
        ImageClassification.from_path(pictures)(classifier, image_processor())
