"""Calibration on images, and on texts that are sequences of their own, such as sentence pairs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from calibration_helpers import TEXTS, rows
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from typer.testing import CliRunner

import hf_compress
from hf_compress import CalibrationConfig, CalibrationError, CodebookConfig, ConfigurationError
from hf_compress.calibration.data import CalibrationData, load_calibration_data
from hf_compress.calibration.sources import check_local_data
from hf_compress.cli.app import app
from hf_compress.provenance import known_provenance

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL: dict[str, Any] = {"num_samples": 6, "num_held_out": 2, "batch_size": 4}
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


def pictures(count: int = 9) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 20, 24, 3), dtype=torch.uint8, generator=generator).numpy()
    return [Image.fromarray(image) for image in pixels]


def folder(path: Path, count: int = 9) -> Path:
    """A folder per class, a file that is no image, and one of macOS that only looks like one."""
    for number, image in enumerate(pictures(count)):
        place = path / f"class {number * 2 // count}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.PNG")
    (path / "notes.md").write_text("no image")
    (path / "class 0/._0.png").write_text("no image")
    return path


def image_rows(**columns: Any) -> datasets.Dataset:
    images = pictures()
    features = {"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}}
    table = {"image": images, **{name: [value] * len(images) for name, value in columns.items()}}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def load(dataset: Any, processing_class: Any = PROCESSOR, **fields: Any) -> CalibrationData:
    return load_calibration_data(CalibrationConfig(dataset, **{**SMALL, **fields}), processing_class)


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=2)).eval()


class TestImages:
    def test_list_becomes_batches_of_pixel_values(self) -> None:
        images = pictures()
        data = load(images)
        assert [{name: tuple(values.shape) for name, values in batch.items()} for batch in data.batches] == [
            {"pixel_values": (4, 3, 16, 16)},
            {"pixel_values": (2, 3, 16, 16)},
        ]
        everything = PROCESSOR(images=images, return_tensors="pt")["pixel_values"]
        drawn = torch.cat([batch["pixel_values"] for batch in data.batches + data.held_out])
        places = [int((everything == image).flatten(1).all(1).nonzero()) for image in drawn]
        assert len(set(places)) == 8  # of nine, none twice
        assert (data.num_tokens, data.num_held_out_tokens) == (6, 2)
        assert data.description == {"dataset": "in-memory images", "num_samples": 6, "num_held_out": 2, "seed": 0}

    def test_every_source_gives_the_same(self, tmp_path: Path) -> None:
        expected = load(pictures()).fingerprint
        assert load(folder(tmp_path / "images")).fingerprint == expected
        assert load(image_rows()).fingerprint == expected
        assert load(image_rows(text="a caption")).fingerprint == expected
        table = tmp_path / "table.parquet"
        image_rows(label="x").to_parquet(table)
        assert load(table).fingerprint == expected
        assert load(pictures(), seed=1).fingerprint != expected

    def test_folder_is_named_by_its_last_part_and_may_hold_a_table(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "images")
        (path / "metadata.csv").write_text("file_name,caption,more\n0.PNG,a,b\n")
        check_local_data(CalibrationConfig(path))
        assert load(path).description["dataset"] == "images"

    @pytest.mark.parametrize("form", ["stream", "generator"])
    def test_streams(self, form: str) -> None:
        images = pictures()
        stream = (
            image_rows(label="x").to_iterable_dataset()
            if form == "stream"
            else datasets.IterableDataset.from_generator(lambda: iter([{"picture": image} for image in images]))
        )
        first = load(stream, num_samples=2, num_held_out=0).batches[0]["pixel_values"]
        assert torch.equal(first, PROCESSOR(images=images[:2], return_tensors="pt")["pixel_values"])

    def test_grey_and_transparent_images(self) -> None:
        images = [Image.new("L", (8, 8)), Image.new("RGBA", (20, 9)), Image.new("P", (5, 5))]
        assert load(images, num_samples=3, num_held_out=0).batches[0]["pixel_values"].shape == (3, 3, 16, 16)

    def test_fewer_than_wanted(self) -> None:
        with pytest.warns(UserWarning, match="gives 9 images, but 136 are wanted.*on 7 and keeping 2 apart"):
            data = load_calibration_data(CalibrationConfig(pictures()), PROCESSOR)
        assert data.num_tokens == 7

    def test_mixture(self, tmp_path: Path) -> None:
        parts = [CalibrationConfig(folder(tmp_path)), CalibrationConfig(image_rows())]
        data = load(parts)
        assert [part["num_samples"] for part in data.description["parts"]] == [3, 3]

    def test_processor_of_texts_and_images(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        both = SimpleNamespace(tokenizer=tokenizer, image_processor=PROCESSOR)
        expected = load(pictures()).fingerprint
        assert load(pictures(), both).fingerprint == expected
        assert load(image_rows(), both).fingerprint == expected
        assert load(folder(tmp_path), both).fingerprint == expected
        for texts in (TEXTS[:1], image_rows(text=TEXTS[0][:300])):
            assert set(load(texts, both, sequence_length=32).batches[0]) == {"input_ids"}


class TestErrors:
    @pytest.mark.parametrize(
        ("dataset", "fields", "message"),
        [
            (["a text"], {}, "a list of texts.*a ViTImageProcessorPil, which reads images.*pass a tokenizer"),
            (datasets.Dataset.from_dict({"text": ["a"]}), {}, r"no column of images; its columns are \['text'\]"),
            (image_rows(), {"text_column": "image"}, "read by text_column='image'.*which reads images"),
            (
                datasets.concatenate_datasets([image_rows(), image_rows().rename_column("image", "more")], axis=1),
                {},
                r"several columns of images: \['image', 'more'\].*select_columns\('image'\)",
            ),
            (image_rows().select([]), {}, "holds no images"),
            (datasets.Dataset.from_dict({}), {}, "holds no images"),
        ],
    )
    def test_image_processor(self, dataset: Any, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            load(dataset, **fields)

    def test_tokenizer(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="a list of images.*a TokenizersBackend.*image_processor"):
            load(pictures(), tokenizer)
        with pytest.raises(CalibrationError, match="a list of images.*no processing_class"):
            load(pictures(), None)
        check_local_data(CalibrationConfig(image_rows()))
        with pytest.raises(CalibrationError, match=r"has images and no column.*\['image'\].*image processor"):
            load(image_rows(), tokenizer)
        path = folder(tmp_path / "images")
        check_local_data(CalibrationConfig(path))
        with pytest.raises(CalibrationError, match="'images' holds images. Pass an image processor"):
            load(path, tokenizer)

    def test_files(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "images", 2)
        with pytest.raises(CalibrationError, match="split='test' applies to datasets of the Hub"):
            check_local_data(CalibrationConfig(path, split="test"))
        (path / "broken.jpg").write_bytes(b"\xff\xd8 no more")
        with pytest.raises(CalibrationError, match=r"'broken\.jpg' is no image that can be read"):
            load(path, num_samples=3, num_held_out=0)
        (tmp_path / "empty").mkdir()
        with pytest.raises(CalibrationError, match="holds nothing to read"):
            load(tmp_path / "empty")

    def test_images_of_several_sizes_for_a_processor_that_keeps_them(self) -> None:
        images = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
        with pytest.raises(CalibrationError, match="could not make a batch of 2 images.*resizes"):
            load(images, ViTImageProcessorPil(do_resize=False), num_samples=2, num_held_out=0)

    def test_no_image_processor_to_load(self) -> None:
        with pytest.raises(CalibrationError, match="images need an image processor.*processing_class=image_processor"):
            hf_compress.compress(vit(), CodebookConfig(bits=3), calibration=pictures())

    def test_columns_without_effect(self) -> None:
        with pytest.raises(ConfigurationError, match="`text_column` has no effect"):
            CalibrationConfig(pictures(), text_column="image")
        with pytest.raises(ConfigurationError, match="empty list"):
            CalibrationConfig("org/name", text_column=[])


class TestCompression:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_reload(self, tmp_path: Path, dtype: torch.dtype) -> None:
        dense = tmp_path / "dense"
        vit().to(dtype).save_pretrained(dense)
        PROCESSOR.save_pretrained(dense)
        model = ViTForImageClassification.from_pretrained(dense)
        # The image processor is the one beside the model.
        config = CodebookConfig(bits=3)
        hf_compress.compress(model, config, calibration=CalibrationConfig(image_rows(), **SMALL))
        assert model.config.quantization_config.provenance["calibration"][0]["num_samples"] == 6
        model.save_pretrained(tmp_path / "out")
        again = ViTForImageClassification.from_pretrained(tmp_path / "out")
        pixels = load(pictures()).held_out[0]["pixel_values"].to(dtype)
        with torch.no_grad():
            assert torch.equal(model(pixels).logits, again(pixels).logits)
        config = CodebookConfig(bits=3, calibration=CalibrationConfig(folder(tmp_path / "images"), **SMALL))
        loaded = ViTForImageClassification.from_pretrained(dense, compression_config=config)
        with torch.no_grad():
            assert torch.equal(model(pixels).logits, loaded(pixels).logits)

    def test_shell(self, tmp_path: Path) -> None:
        dense, out = tmp_path / "dense", tmp_path / "out"
        vit().save_pretrained(dense)
        PROCESSOR.save_pretrained(dense)
        options = ["--method", "codebook", "--bits", "3", "--dataset", str(folder(tmp_path / "images", 13))]
        result = CliRunner().invoke(app, ["run", str(dense), str(out), *options, "--num-samples", "5"])
        assert result.exit_code == 0, result.output
        model = ViTForImageClassification.from_pretrained(out)
        (source,) = model.config.quantization_config.provenance["calibration"]
        assert (source["dataset"], source["num_samples"]) == ("images", 5)


class TestSentencePairs:
    @pytest.fixture
    def pairs(self) -> datasets.Dataset:
        lines = [line for line in TEXTS[0].splitlines() if line.strip()][:20]
        return datasets.Dataset.from_dict(
            {"sentence1": [lines[0], *lines[:10]], "sentence2": lines[9:20], "score": [0.5] * 11}
        )

    def test_each_text_is_a_sequence(self, tokenizer: PreTrainedTokenizerFast, pairs: datasets.Dataset) -> None:
        config = CalibrationConfig(pairs, text_column=["sentence1", "sentence2"], num_samples=15, num_held_out=5)
        check_local_data(config)
        data = load_calibration_data(config, tokenizer, max_length=14)
        found = rows(data.batches + data.held_out)
        texts = set(pairs["sentence1"]) | set(pairs["sentence2"])
        # With special tokens, up to the positions of the tokenizer and the model, and none twice.
        assert set(found) == {tuple(tokenizer(text, truncation=True, max_length=14)["input_ids"]) for text in texts}
        assert all(row[0] == tokenizer.bos_token_id for row in found)
        assert data.description["text_column"] == ["sentence1", "sentence2"]
        assert (data.description["num_samples"], data.description["num_held_out"]) == (15, 5)
        assert load_calibration_data(config, tokenizer, max_length=14).fingerprint == data.fingerprint
        other = config.model_copy(update={"seed": 1})
        assert load_calibration_data(other, tokenizer, max_length=14).fingerprint != data.fingerprint
        # What a card says of a dataset of the Hub can be read again.
        assert known_provenance({"calibration": [data.description]})["calibration"] == [data.description]
        CalibrationConfig("org/name", text_column=data.description["text_column"])

    def test_files_streams_and_scarcity(self, pairs: datasets.Dataset, tokenizer: Any, tmp_path: Path) -> None:
        columns = ("sentence1", "sentence2")
        pairs.to_csv(tmp_path / "pairs.csv")
        fields: dict[str, Any] = {"text_column": columns, "num_samples": 4, "num_held_out": 2}
        expected = load_calibration_data(CalibrationConfig(pairs, **fields), tokenizer)
        assert load_calibration_data(CalibrationConfig(tmp_path / "pairs.csv", **fields), tokenizer).fingerprint == (
            expected.fingerprint
        )
        stream = CalibrationConfig(pairs.to_iterable_dataset(), **fields)
        assert len(rows(load_calibration_data(stream, tokenizer).batches)) == 4
        with pytest.warns(UserWarning, match="gives 20 different texts, but 136 are wanted"):
            load_calibration_data(CalibrationConfig(pairs, text_column=columns), tokenizer)

    def test_errors(self, pairs: datasets.Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(
            CalibrationError, match=r"sequences of their own, text_column=\['sentence1', 'sentence2'\]"
        ):
            load(pairs, tokenizer)
        for name, message in (("c", "no column 'c'; its columns"), ("score", "column 'score' holds a float")):
            with pytest.raises(CalibrationError, match=message):
                load(pairs, tokenizer, text_column=["sentence1", name])
        empty = datasets.Dataset.from_dict({"a": [" ", None], "b": ["", ""]})
        with pytest.raises(CalibrationError, match=r"no texts in the columns \['a', 'b'\]"):
            load(empty, tokenizer, text_column=["a", "b"])
        with pytest.raises(CalibrationError, match="no processing_class"):
            load(pairs, None, text_column=["sentence1", "sentence2"])

    def test_shell(self, pairs: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        dense, out = tmp_path / "dense", tmp_path / "out"
        BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        pairs.to_csv(tmp_path / "pairs.csv")
        options = ["--method", "codebook", "--bits", "3", "--dataset", str(tmp_path / "pairs.csv")]
        options += ["--text-column", "sentence1,sentence2", "--num-samples", "8"]
        result = CliRunner().invoke(app, ["run", str(dense), str(out), *options])
        assert result.exit_code == 0, result.output
        (source,) = BertModel.from_pretrained(out).config.quantization_config.provenance["calibration"]
        assert source["text_column"] == ["sentence1", "sentence2"]
