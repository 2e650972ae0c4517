"""The package's own exceptions. Each message says what was found, what was expected and what to do."""


class CompressionError(Exception):
    """Base class of every error that hf_compress raises on purpose."""


class ConfigurationError(CompressionError, ValueError):
    """A recipe or an argument that cannot be carried out."""


class CalibrationError(CompressionError, ValueError):
    """Calibration data that is missing, unreadable or unfit for the model."""


class UnsupportedModelError(CompressionError, ValueError):
    """A model whose structure no anatomy record describes, or that a method cannot treat."""


class CheckpointError(CompressionError, ValueError):
    """A compressed checkpoint whose layout is missing, damaged, too new or does not fit its model."""


class NumericalError(CompressionError, ArithmeticError):
    """Non-finite values or a factorisation that failed with every documented fallback; names the module."""


class ResumeError(CompressionError, ValueError):
    """A working directory that belongs to another run."""
