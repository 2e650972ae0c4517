"""Layer sharing, and larger steps through shared blocks."""

from .configuration import LayerSharingConfig
from .method import LayerSharing
from .modules import SharedLinear
from .stepping import set_iterations

__all__ = ["LayerSharing", "LayerSharingConfig", "SharedLinear", "set_iterations"]
