"""The compression methods. Importing this package registers them."""

from . import bitsandbytes, codebook, modular, pruning, sharing

__all__ = ["bitsandbytes", "codebook", "modular", "pruning", "sharing"]
