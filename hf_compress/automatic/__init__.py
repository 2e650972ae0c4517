"""Automatic compression: the best recipe under a budget."""

from .budget import Budget
from .result import AutoResult, TrialRecord
from .search import auto

__all__ = ["AutoResult", "Budget", "TrialRecord", "auto"]
