"""Where the texts come from: columns, conversations, local files and the Hub."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from calibration_helpers import CONVERSATION, SMALL, TEXTS, encode, rows, same, write
from transformers import PreTrainedTokenizerFast

from hf_compress.calibration.configuration import CalibrationConfig
from hf_compress.calibration.data import load_calibration_data
from hf_compress.calibration.sources import check_local_data
from hf_compress.errors import CalibrationError


class TestRows:
    @pytest.mark.parametrize(
        "columns",
        [
            {"text": "x", "other": "y"},
            {"story": "x", "number": 1},
            {"text": "x", "messages": CONVERSATION},
        ],
    )
    @pytest.mark.parametrize("form", ["dataset", "iterable", "generator"])
    def test_column_is_found(self, tokenizer: PreTrainedTokenizerFast, columns: dict[str, Any], form: str) -> None:
        column = next(iter(columns))
        lines = TEXTS[0].splitlines()
        table = [{**columns, column: line} for line in lines]
        dataset: Any = datasets.Dataset.from_list(table)
        if form == "iterable":
            dataset = dataset.to_iterable_dataset()
        elif form == "generator":
            dataset = datasets.IterableDataset.from_generator(lambda: iter(table))
        data = load_calibration_data(CalibrationConfig(dataset, **SMALL), tokenizer)
        assert same(data, load_calibration_data(CalibrationConfig(lines, **SMALL), tokenizer))
        assert data.description["dataset"] == "in-memory dataset"

    def test_named_column(self, tokenizer: PreTrainedTokenizerFast) -> None:
        lines = TEXTS[0].splitlines()
        dataset = datasets.Dataset.from_dict({"text": ["no"] * len(lines), "body": lines})
        data = load_calibration_data(CalibrationConfig(dataset, text_column="body", **SMALL), tokenizer)
        assert same(data, load_calibration_data(CalibrationConfig(lines, **SMALL), tokenizer))
        assert data.description["text_column"] == "body"

    def test_rows_without_text_are_passed_over(self, tokenizer: PreTrainedTokenizerFast) -> None:
        lines: list[str | None] = [*TEXTS[0].splitlines()]
        dataset = datasets.Dataset.from_dict({"text": [None, *lines, None]})
        data = load_calibration_data(CalibrationConfig(dataset, **SMALL), tokenizer)
        assert same(data, load_calibration_data(CalibrationConfig(lines, **SMALL), tokenizer))

    @pytest.mark.parametrize(
        ("table", "column", "message"),
        [
            ({"a": ["x"], "b": ["y"]}, None, r"no column that is plainly the text.*\['a', 'b'\].*text_column='a'"),
            ({"n": [1]}, None, r"\['n'\].*text_column='n'"),
            ({"text": ["x"], "b": ["y"]}, "c", r"no column 'c'; its columns are \['text', 'b'\].*text_column='text'"),
            ({"n": [1], "text": ["x"]}, "n", "a row of the text column holds a int"),
        ],
    )
    def test_no_column(
        self, tokenizer: PreTrainedTokenizerFast, table: dict[str, Any], column: str | None, message: str
    ) -> None:
        dataset = datasets.Dataset.from_dict(table)
        with pytest.raises(CalibrationError, match=message):
            load_calibration_data(CalibrationConfig(dataset, text_column=column), tokenizer)

    @pytest.mark.parametrize(
        "dataset",
        [
            datasets.Dataset.from_dict({"text": []}),
            datasets.Dataset.from_dict({}),
            datasets.IterableDataset.from_generator(lambda: iter([])),
            datasets.Dataset.from_dict({"text": [None, None]}),
        ],
    )
    def test_empty(self, tokenizer: PreTrainedTokenizerFast, dataset: Any) -> None:
        with pytest.raises(CalibrationError, match="'in-memory dataset' gives 0 tokens"):
            load_calibration_data(
                CalibrationConfig(dataset, text_column="text" if dataset.features else None), tokenizer
            )

    def test_stream_that_breaks(self, tokenizer: PreTrainedTokenizerFast) -> None:
        def generate() -> Any:
            yield {"text": "fine"}
            raise OSError("the line went dead")

        stream = datasets.IterableDataset.from_generator(generate)
        with pytest.raises(CalibrationError, match=r"'in-memory dataset' could not be read.*the line went dead"):
            load_calibration_data(CalibrationConfig(stream), tokenizer)


class TestConversations:
    @pytest.mark.parametrize("extra", [{}, {"prompt": "x"}, {"prompt": "x", "prompt_id": "y"}])
    def test_through_the_chat_template(self, tokenizer: PreTrainedTokenizerFast, extra: dict[str, str]) -> None:
        dataset = datasets.Dataset.from_list([{**extra, "messages": CONVERSATION}] * 40)
        data = load_calibration_data(CalibrationConfig(dataset, **SMALL), tokenizer)
        rendered = "<|user|>Why is the sky blue?\n<|assistant|>Scattering.\n" * 40
        stream = encode(tokenizer, rendered)
        assert tokenizer.convert_tokens_to_ids("<|user|>") in stream
        windows = [tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)]
        assert set(rows(data.batches)) <= set(windows)
        assert data.num_tokens == 6 * 32

    def test_named_column_of_conversations(self, tokenizer: PreTrainedTokenizerFast) -> None:
        plain = datasets.Dataset.from_list([{"messages": CONVERSATION}] * 40)
        named = plain.rename_column("messages", "chat")
        first = load_calibration_data(CalibrationConfig(plain, **SMALL), tokenizer)
        assert same(load_calibration_data(CalibrationConfig(named, text_column="chat", **SMALL), tokenizer), first)

    def test_format_of_the_dataset_does_not_matter(self, tokenizer: PreTrainedTokenizerFast) -> None:
        dataset = datasets.Dataset.from_list([{"messages": CONVERSATION}] * 40)
        plain = load_calibration_data(CalibrationConfig(dataset, **SMALL), tokenizer)
        formatted = CalibrationConfig(dataset.with_format("numpy"), **SMALL)
        assert same(load_calibration_data(formatted, tokenizer), plain)

    def test_no_chat_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        bare = copy.deepcopy(tokenizer)
        bare.chat_template = None
        dataset = datasets.Dataset.from_list([{"messages": CONVERSATION}])
        with pytest.raises(CalibrationError, match=r"could not render a conversation.*`text_column=`") as caught:
            load_calibration_data(CalibrationConfig(dataset), bare)
        assert isinstance(caught.value.__cause__, ValueError)


class TestLocalFiles:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
    def test_file(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str, streaming: bool) -> None:
        texts = [line for line in TEXTS[0].splitlines() if line.strip()]
        path = write(tmp_path, suffix, texts)
        expected = load_calibration_data(CalibrationConfig(texts, **SMALL), tokenizer)
        for dataset in (path, str(path)):
            config = CalibrationConfig(dataset, streaming=streaming, **SMALL)
            data = load_calibration_data(config, tokenizer, cache_dir=tmp_path / "cache")
            assert same(data, expected)
            assert data.description["dataset"] == f"corpus{suffix}"
            assert str(tmp_path) not in json.dumps(data.description)

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
    def test_folder(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str) -> None:
        folder = tmp_path / "corpora"
        folder.mkdir()
        texts = [line for line in TEXTS[0].splitlines() if line.strip()]
        write(folder, suffix, texts[:100], "a")
        write(folder, suffix, texts[100:], "b")
        (folder / "README.md").write_text("not data")
        data = load_calibration_data(CalibrationConfig(folder, **SMALL), tokenizer, cache_dir=tmp_path / "cache")
        assert same(data, load_calibration_data(CalibrationConfig(texts, **SMALL), tokenizer))
        assert data.description["dataset"] == "corpora"

    def test_changed_file_is_read_anew(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        config = CalibrationConfig(write(tmp_path, ".jsonl", TEXTS[:1]), **SMALL)
        first = load_calibration_data(config, tokenizer, cache_dir=tmp_path / "cache")
        write(tmp_path, ".jsonl", TEXTS[1:2])
        second = load_calibration_data(config, tokenizer, cache_dir=tmp_path / "cache")
        assert same(second, load_calibration_data(CalibrationConfig(TEXTS[1:2], **SMALL), tokenizer))
        assert not same(first, second)

    def test_existing_path_wins_over_a_hub_id(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "org" / "name").mkdir(parents=True)
        write(tmp_path / "org" / "name", ".txt", TEXTS[:1])
        monkeypatch.chdir(tmp_path)
        data = load_calibration_data(CalibrationConfig("org/name", **SMALL), tokenizer)
        assert same(data, load_calibration_data(CalibrationConfig(TEXTS[:1], **SMALL), tokenizer))

    @pytest.mark.parametrize(
        "missing",
        ["corpus.txt", "data/corpus.jsonl", "./corpus", "/no/such/folder", "a/b/c", "~/no/such", Path("org/name")],
    )
    def test_missing_path(self, tokenizer: PreTrainedTokenizerFast, missing: str | Path) -> None:
        with pytest.raises(CalibrationError, match="is no file or folder") as caught:
            load_calibration_data(CalibrationConfig(missing), tokenizer)
        assert repr(str(missing)) in str(caught.value)

    def test_a_text_taken_for_a_path(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(CalibrationError, match="texts in memory are given as a list of str") as caught:
            load_calibration_data(CalibrationConfig("Once upon a time. " * 1000), tokenizer)
        assert len(str(caught.value)) < 600

    @pytest.mark.parametrize(
        "option", [{"name": "subset"}, {"revision": "main"}, {"split": "test"}], ids=lambda option: next(iter(option))
    )
    def test_options_of_the_hub(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, option: dict[str, str]
    ) -> None:
        path = write(tmp_path, ".txt", TEXTS[:1])
        with pytest.raises(CalibrationError, match=f"{next(iter(option))}=.* applies to datasets of the Hub"):
            load_calibration_data(CalibrationConfig(path, **option), tokenizer)

    def test_text_column_of_plain_text(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        path = write(tmp_path, ".txt", TEXTS[:1])
        with pytest.raises(CalibrationError, match="plain text without columns"):
            load_calibration_data(CalibrationConfig(path, text_column="text"), tokenizer)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], "nothing to read"),
            (["notes.md"], r"nothing to read: found \['.md'\]"),
            (["a.txt", "b.csv"], "files of several kinds"),
            (["a.jsonl"], "'folder' is empty"),
        ],
    )
    def test_useless_folder(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, files: list[str], message: str
    ) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        for file in files:
            (folder / file).touch()
        with pytest.raises(CalibrationError, match=message):
            load_calibration_data(CalibrationConfig(folder), tokenizer)

    def test_file_of_another_kind(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        (tmp_path / "corpus.bin").write_bytes(b"\0")
        with pytest.raises(CalibrationError, match=r"found \['.bin'\], expected files of one kind of .*'.parquet'"):
            load_calibration_data(CalibrationConfig(tmp_path / "corpus.bin"), tokenizer)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_damaged_json(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, streaming: bool) -> None:
        (tmp_path / "bad.jsonl").write_text('{"text": \n nonsense')
        config = CalibrationConfig(tmp_path / "bad.jsonl", streaming=streaming)
        with pytest.raises(CalibrationError, match=r"'bad.jsonl' could not be read.*Check the contents") as caught:
            load_calibration_data(config, tokenizer, cache_dir=tmp_path / "cache")
        assert caught.value.__cause__ is not None

    def test_text_that_is_not_utf8(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
        with pytest.raises(CalibrationError, match=r"'latin.txt' could not be read: UnicodeDecodeError"):
            load_calibration_data(CalibrationConfig(tmp_path / "latin.txt"), tokenizer)


class TestHub:
    """`datasets.load_dataset` is replaced: these tests must pass without a network."""

    def test_arguments_and_description(
        self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        calls = []

        def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
            calls.append((args, kwargs))
            return datasets.Dataset.from_dict({"text": TEXTS})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        config = CalibrationConfig(
            "Salesforce/wikitext", name="wikitext-2-raw-v1", split="test", revision="abc", streaming=True, **SMALL
        )
        data = load_calibration_data(config, tokenizer, token="hf_x", cache_dir=tmp_path)
        assert calls == [
            (
                ("Salesforce/wikitext", "wikitext-2-raw-v1"),
                {"split": "test", "revision": "abc", "streaming": True, "token": "hf_x", "cache_dir": str(tmp_path)},
            )
        ]
        assert data.description == {
            "dataset": "Salesforce/wikitext",
            "split": "test",
            "name": "wikitext-2-raw-v1",
            "revision": "abc",
            "num_samples": 6,
            "num_held_out": 3,
            "sequence_length": 32,
            "seed": 0,
        }

    @pytest.mark.parametrize(
        "failure",
        [
            ConnectionError("no route"),
            datasets.exceptions.DatasetNotFoundError("no route"),
            ValueError("no route"),
        ],
    )
    @pytest.mark.parametrize("when", ["opening", "reading"])
    def test_failure(
        self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, failure: Exception, when: str
    ) -> None:
        def generate() -> Any:
            yield {"text": "fine"}
            raise failure

        def load_dataset(*_: Any, **__: Any) -> datasets.IterableDataset:
            if when == "opening":
                raise failure
            return datasets.IterableDataset.from_generator(generate)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        config = CalibrationConfig("org/name.v1", name="raw", split="valid")
        with pytest.raises(CalibrationError, match="could not be read") as caught:
            load_calibration_data(config, tokenizer, token="hf_secret")
        for expected in (
            "'org/name.v1'",
            "name='raw'",
            "split='valid'",
            type(failure).__name__,
            "no route",
            "`token`",
        ):
            assert expected in str(caught.value)
        assert "hf_secret" not in str(caught.value)
        assert caught.value.__cause__ is not None


class TestLookingAhead:
    """What is seen before anything is loaded: local data only, and the same errors as when they are read."""

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
    def test_good_files_pass(self, tmp_path: Path, suffix: str) -> None:
        path = write(tmp_path, suffix, TEXTS[:1] * 3)
        check_local_data(CalibrationConfig(path))
        check_local_data(CalibrationConfig([CalibrationConfig(path), CalibrationConfig(["a text"])]))

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".csv"])
    def test_missing_column(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str) -> None:
        config = CalibrationConfig(write(tmp_path, suffix, TEXTS[:1] * 3), text_column="body")
        with pytest.raises(CalibrationError, match="text_column") as late:
            load_calibration_data(config, tokenizer, cache_dir=tmp_path / "cache")
        with pytest.raises(CalibrationError) as early:
            check_local_data(config)
        assert str(early.value) == str(late.value)

    def test_missing_column_of_a_dataset_in_memory(self) -> None:
        with pytest.raises(CalibrationError, match=r"no column that is plainly the text.*\['a', 'b'\]"):
            check_local_data(CalibrationConfig(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]})))

    def test_a_column_that_the_first_row_leaves_out(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"a": 1, "b": 2}\n{"a": 1, "text": "here"}\n')
        check_local_data(CalibrationConfig(tmp_path / "rows.jsonl"))

    def test_missing_path_in_a_mixture(self, tmp_path: Path) -> None:
        parts = [CalibrationConfig(["a text"]), CalibrationConfig(tmp_path / "none")]
        with pytest.raises(CalibrationError, match="is no file or folder"):
            check_local_data(CalibrationConfig(parts))

    def test_examples_for_a_collator_need_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"a": 1, "b": 2}\n')
        check_local_data(CalibrationConfig(tmp_path / "rows.jsonl", data_collator=lambda rows: {}))
        with pytest.raises(CalibrationError, match="is no file or folder"):
            check_local_data(CalibrationConfig(tmp_path / "none.jsonl", data_collator=lambda rows: {}))

    def test_the_hub_is_not_asked_and_no_stream_is_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def untouched(*_: Any, **__: Any) -> Any:
            raise AssertionError("read although only local data may be looked at")
            yield

        monkeypatch.setattr(datasets, "load_dataset", untouched)
        check_local_data(CalibrationConfig("org/name", name="raw"))
        check_local_data(CalibrationConfig(datasets.IterableDataset.from_generator(untouched)))
