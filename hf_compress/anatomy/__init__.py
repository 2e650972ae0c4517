"""Model families as data."""

from .model import ModelAnatomy, join, read_attribute, require_decoder, resolve_anatomy, text_config
from .records import Anatomy, AttentionAnatomy, MlpAnatomy, find_record, known_model_types, register_anatomy

__all__ = [
    "Anatomy",
    "AttentionAnatomy",
    "MlpAnatomy",
    "ModelAnatomy",
    "find_record",
    "join",
    "known_model_types",
    "read_attribute",
    "register_anatomy",
    "require_decoder",
    "resolve_anatomy",
    "text_config",
]
