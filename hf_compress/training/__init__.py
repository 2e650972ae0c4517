"""What runs inside a training: callbacks, distillation, recovery."""

from .configuration import DistillationConfig
from .distillation import DistillationTrainer
from .pruner import Pruner
from .pruning import PruningCallback
from .recovery import recover
from .steps import RandomStepCallback

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "Pruner",
    "PruningCallback",
    "RandomStepCallback",
    "recover",
]
