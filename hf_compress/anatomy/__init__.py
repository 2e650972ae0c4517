"""Model families as data."""

from . import decoders, encoders  # noqa: F401 - they register the records
from .behaviour import check_record
from .experts import Experts
from .model import (
    MATRICES,
    ModelAnatomy,
    dense_rows,
    join,
    read_attribute,
    require_parts,
    resolve_anatomy,
    text_config,
    weight_count,
)
from .records import (
    Anatomy,
    AttentionAnatomy,
    ExpertsAnatomy,
    MlpAnatomy,
    find_record,
    known_model_types,
    register_anatomy,
)
from .shares import unreached, unreached_shares, untouched_experts, untouched_matrices

__all__ = [
    "MATRICES",
    "Anatomy",
    "AttentionAnatomy",
    "Experts",
    "ExpertsAnatomy",
    "MlpAnatomy",
    "ModelAnatomy",
    "check_record",
    "dense_rows",
    "find_record",
    "join",
    "known_model_types",
    "read_attribute",
    "register_anatomy",
    "require_parts",
    "resolve_anatomy",
    "text_config",
    "unreached",
    "unreached_shares",
    "untouched_experts",
    "untouched_matrices",
    "weight_count",
]
