"""Compress Transformers models with one argument; load the result with a plain `from_pretrained`.

Importing the package teaches Transformers the quantization method `"hf_compress"` and the keyword
`compression_config` of `from_pretrained`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import integration, quantizer
from .anatomy import Anatomy, AttentionAnatomy, MlpAnatomy, register_anatomy
from .calibration.configuration import CalibrationConfig
from .configuration import CompressionConfig
from .engine.compress import compress
from .engine.plan import CompressionPlan, plan
from .engine.report import CompressionReport
from .engine.streaming import compress_checkpoint
from .errors import (
    CalibrationError,
    CheckpointError,
    CompressionError,
    ConfigurationError,
    NumericalError,
    ResumeError,
    UnsupportedModelError,
)
from .methods.codebook import CodebookConfig
from .methods.modular import ModularDecompositionConfig
from .methods.pruning import PruningConfig
from .methods.sharing import LayerSharingConfig, set_iterations

if TYPE_CHECKING:
    from .automatic import AutoResult, Budget, auto
    from .engine.support import families
    from .training import (
        DistillationConfig,
        DistillationTrainer,
        Pruner,
        PruningCallback,
        RandomStepCallback,
        recover,
    )

quantizer.register()
integration.install()

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "AttentionAnatomy",
    "AutoResult",
    "Budget",
    "CalibrationConfig",
    "CalibrationError",
    "CheckpointError",
    "CodebookConfig",
    "CompressionConfig",
    "CompressionError",
    "CompressionPlan",
    "CompressionReport",
    "ConfigurationError",
    "DistillationConfig",
    "DistillationTrainer",
    "LayerSharingConfig",
    "MlpAnatomy",
    "ModularDecompositionConfig",
    "NumericalError",
    "Pruner",
    "PruningCallback",
    "PruningConfig",
    "RandomStepCallback",
    "ResumeError",
    "UnsupportedModelError",
    "auto",
    "compress",
    "compress_checkpoint",
    "families",
    "plan",
    "recover",
    "register_anatomy",
    "set_iterations",
]

# Transformers' Trainer takes a second to import; who does not train or search does without.
_LATER = {
    **dict.fromkeys(("AutoResult", "Budget", "auto"), "automatic"),
    "families": "engine.support",
    **dict.fromkeys(
        (
            "DistillationConfig",
            "DistillationTrainer",
            "Pruner",
            "PruningCallback",
            "RandomStepCallback",
            "recover",
        ),
        "training",
    ),
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
