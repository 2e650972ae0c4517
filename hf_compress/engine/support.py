"""Which family can be compressed by which method: asked of the methods themselves, on models without weights."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from ..anatomy import (
    ModelAnatomy,
    find_record,
    known_model_types,
    resolve_anatomy,
    unreached_shares,
    untouched_matrices,
)
from ..configuration import method_config_from_dict
from ..errors import CompressionError, ConfigurationError
from .registry import create_method

# What is asked of each method, the first two of modular decomposition: so little that no budget is out of reach.
# Of several, the second and third are for families of which one part alone can be compressed.
RECIPES: dict[str, list[dict[str, Any]]] = {
    "MLPs": [{"method": "modular_decomposition", "reduction": 0.01, "kinds": ["mlp"]}],
    "attention": [
        {"method": "modular_decomposition", "reduction": 0.01, "kinds": kinds}
        for kinds in (["query_key", "value_output"], ["value_output"], ["query_key"])
    ],
    "codebooks": [{"method": "codebook", "bits": 3}],
    "pruning": [{"method": "pruning", "sparsity": 0.5}],
    "heads, columns": [{"method": "pruning", "sparsity": 0.1, "structured": True}],
    "sharing": [{"method": "sharing", "unique_layers": 1}],
}


@dataclass(frozen=True)
class Support:
    """Whether a method works on a family.

    Args:
        works: on all it is for, on a part of it, or not at all.
        reason: of the method's own, where it does not work on all.
    """

    works: Literal["yes", "partly", "no"]
    reason: str = ""


@dataclass(frozen=True)
class Family:
    """A model type and what can be done with it.

    Args:
        model_type: `config.model_type`; of a multimodal model that of its language part.
        architecture: the class that was looked at, in the sizes of its config's defaults.
        methods: by the names in `RECIPES`.
        left_dense: shares of the weights that no method reaches, by what they are.
    """

    model_type: str
    architecture: str
    methods: dict[str, Support]
    left_dense: dict[str, float]


def families(model_types: Iterable[str] = ()) -> list[Family]:
    """What every method can do on every family with a record, or on some of them.

    Raises:
        ConfigurationError: a model type without a record.
    """
    known, wanted = known_model_types(), list(model_types)
    strange = [name for name in wanted if name not in known]
    if strange:
        raise ConfigurationError(
            f"no anatomy record describes model type {strange[0]!r}. Known: {', '.join(known)}. "
            "hf_compress/anatomy/README.md shows how one is added."
        )
    with _quiet():
        return [_family(name) for name in wanted or known]


def _family(model_type: str) -> Family:
    try:
        model = _skeleton(model_type)
        anatomy = resolve_anatomy(model)
    except (CompressionError, AttributeError, KeyError, ValueError, ImportError) as error:
        # A class that is not in Transformers, or a record that does not fit it.
        reason = f"no model to look at: {str(error).splitlines()[0]}"
        return Family(model_type, "", {name: Support("no", reason) for name in RECIPES}, {})
    name = type(model).__name__
    methods = {key: _support(recipe, anatomy, name) for key, recipe in RECIPES.items()}
    return Family(model_type, name, methods, unreached_shares(anatomy))


def _skeleton(model_type: str) -> PreTrainedModel:
    record, config = find_record(model_type), AutoConfig.for_model(model_type)
    autos = [AutoModelForCausalLM, AutoModel] if record is not None and record.decoder else [AutoModel]
    auto: Any = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    with torch.device("meta"):
        if auto is None:  # a part that has no automatic class
            return getattr(transformers, type(config).__name__.replace("Config", "Model"))(config)
        model: PreTrainedModel = auto.from_config(config)
    return model


def _support(recipes: list[dict[str, Any]], anatomy: ModelAnatomy, name: str) -> Support:
    refusals: list[str] = []
    for recipe in recipes:
        try:
            method = create_method(method_config_from_dict(recipe), anatomy)
        except CompressionError as error:
            text = str(error).replace(name, "the model").split(". ")[0].removesuffix(".")
            refusals.append(re.sub(r"the record of '[^']*'( \(the model\))?", "its record", text))
            continue
        reasons = [*refusals, *getattr(getattr(method, "geometry", method), "left_alone", ())]
        if "kinds" in recipe:  # others are left alone because nobody asked for them
            reasons = [reason for reason in reasons if reason in refusals or reason.startswith(tuple(recipe["kinds"]))]
        if anatomy.record.experts is not None and not method.reaches_experts:
            reasons.append("experts stay dense")
        if not method.reaches_left_dense:
            reasons += untouched_matrices(anatomy, sum(parameter.numel() for parameter in anatomy.model.parameters()))
        return Support("partly", reasons[0]) if reasons else Support("yes")
    return Support("no", refusals[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Configs of defaults warn about tokens that they do not have."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
