"""Calibration data: every kind of source, the choice of sequences, mixtures, collators and every error."""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from hf_compress.calibration import sources, units
from hf_compress.calibration.configuration import CalibrationConfig
from hf_compress.calibration.data import CalibrationData, load_calibration_data, warn_if_few_tokens
from hf_compress.errors import CalibrationError, ConfigurationError

TEXTS = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (textwrap, ast, argparse)]
SMALL: dict[str, Any] = {"num_samples": 6, "num_held_out": 3, "sequence_length": 32, "batch_size": 4}
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
CONVERSATION = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Scattering."}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<|user|>", "<|assistant|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:1], trainer)
    # Like Llama's, it starts a text with BOS when left to itself.
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # A model_max_length far below the stream's: packing must neither truncate nor warn.
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=16)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def rows(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def same(first: CalibrationData, second: CalibrationData) -> bool:
    return first.fingerprint == second.fingerprint and rows(first.batches) == rows(second.batches)


def collate_numbers(examples: list[Any]) -> dict[str, torch.Tensor]:
    return {"values": torch.tensor([example["x"] for example in examples])}


class TestConfiguration:
    def test_defaults(self) -> None:
        config = CalibrationConfig("org/name")
        fields = {name: getattr(config, name) for name in type(config).model_fields}
        assert fields == {
            "dataset": "org/name",
            "weights": None,
            "name": None,
            "split": "train",
            "revision": None,
            "text_column": None,
            "data_collator": None,
            "num_samples": 128,
            "sequence_length": 2048,
            "num_held_out": 8,
            "seed": 0,
            "batch_size": 8,
            "streaming": False,
        }

    def test_docstring_names_every_field(self) -> None:
        for field in CalibrationConfig.model_fields:
            assert f"        {field} (" in (CalibrationConfig.__doc__ or "")

    def test_import_is_light(self) -> None:
        # The package's own __init__ imports Transformers and is left out: it is the module that must be light.
        code = (
            "import sys, types; package = types.ModuleType('hf_compress'); package.__path__ = [sys.argv[1]];"
            "sys.modules['hf_compress'] = package; import hf_compress.calibration.configuration as module;"
            "assert module.CalibrationConfig(['a text']).kind == 'texts';"
            "sys.exit(any(name in sys.modules for name in ('torch', 'datasets', 'transformers')))"
        )
        path = str(Path(sources.__file__).parents[1])
        assert subprocess.run([sys.executable, "-c", code, path], check=False, timeout=60).returncode == 0

    @pytest.mark.parametrize(
        ("dataset", "extra", "kind"),
        [
            ("org/name", {}, "source"),
            (Path("data.txt"), {}, "source"),
            (["a", "b"], {}, "texts"),
            ([], {}, "texts"),
            (torch.zeros(2, 3, dtype=torch.int32), {}, "tokens"),
            ([torch.zeros(3, dtype=torch.int64)], {}, "tokens"),
            (datasets.Dataset.from_dict({"text": ["a"]}), {}, "rows"),
            (datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), {}, "rows"),
            ([{"x": 1}], {"data_collator": collate_numbers}, "examples"),
            ([CalibrationConfig("a"), CalibrationConfig("b")], {"weights": [1, 2.5]}, "mixture"),
        ],
    )
    def test_kinds(self, dataset: Any, extra: dict[str, Any], kind: str) -> None:
        assert CalibrationConfig(dataset, **extra).kind == kind

    @pytest.mark.parametrize("tensor", [torch.arange(6).view(2, 3), [torch.arange(3)]])
    def test_copies_are_the_same_object(self, tensor: Any) -> None:
        config = CalibrationConfig(tensor)
        assert copy.deepcopy(config) is config
        assert copy.copy(config) is config
        assert copy.deepcopy({"calibration": config})["calibration"].dataset is tensor

    def test_model_copy_leaves_the_original_and_validates(self) -> None:
        config = CalibrationConfig("org/name", seed=3)
        changed = config.model_copy(update={"num_samples": 5})
        assert (changed.num_samples, changed.seed, config.num_samples) == (5, 3, 128)
        with pytest.raises(ConfigurationError, match="num_samples"):
            config.model_copy(update={"num_samples": 0})

    def test_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            CalibrationConfig("org/name").seed = 1

    def test_repr_and_errors_do_not_print_the_data(self) -> None:
        texts = ["secret"] * 3
        assert "a list of 3 items (str)" in repr(CalibrationConfig(texts))
        assert "secret" not in repr(CalibrationConfig(texts))
        assert "dataset='org/name'" in repr(CalibrationConfig("org/name"))
        with pytest.raises(ConfigurationError) as caught:
            CalibrationConfig([*texts, 1])
        assert "a list of 4 items (int, str)" in str(caught.value)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, r'`dataset` is missing.*CalibrationConfig\("Salesforce/wikitext", name="wikitext-2-raw-v1"\)'),
            ({"dataset": "  "}, "empty string"),
            ({"dataset": 3}, "`dataset` is a int; expected a Hub dataset id"),
            ({"dataset": torch.zeros(2, 3)}, r"a tensor of shape \(2, 3\) and dtype torch.float32"),
            ({"dataset": torch.zeros(3, dtype=torch.int64)}, r"a tensor of shape \(3,\)"),
            ({"dataset": torch.zeros(2, 3, dtype=torch.bool)}, "torch.bool"),
            ({"dataset": [torch.zeros(2, 3, dtype=torch.int64)]}, "a list of 1 items"),
            ({"dataset": [{"x": 1}]}, "together with `data_collator`"),
            ({"dataset": datasets.DatasetDict()}, r"a DatasetDict; pass one of its splits, such as data\['train'\]"),
            ({"dataset": ["a", CalibrationConfig("b")]}, "a list of 2 items"),
            ({"dataset": 3, "data_collator": collate_numbers}, "`dataset` is a int"),
            ({"dataset": "a", "num_samples": 0}, "num_samples.*greater than or equal to 1.*got 0"),
            ({"dataset": "a", "num_samples": True}, "num_samples"),
            ({"dataset": "a", "num_samples": 1.5}, "num_samples"),
            ({"dataset": "a", "sequence_length": 1}, "sequence_length.*greater than or equal to 2"),
            ({"dataset": "a", "batch_size": 0}, "batch_size"),
            ({"dataset": "a", "num_held_out": -1}, "num_held_out"),
            ({"dataset": "a", "seed": -1}, "seed"),
            ({"dataset": "a", "split": ""}, "split"),
            ({"dataset": "a", "data_collator": 3}, "data_collator"),
            ({"dataset": "a", "seq_length": 3}, "unknown field `seq_length`.*`sequence_length`"),
            ({"dataset": "a", "weights": [1]}, "`weights` has no effect"),
            ({"dataset": ["a"], "name": "b"}, "`name` has no effect when `dataset` is a list of 1 items"),
            ({"dataset": ["a"], "text_column": "b"}, "`text_column` has no effect"),
            ({"dataset": "a", "text_column": "b", "data_collator": collate_numbers}, "beside `data_collator`"),
            ({"dataset": [CalibrationConfig("a")], "name": "b"}, "`name` has no effect.*set it on the parts"),
            ({"dataset": [CalibrationConfig("a")], "weights": [1, 2]}, "`weights` has 2 entries for 1 parts"),
            ({"dataset": [CalibrationConfig("a")] * 2, "weights": [1, 0]}, r"positive and finite, got \[1.0, 0.0\]"),
            ({"dataset": [CalibrationConfig("a")], "weights": [float("nan")]}, "positive and finite"),
            ({"dataset": [CalibrationConfig("a")], "weights": [float("inf")]}, "positive and finite"),
            (
                {"dataset": [CalibrationConfig("a", sequence_length=64)]},
                "a part has sequence_length=64, the mixture 2048",
            ),
        ],
    )
    def test_errors(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            CalibrationConfig(**fields)


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


def write(folder: Path, suffix: str, texts: list[str], stem: str = "corpus") -> Path:
    path = folder / f"{stem}{suffix}"
    table = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(list(table), indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        table.to_parquet(path)
    elif suffix == ".csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


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


class TestTokenIds:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_tensor_is_used_as_it_is(self, dtype: torch.dtype) -> None:
        ids = torch.arange(60).view(12, 5).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = load_calibration_data(CalibrationConfig(ids, num_held_out=2, batch_size=4))
        assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(4, 5), (4, 5), (2, 5)]
        assert data.batches[0]["input_ids"].dtype == torch.int64
        given = [tuple(row) for row in ids.tolist()]
        assert sorted(rows(data.batches) + rows(data.held_out)) == given
        assert rows(data.batches) == sorted(rows(data.batches)), "the order of the rows is kept"
        assert (data.num_tokens, data.num_held_out_tokens) == (50, 10)
        assert data.description["dataset"] == "in-memory token ids"
        assert data.description["sequence_length"] == 5

    def test_num_samples_limits(self) -> None:
        data = load_calibration_data(CalibrationConfig(torch.arange(60).view(12, 5), num_samples=3, num_held_out=1))
        assert (len(rows(data.batches)), len(rows(data.held_out))) == (3, 1)
        assert not {*rows(data.batches)} & {*rows(data.held_out)}

    def test_lengths_are_not_mixed_in_a_batch(self) -> None:
        lengths = [3, 5, 3, 5, 5, 3, 3, 7]
        ids = [torch.full((length,), number) for number, length in enumerate(lengths)]
        data = load_calibration_data(CalibrationConfig(ids, num_held_out=0, batch_size=2))
        grouped = [batch["input_ids"][:, 0].tolist() for batch in data.batches]
        assert grouped == [[0, 2], [1, 3], [5, 6], [4], [7]]
        assert data.num_tokens == sum(lengths)
        assert data.description["sequence_length"] == 7

    def test_given_tensor_is_not_changed_by_the_user_of_the_batches(self) -> None:
        ids = torch.arange(60).view(12, 5)
        data = load_calibration_data(CalibrationConfig(ids))
        data.batches[0]["input_ids"].zero_()
        assert torch.equal(ids, torch.arange(60).view(12, 5))

    @pytest.mark.parametrize("empty", [torch.zeros(0, 4, dtype=torch.int64), [torch.zeros(0, dtype=torch.int64)]])
    def test_empty(self, empty: Any) -> None:
        with pytest.raises(CalibrationError, match="holds no token ids"):
            load_calibration_data(CalibrationConfig(empty))

    def test_limits_of_the_model(self) -> None:
        config = CalibrationConfig(torch.arange(60).view(12, 5))
        with pytest.raises(CalibrationError, match=r"from 0 to .*vocabulary size of the model is 20"):
            load_calibration_data(config, vocab_size=20)
        with pytest.raises(CalibrationError, match="from -100"):
            load_calibration_data(CalibrationConfig(torch.full((2, 3), -100)), vocab_size=20)
        with pytest.raises(CalibrationError, match="a sequence has 5 tokens, more than the 4 positions"):
            load_calibration_data(config, max_length=4)
        assert load_calibration_data(config, vocab_size=60, max_length=5).num_tokens == 45


class TestCollator:
    EXAMPLES = tuple({"x": number} for number in range(20))

    def test_dataset_positional_as_in_the_readme(self) -> None:
        dataset = datasets.Dataset.from_list(list(self.EXAMPLES))
        seen: list[int] = []

        def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
            seen.append(len(examples))
            return collate_numbers(examples)

        config = CalibrationConfig(dataset, data_collator=collate, num_samples=6, num_held_out=3, batch_size=4)
        data = load_calibration_data(config, vocab_size=1, max_length=1)
        assert seen == [4, 2, 3]
        kept = torch.cat([batch["values"] for batch in data.batches]).tolist()
        apart = torch.cat([batch["values"] for batch in data.held_out]).tolist()
        assert len({*kept, *apart}) == 9
        assert {*kept, *apart} != set(range(9)), "drawn, not the first nine"
        assert (data.num_tokens, data.num_held_out_tokens) == (6, 3)
        assert data.description == {"dataset": "in-memory dataset", "num_samples": 6, "num_held_out": 3, "seed": 0}

    @pytest.mark.parametrize("form", ["iterator", "dataset", "torch"])
    def test_stream_gives_its_first_examples(self, form: str) -> None:
        examples = self.EXAMPLES

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self) -> Any:
                return iter(examples)

            def __len__(self) -> int:
                return len(examples)

        stream: Any = {
            "iterator": lambda: iter(examples),
            "dataset": lambda: datasets.Dataset.from_list(list(examples)).to_iterable_dataset(),
            "torch": Stream,
        }[form]()
        config = CalibrationConfig(stream, data_collator=collate_numbers, num_samples=6, num_held_out=3, batch_size=4)
        data = load_calibration_data(config)
        assert [batch["values"].tolist() for batch in data.batches] == [[0, 1, 2, 3], [4, 5]]
        assert [batch["values"].tolist() for batch in data.held_out] == [[6, 7, 8]]

    def test_seed_draws_the_examples(self) -> None:
        configs = [
            CalibrationConfig(list(self.EXAMPLES), data_collator=collate_numbers, seed=seed, **SMALL)
            for seed in (0, 0, 1)
        ]
        prints = [load_calibration_data(config).fingerprint for config in configs]
        assert prints[0] == prints[1] != prints[2]

    def test_local_file(self, tmp_path: Path) -> None:
        path = write(tmp_path, ".jsonl", ["text"] * 20)

        def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
            return {"number": torch.tensor([example["number"] for example in examples])}

        data = load_calibration_data(CalibrationConfig(path, data_collator=collate, **SMALL), cache_dir=tmp_path / "c")
        numbers = {number for batch in data.batches + data.held_out for number in batch["number"].tolist()}
        assert len(numbers) == 9

    def test_tokens_are_counted_without_padding(self) -> None:
        def collate(examples: list[Any]) -> BatchEncoding:
            ids = torch.ones(len(examples), 5, dtype=torch.int64)
            mask = torch.tensor([[1, 1, 1, 0, 0]] * len(examples))
            return BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": ids})

        config = CalibrationConfig(list(self.EXAMPLES), data_collator=collate, **SMALL)
        data = load_calibration_data(config)
        assert list(data.batches[0]) == ["input_ids", "attention_mask", "labels"]
        assert (data.num_tokens, data.num_held_out_tokens) == (18, 9)

    @pytest.mark.parametrize(
        ("extra", "count"), [({}, 30), ({"attention_mask": torch.zeros(6, 1, 5, 5)}, 30)], ids=["none", "four axes"]
    )
    def test_tokens_without_a_plain_mask(self, extra: dict[str, torch.Tensor], count: int) -> None:
        config = CalibrationConfig(
            list(self.EXAMPLES),
            data_collator=lambda examples: {"input_ids": torch.ones(len(examples), 5, dtype=torch.int64), **extra},
            **{**SMALL, "batch_size": 6},
        )
        assert load_calibration_data(config).num_tokens == count

    def test_fingerprint_sees_names_types_shapes_and_order(self) -> None:
        def fingerprint(collate: Any) -> str:
            config = CalibrationConfig(list(self.EXAMPLES), data_collator=collate, **SMALL)
            return load_calibration_data(config).fingerprint

        zeros = torch.zeros(2, 3)
        prints = [
            fingerprint(lambda _: {"a": zeros}),
            fingerprint(lambda _: {"b": zeros}),
            fingerprint(lambda _: {"a": zeros.int()}),
            fingerprint(lambda _: {"a": zeros.view(3, 2)}),
            fingerprint(lambda _: {"a": zeros.bfloat16()}),
            fingerprint(lambda _: {"a": torch.tensor(0.0)}),
            fingerprint(lambda _: {"a": zeros > 1}),
        ]
        assert len(set(prints)) == len(prints)
        ones = torch.ones(2)
        forwards, backwards = {"a": zeros, "b": ones}, {"b": ones, "a": zeros}
        assert fingerprint(lambda _: forwards) == fingerprint(lambda _: backwards), "no batch depends on this order"

    def test_scarce(self) -> None:
        config = CalibrationConfig(list(self.EXAMPLES[:4]), data_collator=collate_numbers)
        with pytest.warns(UserWarning, match="gives 4 examples, but 136 are wanted"):
            data = load_calibration_data(config)
        assert (data.num_tokens, data.num_held_out_tokens) == (3, 1)

    def test_limits_of_the_model(self) -> None:
        def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[example["x"], 30] for example in examples])}

        config = CalibrationConfig(list(self.EXAMPLES), data_collator=collate, **SMALL)
        with pytest.raises(CalibrationError, match="to 30, but the vocabulary size of the model is 30"):
            load_calibration_data(config, vocab_size=30)
        with pytest.raises(CalibrationError, match="a sequence has 2 tokens, more than the 1 positions"):
            load_calibration_data(config, max_length=1)

    @pytest.mark.parametrize(
        ("collate", "message"),
        [
            (lambda examples: [torch.zeros(1)], "returned list for a list of 4 examples; expected a dictionary"),
            (lambda examples: {}, "returned dict without entries"),
            (lambda examples: {"a": torch.zeros(1), "b": [1], "c": "x"}, "{'b': 'list', 'c': 'str'}"),
        ],
    )
    def test_useless_collator(self, collate: Any, message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            load_calibration_data(CalibrationConfig(list(self.EXAMPLES), data_collator=collate, **SMALL))

    @pytest.mark.parametrize("empty", [[], iter([]), datasets.Dataset.from_dict({"x": []})])
    def test_empty(self, empty: Any) -> None:
        with pytest.raises(CalibrationError, match="holds no examples"):
            load_calibration_data(CalibrationConfig(empty, data_collator=collate_numbers))

    def test_examples_that_cannot_be_read(self) -> None:
        def generate() -> Any:
            yield {"x": 1}
            raise OSError("disk on fire")

        with pytest.raises(CalibrationError, match="'in-memory examples' could not be read: OSError: disk on fire"):
            load_calibration_data(CalibrationConfig(generate(), data_collator=collate_numbers))


class TestMixture:
    @staticmethod
    def constant(value: int, count: int = 40, length: int = 4) -> CalibrationConfig:
        return CalibrationConfig(torch.full((count, length), value), num_samples=1)

    def test_shares_by_weight(self) -> None:
        parts = [self.constant(1), self.constant(2), self.constant(3)]
        config = CalibrationConfig(parts, weights=[1, 1, 2], num_samples=10, num_held_out=4, batch_size=3)
        data = load_calibration_data(config)
        values = [row[0] for row in rows(data.batches)]
        assert [values.count(value) for value in (1, 2, 3)] == [3, 2, 5]
        assert sorted(row[0] for row in rows(data.held_out)) == [1, 2, 3, 3]
        assert values == [3, 1, 2, 3, 1, 3, 3, 2, 1, 3]
        assert [len(batch["input_ids"]) for batch in data.batches] == [3, 3, 3, 1]
        assert data.num_tokens == 40
        description = data.description
        assert (description["dataset"], description["num_samples"], description["num_held_out"]) == ("mixture", 10, 4)
        assert [part["num_samples"] for part in description["parts"]] == [3, 2, 5]
        assert description["sequence_length"] == 4
        assert json.loads(json.dumps(description)) == description

    @pytest.mark.parametrize("total", [1, 2, 7, 128])
    @pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.1, 0.2, 0.7), (3.0,), (1e-9, 1.0), (5.0, 3.0, 1.0, 1.0)])
    def test_apportionment(self, total: int, weights: tuple[float, ...]) -> None:
        shares = units._apportion(total, weights)
        assert sum(shares) == total
        assert all(abs(share - total * w / sum(weights)) < 1 for share, w in zip(shares, weights, strict=True))

    def test_equal_by_default_and_small_parts_left_out(self) -> None:
        config = CalibrationConfig([self.constant(value) for value in range(4)], num_samples=2, num_held_out=0)
        assert [row[0] for row in rows(load_calibration_data(config).batches)] == [0, 1]

    def test_texts_with_token_ids(self, tokenizer: PreTrainedTokenizerFast) -> None:
        parts = [CalibrationConfig(TEXTS[:1], num_samples=1, seed=9), self.constant(7, length=32)]
        data = load_calibration_data(CalibrationConfig(parts, **SMALL), tokenizer)
        assert [tuple(batch["input_ids"].shape) for batch in data.batches] == [(4, 32), (2, 32)]
        assert rows(data.batches).count((7,) * 32) == 3
        assert same(data, load_calibration_data(CalibrationConfig(parts, **SMALL), tokenizer))

    def test_same_source_twice_gives_two_choices(self, tokenizer: PreTrainedTokenizerFast) -> None:
        part = CalibrationConfig(TEXTS)
        data = load_calibration_data(CalibrationConfig([part, part], **SMALL), tokenizer)
        chosen = rows(data.batches)
        assert set(chosen[::2]) != set(chosen[1::2])

    def test_collated_parts_keep_their_batches(self) -> None:
        collated = CalibrationConfig([{"x": number} for number in range(40)], data_collator=collate_numbers)
        config = CalibrationConfig([collated, self.constant(1)], num_samples=8, num_held_out=0, batch_size=4)
        data = load_calibration_data(config)
        assert [list(batch) for batch in data.batches] == [["values"], ["input_ids"]]
        assert data.num_tokens == 4 + 4 * 4

    def test_nested(self) -> None:
        inner = CalibrationConfig([self.constant(1), self.constant(2)], weights=[3, 1])
        data = load_calibration_data(CalibrationConfig([inner, self.constant(3)], num_samples=8, num_held_out=0))
        values = [row[0] for row in rows(data.batches)]
        assert [values.count(value) for value in (1, 2, 3)] == [3, 1, 4]

    def test_error_of_a_part(self, tokenizer: PreTrainedTokenizerFast) -> None:
        config = CalibrationConfig([self.constant(1), CalibrationConfig([""])], **SMALL)
        with pytest.raises(CalibrationError, match="'in-memory texts' gives 0 tokens"):
            load_calibration_data(config, tokenizer)


def test_warn_if_few_tokens() -> None:
    with pytest.warns(UserWarning, match="99 calibration tokens for a Gram matrix of dimension 100"):
        warn_if_few_tokens(99, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few_tokens(100, 100)
