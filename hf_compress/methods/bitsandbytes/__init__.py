"""bitsandbytes as a stage."""

from .configuration import BitsAndBytesStage
from .method import BitsAndBytes

__all__ = ["BitsAndBytes", "BitsAndBytesStage"]
