"""Modular decomposition: smaller MLPs and attention heads in closed form."""

from .configuration import ModularDecompositionConfig
from .method import ModularDecomposition
from .modules import DecomposedAttention

__all__ = ["DecomposedAttention", "ModularDecomposition", "ModularDecompositionConfig"]
