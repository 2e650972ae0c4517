"""What a `CalibrationConfig` takes and refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from calibration_helpers import collate_numbers

from hf_compress.calibration import sources
from hf_compress.calibration.configuration import CalibrationConfig
from hf_compress.errors import ConfigurationError


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
