"""The compression methods. Importing this package registers them."""

from . import codebook, modular, pruning

__all__ = ["codebook", "modular", "pruning"]
