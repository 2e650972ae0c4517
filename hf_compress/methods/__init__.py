"""The compression methods. Importing this package registers them."""

from . import modular

__all__ = ["modular"]
