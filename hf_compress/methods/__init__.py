"""The compression methods. Importing this package registers them."""

from . import codebook, modular, pruning, sharing

__all__ = ["codebook", "modular", "pruning", "sharing"]
