"""Channels that some matrices of a block hand to another one, in an order that suits codes better.

Nothing else reads them: rows of the one side and columns of the other can change places together, and the block
computes what it did before (E. Yvinec et al., arXiv 2309.17361, who sort neurons so that a codebook serves rows that
follow each other). Sorted by the size of the columns that read them, channels of alike size share a scale; where
codebooks divide the rows that write them evenly, these need no index.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...anatomy import ModelAnatomy, dense_rows, read_attribute
from ...anatomy.checks import is_dense_class
from ..modular.heads import Heads


@dataclass(frozen=True)
class Channels:
    """Channels between matrices.

    Args:
        writers: paths of the matrices whose rows they are: up and gate, or the values.
        reader: path of the matrix whose columns they are: down, or the output projection.
        heads: parts within which they may change places: the key heads, or one.
        readers: parts of the reader's columns that read the same part: the query heads of a key head, or one.
        halves: how often a writer has them: twice if it holds up and gate.
    """

    writers: tuple[str, ...]
    reader: str
    heads: int = 1
    readers: int = 1
    halves: int = 1

    def order(self, reader: Float[Tensor, "rows columns"]) -> Int[Tensor, "heads size"]:
        """Within every part the largest columns of the reader first."""
        dtype = torch.promote_types(reader.dtype, torch.float32)
        columns: Tensor = torch.linalg.vector_norm(reader, dim=0, dtype=dtype)
        norms = columns.square().view(self.heads, self.readers, -1).sum(dim=1)
        return norms.argsort(dim=1, descending=True, stable=True)

    def rows(self, order: Int[Tensor, "heads size"]) -> Int[Tensor, " rows"]:
        """The rows of a writer in that order."""
        one = (order + order.shape[1] * torch.arange(self.heads, device=order.device)[:, None]).flatten()
        return torch.cat([one + half * len(one) for half in range(self.halves)])

    def columns(self, order: Int[Tensor, "heads size"]) -> Int[Tensor, " columns"]:
        """The columns of the reader in that order."""
        parts = torch.arange(self.heads * self.readers, device=order.device).view(self.heads, self.readers, 1)
        return (order[:, None] + order.shape[1] * parts).flatten()


def channels_of_block(anatomy: ModelAnatomy, block: int, coded: Collection[str]) -> Iterator[Channels]:
    """Those of a block whose matrices are all among the `coded`; experts keep their order."""
    get = anatomy.model.get_submodule

    def sorts(*paths: str) -> bool:
        return all(path in coded and isinstance(get(path), (nn.Linear, Conv1D)) for path in paths)

    record, paths = anatomy.mlp(block), anatomy.mlp_paths(block)
    if record is not None and sorts(*paths.values()):
        *writers, reader = paths.values()
        yield Channels(tuple(writers), reader, halves=2 if record.fused else 1)
    for which in range(anatomy.attention_count(block)):
        own, module = anatomy.attention, get(anatomy.attention_path(block, which=which))
        if own.fused or not is_dense_class(module) or any(read_attribute(module, flag) for flag in own.left_if):
            continue
        value, output = (anatomy.attention_path(block, role, which) for role in ("value", "output"))
        heads = Heads.of_block(anatomy, block, which)
        if sorts(value, output) and len(dense_rows(get(value))) == heads.num_key_value_heads * heads.head_dim:
            yield Channels((value,), output, heads.num_key_value_heads, heads.groups)
