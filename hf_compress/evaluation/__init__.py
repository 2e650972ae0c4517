"""Perplexity, size and speed, reported beside the dense model."""

from .compare import Comparison, Measurement, compare, measure
from .perplexity import PerplexityResult, perplexity
from .size import SizeOnDisk, count_parameters, size_on_disk
from .speed import SpeedResult, measure_speed

__all__ = [
    "Comparison",
    "Measurement",
    "PerplexityResult",
    "SizeOnDisk",
    "SpeedResult",
    "compare",
    "count_parameters",
    "measure",
    "measure_speed",
    "perplexity",
    "size_on_disk",
]
