"""LAMBADA: does the model know the last word of a passage that takes the whole passage to know?"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigurationError, NumericalError
from .examples import read_records, spread
from .forward import accepts_logits_to_keep, check_length, evaluation_mode, input_device
from .measurement import Score, accuracy_score


@dataclass(frozen=True)
class Lambada:
    """Accuracy and perplexity of the last word of passages (D. Paperno et al., arXiv 1606.06031).

    The word counts as known where each of its tokens is the model's first choice, the passage before it given. The
    perplexity is a word's: e to the mean of the words' negative log-likelihoods, as lm-evaluation-harness has it.

    Args:
        passages: texts of at least two words.
        batch_size: passages a forward pass.
    """

    passages: Sequence[str]
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.passages or self.batch_size < 1:
            raise ConfigurationError("LAMBADA needs at least one passage and a batch_size of at least one.")
        for number, passage in enumerate(self.passages, 1):
            if len(passage.split(maxsplit=1)) < 2:
                raise ConfigurationError(f"passage {number} has no last word to ask for: {passage[:60]!r}.")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, limit: int | None = None, batch_size: int = 8) -> Lambada:
        """Passages from a `.jsonl` file with the field `text`, or from a text file with one passage a line."""
        records = read_records(path, ("text",))
        return cls([str(record["text"]) for record in spread(records, limit)], batch_size)

    def __call__(self, model: PreTrainedModel, processing_class: Any) -> list[Score]:
        if processing_class is None:
            raise ConfigurationError("LAMBADA needs `processing_class=` (the model's tokenizer).")
        # Passages of about one length go together, so that little is padded.
        cut = sorted((cut_last_word(passage, processing_class) for passage in self.passages), key=lambda c: len(c[0]))
        check_length(model, len(cut[-1][0]), "the longest passage of LAMBADA")
        hits, loss = 0, 0.0
        with evaluation_mode(model), torch.no_grad():
            for index in range(0, len(cut), self.batch_size):
                some_hits, some_loss = _score(model, cut[index : index + self.batch_size])
                hits, loss = hits + some_hits, loss + some_loss
        if math.isnan(loss):
            raise NumericalError("the loss on LAMBADA is NaN: the model's logits are not finite; try float32.")
        count = len(cut)
        mean = loss / count
        word_perplexity = math.exp(mean) if mean < 700 else math.inf
        return [
            accuracy_score("LAMBADA accuracy", hits, count),
            Score("LAMBADA perplexity", word_perplexity, count, higher_is_better=False),
        ]


def cut_last_word(passage: str, processing_class: Any) -> tuple[Int[Tensor, "tokens"], int]:
    """Token ids of the passage, and the index of the first token of its last word."""
    passage = passage.strip()
    context = passage[: -len(passage.split()[-1])].rstrip()
    whole = processing_class(passage, verbose=False)["input_ids"]
    before = processing_class(context, verbose=False)["input_ids"]
    # The word begins where the tokens part: some tokenizers merge across the border, some end every text with a token.
    first = next((at for at, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), len(before))
    ending = getattr(processing_class, "eos_token_id", None)
    if before[first:] == [ending] == whole[-1:]:
        whole = whole[:-1]
    return torch.tensor(whole, dtype=torch.long), min(first, len(whole) - 1)


def _score(model: PreTrainedModel, batch: list[tuple[Int[Tensor, "..."], int]]) -> tuple[int, float]:
    """Known last words, and the sum of the words' negative log-likelihoods."""
    if min(first for _, first in batch) < 1:
        raise ConfigurationError("a passage's last word is its first token: the tokenizer makes one token of it all.")
    length = max(len(ids) for ids, _ in batch)
    device = input_device(model)
    # Padded on the right, where a causal model's real tokens do not look.
    inputs = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for row, (ids, _) in enumerate(batch):
        inputs[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    keep = length - min(first for _, first in batch) + 1
    options = {"logits_to_keep": keep} if accepts_logits_to_keep(model) else {}
    logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device), use_cache=False, **options).logits
    skipped = length - logits.shape[1]
    hits, loss = 0, 0.0
    for row, (ids, first) in zip(logits, batch, strict=True):
        log_p = torch.log_softmax(row[first - 1 - skipped : len(ids) - 1 - skipped].float(), dim=-1).cpu()
        word = ids[first:]
        hits += int((log_p.argmax(dim=-1) == word).all())
        loss -= float(log_p.gather(-1, word[:, None]).double().sum())
    return hits, loss
