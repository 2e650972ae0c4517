"""Texts, a tokenizer and small helpers that the tests of the calibration data share."""

from __future__ import annotations

import argparse
import ast
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:  # imported before conftest has set the hook that checks the shapes
    from hf_compress.calibration.data import CalibrationData

TEXTS = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (textwrap, ast, argparse)]
SMALL: dict[str, Any] = {"num_samples": 6, "num_held_out": 3, "sequence_length": 32, "batch_size": 4}
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
CONVERSATION = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Scattering."}]


def make_tokenizer() -> PreTrainedTokenizerFast:
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
