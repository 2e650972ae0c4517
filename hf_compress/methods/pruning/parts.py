"""Which matrices of a model are pruned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...anatomy import ModelAnatomy
from ...engine.exclusion import is_excluded
from ...errors import ConfigurationError
from .configuration import PruningConfig

PRUNABLE = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Part:
    """One matrix that is pruned.

    Args:
        path: module path.
        kind: "mlp", "query_key", "value_output" or "other".
        block: index of its block.
    """

    path: str
    kind: str
    block: int


def prunable_parts(config: PruningConfig, anatomy: ModelAnatomy) -> tuple[list[Part], list[str]]:
    """The linear layers of all blocks, and why others are left alone. Embeddings, norms, biases and heads stay dense.

    Raises:
        ConfigurationError: there is none.
    """
    parts, alone = [], []
    for block in range(len(anatomy)):
        for path, kind in anatomy.block_matrices(block):
            module = anatomy.model.get_submodule(path)
            if not isinstance(module, PRUNABLE):
                alone.append(f"{path}: a {type(module).__name__} has no sparse form")
            elif is_excluded(path, config.modules_to_not_convert):
                alone.append(f"{path}: excluded")
            else:
                parts.append(Part(path, kind, block))
    if not parts:
        found = f" ({alone[0]})" if alone else ""
        raise ConfigurationError(
            f"{type(anatomy.model).__name__} has no matrix that could be pruned{found}: expected linear layers in its "
            "blocks."
        )
    return parts, alone
