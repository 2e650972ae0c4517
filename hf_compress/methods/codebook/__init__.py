"""Learned codebooks (after JLCM)."""

from .configuration import CodebookConfig
from .method import LearnedCodebooks
from .modules import CodebookLinear

__all__ = ["CodebookConfig", "CodebookLinear", "LearnedCodebooks"]
