"""The compression methods. Importing this package registers them."""

from . import codebook, modular

__all__ = ["codebook", "modular"]
