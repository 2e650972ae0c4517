"""What runs inside a training: the Trainer's callbacks and what they stand on."""

from .pruner import Pruner
from .pruning import PruningCallback

__all__ = ["Pruner", "PruningCallback"]
