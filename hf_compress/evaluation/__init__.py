"""Perplexity, size and speed, reported beside the dense model."""

from .compare import Comparison, Measurement, compare, measure
from .layers import LayerLatency, measure_layers
from .perplexity import PerplexityResult, perplexity
from .size import SizeOnDisk, count_parameters, size_on_disk
from .speed import SpeedResult, measure_speed

__all__ = [
    "Comparison",
    "LayerLatency",
    "Measurement",
    "PerplexityResult",
    "SizeOnDisk",
    "SpeedResult",
    "compare",
    "count_parameters",
    "measure",
    "measure_layers",
    "measure_speed",
    "perplexity",
    "size_on_disk",
]
