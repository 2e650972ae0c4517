"""Embedding similarity: does the cosine of two sentences' embeddings rank pairs as people did?"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigurationError, NumericalError, UnsupportedModelError
from .examples import read_records, spread
from .forward import evaluation_mode, input_device
from .measurement import Score

Pooling = Literal["mean", "first", "last", "pooler"]


@dataclass(frozen=True)
class SentenceSimilarity:
    """Spearman's rank correlation between cosines of embeddings and scores of people, as STS-B is reported.

    Args:
        pairs: two sentences each.
        scores: how alike they are, in any unit.
        pooling: what the embedding is: the mean over the tokens, the first token, the last one, or the model's own
            pooler.
        batch_size: sentences a forward pass.
    """

    pairs: Sequence[tuple[str, str]]
    scores: Sequence[float]
    pooling: Pooling = "mean"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if len(self.pairs) != len(self.scores) or len(self.pairs) < 2 or self.batch_size < 1:
            raise ConfigurationError(
                f"similarity needs at least two pairs, a score for each and batch_size >= 1; got {len(self.pairs)} "
                f"pairs, {len(self.scores)} scores, batch_size={self.batch_size}."
            )
        if self.pooling not in get_args(Pooling):
            raise ConfigurationError(f"unknown pooling {self.pooling!r}; known: {', '.join(get_args(Pooling))}.")

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, pooling: Pooling = "mean", limit: int | None = None, batch_size: int = 32
    ) -> SentenceSimilarity:
        """Pairs from a `.csv`, `.tsv` or `.jsonl` file with `sentence1`, `sentence2` and `score`.

        The line of names may be missing from a table of these three columns.
        """
        records = spread(read_records(path, ("sentence1", "sentence2", "score")), limit)
        try:
            scores = [float(record["score"]) for record in records]
        except ValueError as error:
            raise ConfigurationError(f"{str(path)!r}: a score is no number ({error}).") from error
        return cls([(str(r["sentence1"]), str(r["sentence2"])) for r in records], scores, pooling, batch_size)

    def __call__(self, model: PreTrainedModel, processing_class: Any) -> list[Score]:
        if processing_class is None:
            raise ConfigurationError("similarity needs `processing_class=` (the model's tokenizer).")
        sentences = list(dict.fromkeys(sentence for pair in self.pairs for sentence in pair))
        # Sentences of about one length go together, so that little is padded.
        sentences.sort(key=len)
        with evaluation_mode(model), torch.no_grad():
            embeddings = torch.cat(
                [
                    embed(model, processing_class, sentences[index : index + self.batch_size], self.pooling)
                    for index in range(0, len(sentences), self.batch_size)
                ]
            )
        place = {sentence: index for index, sentence in enumerate(sentences)}
        first, second = (embeddings[[place[pair[side]] for pair in self.pairs]] for side in (0, 1))
        correlation = spearman(F.cosine_similarity(first, second), torch.tensor(self.scores, dtype=torch.float64))
        if math.isnan(correlation):
            raise NumericalError("the rank correlation is NaN: all cosines are equal, all scores are, or one is NaN.")
        return [Score("STS Spearman", correlation, len(self.pairs), note=f"{self.pooling} pooling")]


def embed(
    model: PreTrainedModel, processing_class: Any, sentences: list[str], pooling: Pooling
) -> Float[Tensor, "sentences width"]:
    """Embeddings in float64 on the CPU, not normalised."""
    limit = getattr(processing_class, "model_max_length", None)
    # A tokenizer that does not know says so with a huge number; then the positions count.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [length for length in (limit, positions) if length is not None and length < 2**20]
    encoded = [
        processing_class(sentence, truncation=bool(lengths), max_length=min(lengths, default=None))["input_ids"]
        for sentence in sentences
    ]
    # Padded by hand: a decoder's tokenizer may have no padding token, and the mask makes its choice irrelevant.
    padding = getattr(processing_class, "pad_token_id", None) or 0
    width = max(len(ids) for ids in encoded)
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in encoded])
    device = input_device(model)
    output = model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device))
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no pooler; use pooling='mean' or 'first'.")
        return pooled.cpu().double()  # type: ignore[no-any-return]
    return pool(output.last_hidden_state.cpu().double(), mask, pooling)


def pool(
    states: Float[Tensor, "sentences tokens width"], mask: Int[Tensor, "sentences tokens"], pooling: Pooling
) -> Float[Tensor, "sentences width"]:
    """One vector a sentence; sentences are padded on the right."""
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states)), mask.sum(dim=1) - 1]
    weights = mask[..., None].to(states)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def spearman(a: Float[Tensor, "items"], b: Float[Tensor, "items"]) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    if bool(a.isnan().any() or b.isnan().any()):
        return math.nan
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Float[Tensor, "items"]) -> Float[Tensor, "items"]:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[inverse]
    return ranks
