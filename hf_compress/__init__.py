"""Compress Transformers models with one argument; load the result with a plain `from_pretrained`.

Importing the package teaches Transformers the quantization method `"hf_compress"` and the keyword
`compression_config` of `from_pretrained`.
"""

from . import integration, quantizer
from .anatomy import Anatomy, AttentionAnatomy, MlpAnatomy, register_anatomy
from .calibration.configuration import CalibrationConfig
from .configuration import CompressionConfig
from .engine.compress import compress
from .engine.plan import CompressionPlan, plan
from .engine.report import CompressionReport
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
from .training import Pruner, PruningCallback

quantizer.register()
integration.install()

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "AttentionAnatomy",
    "CalibrationConfig",
    "CalibrationError",
    "CheckpointError",
    "CodebookConfig",
    "CompressionConfig",
    "CompressionError",
    "CompressionPlan",
    "CompressionReport",
    "ConfigurationError",
    "LayerSharingConfig",
    "MlpAnatomy",
    "ModularDecompositionConfig",
    "NumericalError",
    "Pruner",
    "PruningCallback",
    "PruningConfig",
    "ResumeError",
    "UnsupportedModelError",
    "compress",
    "plan",
    "register_anatomy",
    "set_iterations",
]
