"""Quality, size, speed and memory, reported beside the dense model."""

from .agreement import AgreementResult, agreement
from .compare import Comparison, compare, measure
from .harness import HarnessTasks
from .images import ImageClassification
from .lambada import Lambada
from .layers import LayerLatency, measure_layers
from .measurement import Measurement, Score, Task
from .memory import MemoryResult, measure_memory
from .perplexity import PerplexityResult, perplexity
from .report import write_report
from .similarity import SentenceSimilarity
from .size import SizeOnDisk, count_parameters, size_on_disk
from .speed import SpeedResult, measure_speed

__all__ = [
    "AgreementResult",
    "Comparison",
    "HarnessTasks",
    "ImageClassification",
    "Lambada",
    "LayerLatency",
    "Measurement",
    "MemoryResult",
    "PerplexityResult",
    "Score",
    "SentenceSimilarity",
    "SizeOnDisk",
    "SpeedResult",
    "Task",
    "agreement",
    "compare",
    "count_parameters",
    "measure",
    "measure_layers",
    "measure_memory",
    "measure_speed",
    "perplexity",
    "size_on_disk",
    "write_report",
]
