"""The Hub: cards, and pushing a compressed model so that anybody can load it."""

from .publish import Options, folder_card, prepare_folder
from .push import UploadError, push_folder

__all__ = ["Options", "UploadError", "folder_card", "prepare_folder", "push_folder"]
