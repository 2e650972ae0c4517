"""Pruning (after Kohama et al. and Chubu University): few weights, kept as positions and values."""

from .configuration import PruningConfig
from .method import Pruning
from .modules import SparseLinear

__all__ = ["Pruning", "PruningConfig", "SparseLinear"]
