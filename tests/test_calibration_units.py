"""Token ids, collated examples and mixtures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from calibration_helpers import SMALL, TEXTS, collate_numbers, rows, same, write
from transformers import BatchEncoding, PreTrainedTokenizerFast

from hf_compress.calibration import units
from hf_compress.calibration.configuration import CalibrationConfig
from hf_compress.calibration.data import load_calibration_data, warn_if_few_tokens
from hf_compress.errors import CalibrationError


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
