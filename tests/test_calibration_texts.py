"""Texts: tokenised, packed into sequences, and read no further than needed."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import datasets
import pytest
import torch
from calibration_helpers import SMALL, TEXTS, encode, rows, same
from transformers import PreTrainedTokenizerFast

from hf_compress.calibration import sources, units
from hf_compress.calibration.configuration import CalibrationConfig
from hf_compress.calibration.data import load_calibration_data
from hf_compress.errors import CalibrationError


class TestTexts:
    def test_windows_of_the_joined_stream(self, tokenizer: PreTrainedTokenizerFast) -> None:
        texts = TEXTS[0].splitlines()
        data = load_calibration_data(CalibrationConfig(texts, **SMALL), tokenizer)
        assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(4, 32), (2, 32)]
        assert [tuple(batch["input_ids"].shape) for batch in data.held_out] == [(3, 32)]
        for batch in data.batches + data.held_out:
            assert list(batch) == ["input_ids"]
            assert batch["input_ids"].dtype == torch.int64
            assert batch["input_ids"].device.type == "cpu"
        assert (data.num_tokens, data.num_held_out_tokens) == (6 * 32, 3 * 32)

        stream = encode(tokenizer, "\n\n".join(texts))
        assert tokenizer("a")["input_ids"][0] == 0
        assert 0 not in {token for row in rows(data.batches) for token in row}
        windows = [tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)]
        kept = [windows.index(row) for row in rows(data.batches)]
        apart = [windows.index(row) for row in rows(data.held_out)]
        assert kept == sorted(kept)
        assert apart == sorted(apart)
        assert len({*kept, *apart}) == 9

    def test_all_windows_used_when_exactly_enough(self, tokenizer: PreTrainedTokenizerFast) -> None:
        ids = encode(tokenizer, TEXTS[0])[: 9 * 32 + 5]
        text = tokenizer.decode(ids)
        stream = encode(tokenizer, text)
        assert len(stream) // 32 == 9, "the decoded text must give nine windows for this test to mean anything"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = load_calibration_data(CalibrationConfig([text], **SMALL), tokenizer)
        used = {*rows(data.batches), *rows(data.held_out)}
        assert used == {tuple(stream[i * 32 : (i + 1) * 32]) for i in range(9)}

    def test_seed(self, tokenizer: PreTrainedTokenizerFast) -> None:
        first, again, other = (
            load_calibration_data(CalibrationConfig(TEXTS, seed=seed, **SMALL), tokenizer) for seed in (1, 1, 2)
        )
        assert same(first, again)
        assert first.fingerprint != other.fingerprint
        assert rows(first.batches) != rows(other.batches)

    def test_global_random_state_is_left_alone(self, tokenizer: PreTrainedTokenizerFast) -> None:
        examples = [{"x": number} for number in range(20)]
        config = CalibrationConfig(examples, data_collator=lambda group: {"x": torch.rand(len(group))}, **SMALL)
        prints = set()
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.random.get_rng_state()
            load_calibration_data(CalibrationConfig(TEXTS[:1], **SMALL), tokenizer)
            prints.add(load_calibration_data(config).fingerprint)
            assert torch.equal(state, torch.random.get_rng_state())
        assert len(prints) == 1

    def test_no_held_out_when_none_wanted(self, tokenizer: PreTrainedTokenizerFast) -> None:
        data = load_calibration_data(CalibrationConfig(TEXTS, **{**SMALL, "num_held_out": 0}), tokenizer)
        assert data.held_out == []
        assert data.num_held_out_tokens == 0
        assert len(rows(data.batches)) == 6

    def test_fingerprint_is_of_the_tensors(self, tokenizer: PreTrainedTokenizerFast) -> None:
        data = load_calibration_data(CalibrationConfig(TEXTS, **{**SMALL, "batch_size": 6}), tokenizer)
        digest = hashlib.sha256()
        for part, batches in (("batches", data.batches), ("held_out", data.held_out)):
            for number, batch in enumerate(batches):
                ids = batch["input_ids"]
                digest.update(json.dumps([part, number, "input_ids", "torch.int64", list(ids.shape)]).encode())
                digest.update(ids.numpy().tobytes())
        assert data.fingerprint == digest.hexdigest()

    def test_description(self, tokenizer: PreTrainedTokenizerFast) -> None:
        data = load_calibration_data(CalibrationConfig(TEXTS, seed=5, **SMALL), tokenizer)
        assert data.description == {
            "dataset": "in-memory texts",
            "num_samples": 6,
            "num_held_out": 3,
            "sequence_length": 32,
            "seed": 5,
        }
        assert json.loads(json.dumps(data.description)) == data.description

    @pytest.mark.parametrize(("windows", "kept", "apart"), [(1, 1, 0), (2, 1, 1), (3, 2, 1), (8, 6, 2)])
    def test_scarce(self, tokenizer: PreTrainedTokenizerFast, windows: int, kept: int, apart: int) -> None:
        text = "x " * (windows * 32)
        count = len(encode(tokenizer, text)) // 32
        assert count >= windows
        config = CalibrationConfig([text], **{**SMALL, "sequence_length": len(encode(tokenizer, text)) // windows})
        with pytest.warns(UserWarning, match=rf"gives {windows} sequences.*but 9 are wanted"):
            data = load_calibration_data(config, tokenizer)
        assert (len(rows(data.batches)), len(rows(data.held_out))) == (kept, apart)
        assert (data.description["num_samples"], data.description["num_held_out"]) == (kept, apart)

    def test_held_out_stays_whole_when_only_a_little_is_missing(self) -> None:
        request = units.Request(num_samples=100, num_held_out=8, sequence_length=8, batch_size=1, seed=0)
        assert units._share(107, request) == (99, 8)
        assert units._share(108, request) == (100, 8)

    def test_shorter_than_one_window(self, tokenizer: PreTrainedTokenizerFast) -> None:
        text = "import argparse"
        ids = encode(tokenizer, text)
        with pytest.warns(UserWarning, match=rf"gives {len(ids)} tokens, fewer than sequence_length=32"):
            data = load_calibration_data(CalibrationConfig([text], **SMALL), tokenizer)
        assert rows(data.batches) == [tuple(ids)]
        assert data.held_out == []
        assert data.num_tokens == len(ids)
        assert data.description["sequence_length"] == len(ids)

    @pytest.mark.parametrize(("texts", "count"), [([], 0), ([""], 0), (["\n", "  "], 0), (["a"], 1)])
    def test_nothing_to_calibrate_on(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], count: int) -> None:
        with pytest.raises(CalibrationError, match=f"'in-memory texts' gives {count} tokens; at least 2"):
            load_calibration_data(CalibrationConfig(texts, **SMALL), tokenizer)

    def test_no_processing_class(self) -> None:
        with pytest.raises(CalibrationError, match=r"no processing_class.*`processing_class=tokenizer`"):
            load_calibration_data(CalibrationConfig(TEXTS))

    def test_processing_class_that_cannot_tokenise(self) -> None:
        with pytest.raises(CalibrationError, match="SimpleNamespace, which cannot tokenise"):
            load_calibration_data(CalibrationConfig(TEXTS), SimpleNamespace())

    def test_processor_with_a_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        config = CalibrationConfig(TEXTS, **SMALL)
        processor = SimpleNamespace(tokenizer=tokenizer)
        assert same(load_calibration_data(config, processor), load_calibration_data(config, tokenizer))

    def test_longer_than_the_model_allows(self) -> None:
        class Untouched:
            encode = None

            def __call__(self, *_: Any, **__: Any) -> Any:
                raise AssertionError("tokenised although the length cannot fit")

        with pytest.raises(CalibrationError, match="sequence_length=33 exceeds the 32 positions"):
            load_calibration_data(CalibrationConfig(TEXTS, sequence_length=33), Untouched(), max_length=32)

    def test_length_that_just_fits(self, tokenizer: PreTrainedTokenizerFast) -> None:
        data = load_calibration_data(CalibrationConfig(TEXTS, **SMALL), tokenizer, max_length=32)
        assert len(rows(data.batches)) == 6

    def test_vocabulary(self, tokenizer: PreTrainedTokenizerFast) -> None:
        config = CalibrationConfig(TEXTS, **SMALL)
        data = load_calibration_data(config, tokenizer)
        largest = max(max(row) for row in rows(data.batches) + rows(data.held_out))
        with pytest.raises(
            CalibrationError, match=rf"to {largest}, but the vocabulary size of the model is {largest}"
        ):
            load_calibration_data(config, tokenizer, vocab_size=largest)
        assert same(load_calibration_data(config, tokenizer, vocab_size=largest + 1), data)


class TestBigSources:
    """Only as much is read as the choice needs. The bounds on a piece are lowered so that little text is big."""

    CONFIG: ClassVar[dict[str, Any]] = {"num_samples": 3, "num_held_out": 1, "sequence_length": 8, "batch_size": 4}
    WANTED = 4 * 4 * 8  # tokens: four times the four windows of eight

    @pytest.fixture(autouse=True)
    def _small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(units, "_PIECE_CHARACTERS", (64, 256))

    class Counting:
        """A tokenizer of one token a character that remembers what it saw."""

        def __init__(self) -> None:
            self.seen: list[str] = []

        encode = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            self.seen.append(text)
            return {"input_ids": [ord(character) for character in text]}

    def test_stream_stops_early_and_keeps_its_order(self) -> None:
        read: list[int] = []

        def generate() -> Any:
            for number in range(100_000):
                read.append(number)
                yield {"text": f"row {number:06d}"}

        tokenizer = self.Counting()
        stream = datasets.IterableDataset.from_generator(generate)
        load_calibration_data(CalibrationConfig(stream, **self.CONFIG), tokenizer)
        text = "".join(tokenizer.seen)
        assert self.WANTED <= len(text) < 4 * self.WANTED
        assert text.startswith("row 000000\n\nrow 000001\n\nrow 000002")
        assert len(read) < 1000

    @pytest.mark.parametrize("as_dataset", [True, False])
    def test_indexable_source_is_read_in_shuffled_chunks(self, as_dataset: bool) -> None:
        texts = [f"row {number:06d}" for number in range(10_000)]
        source = datasets.Dataset.from_dict({"text": texts}) if as_dataset else texts
        orders = []
        for seed in (0, 0, 1):
            tokenizer = self.Counting()
            load_calibration_data(CalibrationConfig(source, seed=seed, **self.CONFIG), tokenizer)
            text = "".join(tokenizer.seen)
            assert self.WANTED <= len(text) < 4 * self.WANTED
            orders.append([int(row[4:10]) for row in text.split("\n\n") if len(row) == 10])
        assert orders[0] == orders[1] != orders[2]
        assert orders[0][0] != 0
        first = orders[0][0]
        assert orders[0][:10] == list(range(first, first + 10)), "rows of a chunk are consecutive"

    def test_one_endless_row_is_cut(self) -> None:
        tokenizer = self.Counting()
        load_calibration_data(CalibrationConfig(["abcdefgh" * 100_000], **self.CONFIG), tokenizer)
        assert self.WANTED <= sum(map(len, tokenizer.seen)) <= 2 * 256

    def test_one_endless_line_of_a_file_is_cut(self, tmp_path: Path) -> None:
        (tmp_path / "long.txt").write_text("abcdefgh" * 100_000)
        tokenizer = self.Counting()
        load_calibration_data(CalibrationConfig(tmp_path / "long.txt", **self.CONFIG), tokenizer)
        assert self.WANTED <= sum(map(len, tokenizer.seen)) <= 2 * 256

    def test_pieces_put_together_are_the_text(self, tmp_path: Path) -> None:
        (tmp_path / "code.txt").write_text(TEXTS[0], encoding="utf-8")
        config = CalibrationConfig(tmp_path / "code.txt")
        pieces = list(sources.read_texts(config, None, piece_characters=100, seed=0))
        assert len(pieces) > 10
        assert "".join(pieces) == TEXTS[0]
