"""What to calibrate on. An input of a run: it is never written to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ..errors import ConfigurationError
from ..strict import StrictModel

if TYPE_CHECKING:
    from typing_extensions import Self

DatasetKind = Literal["source", "texts", "images", "tokens", "rows", "examples", "mixture"]

EXAMPLE_LINE = 'calibration=CalibrationConfig("Salesforce/wikitext", name="wikitext-2-raw-v1")'

# Fields that would have no effect for a kind of data are refused, so that no setting is ignored in silence.
_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "source": ("weights",),
    "texts": ("weights", "name", "revision", "text_column"),
    "images": ("weights", "name", "revision", "text_column"),
    "tokens": ("weights", "name", "revision", "text_column"),
    "rows": ("weights", "name", "revision"),
    "examples": ("weights", "name", "revision", "text_column"),
    "mixture": ("name", "revision", "text_column", "data_collator"),
}


class CalibrationConfig(StrictModel):
    """
    The data that a compression method measures the model on.

    Args:
        dataset (`str`, `Path`, `datasets.Dataset`, `datasets.IterableDataset`, `list[str]`, `list[PIL.Image.Image]`,
            `torch.Tensor`, `list[torch.Tensor]` or `list[CalibrationConfig]`):
            One of: the id of a dataset on the Hub; a local `.txt`, `.jsonl`, `.json`, `.parquet` or `.csv` file, or a
            folder of files of one of these kinds; a folder of images, with or without folders in it; a dataset in
            memory (with a `data_collator`, any iterable of examples); a list of texts; a list of images; token ids as
            an integer tensor of shape `(num_sequences, sequence_length)` or as a list of integer tensors of shape
            `(length,)`; a list of configurations, which are mixed.
            A path that exists wins over a Hub id of the same spelling.
        weights (`list[float]`, *optional*):
            The share of each part of a mixture, in any unit. Equal shares if not given.
        name (`str`, *optional*):
            The configuration ("subset") of a Hub dataset.
        split (`str`, defaults to `"train"`):
            The split of a Hub dataset.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub dataset.
        text_column (`str` or `list[str]`, *optional*):
            The column that holds the texts, or conversations for the chat template. If not given: `"text"`, else
            `"messages"`, else the only column of strings. Texts of one column are packed. With a list of columns, such
            as `["sentence1", "sentence2"]`, each text of each of them is a sequence of its own with the tokenizer's
            special tokens, as a sentence encoder reads it; a text that comes twice is taken once.
        data_collator (`Callable`, *optional*):
            Turns a list of examples into a dictionary of tensors for `model(**batch)`. Examples are then neither
            tokenised nor packed, and no `processing_class` is needed.
        num_samples (`int`, defaults to 128):
            How many sequences (or examples) to calibrate on; fewer are used where there are fewer.
        sequence_length (`int`, defaults to 2048):
            Tokens in a sequence cut from texts, at most if each is a sequence of its own. Does not apply to images,
            token ids and collated examples.
        num_held_out (`int`, defaults to 8):
            Sequences (or examples) kept apart for choices such as temperatures; never calibrated on.
        seed (`int`, defaults to 0):
            Chooses the sequences, and seeds what a `data_collator` draws from torch.
        batch_size (`int`, defaults to 8):
            Sequences (or examples) in a batch.
        streaming (`bool`, defaults to `False`):
            Read a Hub dataset or a local file row by row from its start, without a copy in the cache.

    Images are read where the `processing_class` is an image processor, from the one column of type `datasets.Image` of
    a dataset with columns; one of texts and images reads the images of data without a column of texts.

    A mixture decides `num_samples`, `num_held_out`, `sequence_length`, `batch_size` and `seed` for all its parts.

    Raises:
        `ConfigurationError`: for a missing dataset, an unknown field or a value out of range.
    """

    dataset: Any
    weights: tuple[float, ...] | None = None
    name: str | None = None
    split: str = Field(default="train", min_length=1)
    revision: str | None = None
    text_column: str | tuple[str, ...] | None = None
    data_collator: Callable[..., Any] | None = Field(default=None, repr=False)
    num_samples: int = Field(default=128, ge=1, strict=True)
    sequence_length: int = Field(default=2048, ge=2, strict=True)
    num_held_out: int = Field(default=8, ge=0, strict=True)
    seed: int = Field(default=0, ge=0, strict=True)
    batch_size: int = Field(default=8, ge=1, strict=True)
    streaming: bool = False

    def __init__(self, /, dataset: Any = None, **data: Any) -> None:
        if dataset is None:
            raise ConfigurationError(
                f"CalibrationConfig: `dataset` is missing; say what to calibrate on, such as {EXAMPLE_LINE}."
            )
        super().__init__(dataset=dataset, **data)

    @property
    def kind(self) -> DatasetKind:
        """What `dataset` is; raises `ValueError` for anything that cannot be calibrated on."""
        return _kind_of(self.dataset, collated=self.data_collator is not None)

    # The checks run on the whole model: errors on a field would print its value, here all the data.
    @model_validator(mode="after")
    def _check_dataset(self) -> Self:
        kind = self.kind
        for field in _WITHOUT_EFFECT[kind]:
            if getattr(self, field) is not None:
                hint = "; set it on the parts" if kind == "mixture" else ""
                raise ValueError(f"`{field}` has no effect when `dataset` is {_describe(self.dataset)}{hint}.")
        if self.text_column == ():
            raise ValueError("`text_column` is an empty list; name a column.")
        if self.data_collator is not None and self.text_column is not None:
            raise ValueError("`text_column` has no effect beside `data_collator`, which sees whole examples.")
        return self

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        if self.kind != "mixture":
            return self
        for part in self.dataset:
            if "sequence_length" in part.model_fields_set and part.sequence_length != self.sequence_length:
                raise ValueError(
                    f"a part has sequence_length={part.sequence_length}, the mixture {self.sequence_length}; "
                    "set `sequence_length` on the mixture alone."
                )
        if self.weights is None:
            return self
        if len(self.weights) != len(self.dataset):
            raise ValueError(
                f"`weights` has {len(self.weights)} entries for {len(self.dataset)} parts; give one each."
            )
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"`weights` must be positive and finite, got {list(self.weights)}.")
        return self

    # AutoModel deep-copies its keyword arguments; a frozen config needs no copy, and its data must not be doubled.
    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A validated copy with some fields changed; the data are shared with the original."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**fields, **(update or {})})

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            # Data in memory would fill the screen.
            yield name, _describe(value) if name == "dataset" and self.kind != "source" else value


def _is_instance(value: Any, library: str, *names: str) -> bool:
    """`isinstance` without an import: an object of a library's types exists only where the library is imported."""
    module = sys.modules.get(library)
    return any(isinstance(value, getattr(module, name)) for name in names if hasattr(module, name))


def is_image(value: Any) -> bool:
    """Whether a value is an image of PIL."""
    return _is_instance(value, "PIL.Image", "Image")


def _kind_of(dataset: Any, *, collated: bool) -> DatasetKind:
    if isinstance(dataset, (str, Path)):
        if not str(dataset).strip():
            raise ValueError("`dataset` is an empty string; expected a Hub dataset id or a path.")
        return "source"
    if _is_instance(dataset, "datasets", "Dataset", "IterableDataset"):
        return "rows"
    if isinstance(dataset, Mapping):
        raise ValueError(f"`dataset` is {_describe(dataset)}; pass one of its splits, such as data['train'].")
    is_list = isinstance(dataset, (list, tuple))
    if is_list and dataset and all(isinstance(item, CalibrationConfig) for item in dataset):
        return "mixture"
    if collated:
        if isinstance(dataset, Iterable) or hasattr(dataset, "__getitem__"):
            return "examples"
    elif is_list:
        if all(isinstance(item, str) for item in dataset):
            return "texts"
        if all(is_image(item) for item in dataset):
            return "images"
        if all(_is_token_ids(item, dimensions=1) for item in dataset):
            return "tokens"
    elif _is_token_ids(dataset, dimensions=2):
        return "tokens"
    raise ValueError(
        f"`dataset` is {_describe(dataset)}; expected a Hub dataset id, a path, a datasets.Dataset or "
        "IterableDataset, a list of texts or of PIL images, integer token ids (a 2-D tensor or a list of 1-D "
        "tensors), a list of CalibrationConfig, or any iterable of examples together with `data_collator`."
    )


def _is_token_ids(value: Any, *, dimensions: int) -> bool:
    if not _is_instance(value, "torch", "Tensor"):
        return False
    is_integer = not (value.is_floating_point() or value.is_complex() or str(value.dtype) == "torch.bool")
    return is_integer and value.ndim == dimensions


def _describe(value: Any) -> str:
    """What a value is, in a few words and without its contents."""
    if _is_instance(value, "torch", "Tensor"):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {len(value)} items ({', '.join(kinds) or 'empty'})"
    return f"a {type(value).__name__}"
