"""Model families as data."""

from .model import (
    MATRICES,
    ModelAnatomy,
    dense_rows,
    join,
    read_attribute,
    require_decoder,
    resolve_anatomy,
    text_config,
    weight_count,
)
from .records import Anatomy, AttentionAnatomy, MlpAnatomy, find_record, known_model_types, register_anatomy

__all__ = [
    "MATRICES",
    "Anatomy",
    "AttentionAnatomy",
    "MlpAnatomy",
    "ModelAnatomy",
    "dense_rows",
    "find_record",
    "join",
    "known_model_types",
    "read_attribute",
    "register_anatomy",
    "require_decoder",
    "resolve_anatomy",
    "text_config",
    "weight_count",
]
