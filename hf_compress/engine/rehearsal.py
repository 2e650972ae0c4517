"""How long a compression will take: two blocks of random weights go through it, and the rest is multiplied."""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy import ModelAnatomy, resolve_anatomy, text_config
from ..calibration.configuration import CalibrationConfig
from ..calibration.data import load_calibration_data
from ..configuration import CompressionConfig, MethodConfig
from ..seeds import seeded
from .memory import Workload
from .registry import create_method, method_class
from .resume import ResumePoint
from .session import Session
from .walk import walk

BLOCKS = 2
SEQUENCE = 512
# Tokens of the two runs between which a line is drawn: the first warms up, the second is long enough to time.
FEW, MANY = 256, 2048
# Surveys look at no more tokens than this, and judge on no more held-out ones than that.
SURVEYED, HELD_OUT = 8192, 4096


@dataclass
class _TimedSession(Session):
    """Notes when the work on every block began and ended, and the time in all other loops over blocks."""

    marks: list[float] = field(default_factory=list)
    looped: float = 0.0

    def progress(self, items: range, description: str, *, together: bool = False) -> Iterator[int]:
        began = time.perf_counter()
        for item in super().progress(items, description, together=together):
            if description == "compress":
                self.marks.append(time.perf_counter())
            yield item
        ended = time.perf_counter()
        if description == "compress":
            self.marks.append(ended)
        else:
            self.looped += ended - began


@dataclass(frozen=True)
class _Times:
    """Seconds of the survey of two blocks and of the loops in it, of what lies outside them, and of each."""

    survey: float
    looped: float
    outside: float
    blocks: tuple[float, ...]


def rehearse(dense: PreTrainedModel, recipe: CompressionConfig, workload: Workload) -> float | None:
    """Seconds that the stages of a recipe will take on this machine, or `None` where two blocks say nothing about
    the whole: blocks of several sizes, or data that are no texts.

    Args:
        dense: the model on the meta device.
    """
    anatomy = resolve_anatomy(dense)
    depth = len(anatomy)
    pair = _two_blocks(dense, anatomy)
    if pair is None:
        return None
    total = 0.0
    for stage in recipe.stages:
        stage = _shortened(stage, depth)
        method = create_method(stage, resolve_anatomy(pair))
        reads_tokens = method.needs_calibration
        if reads_tokens and not anatomy.record.decoder:
            return None
        few, many = (_run(copy.deepcopy(pair), stage, workload, tokens) for tokens in (FEW, MANY))
        # Without data the two differ by chance alone.
        tokens = workload.tokens if reads_tokens else FEW
        # The second block of the first run is the first that nothing has to be warmed up for.
        total += depth * _at(tokens, few.blocks[1], many.blocks[0])
        surveyed = tokens if method.survey_reads_all else min(tokens, SURVEYED)
        if many.looped:
            # What is outside its loops over blocks, such as the head, does not grow with the depth.
            total += depth / BLOCKS * _at(surveyed, few.looped, many.looped) + many.survey - many.looped
        else:
            total += depth / BLOCKS * _at(tokens, few.survey, many.survey)
        total += many.outside
        total += 60 * getattr(stage, "search_minutes", 0.0) * (getattr(stage, "allocation", "") == "search")
        # The next stage works on what this one leaves, which is no larger.
    return total


def _at(tokens: int, few: float, many: float) -> float:
    """Seconds for a number of tokens, on the line through two measurements."""
    slope = max(many - few, 0.0) / (MANY - FEW)
    return max(few + slope * (tokens - FEW), 0.0)


def _two_blocks(dense: PreTrainedModel, anatomy: ModelAnatomy) -> PreTrainedModel | None:
    """The model with two blocks and random weights; `None` where its blocks are not alike or not in one list."""
    config = copy.deepcopy(dense.config)
    inner = text_config(dense)
    if anatomy.record.repeated or not hasattr(inner, "num_hidden_layers") or inner is not dense.config:
        return None
    if len({path.rpartition(".")[0] for path in anatomy.block_paths}) != 1:
        return None
    shapes = [{name: t.shape for name, t in anatomy.block(i).state_dict().items()} for i in range(len(anatomy))]
    if any(own != shapes[0] for own in shapes):
        return None
    count = min(BLOCKS, len(anatomy))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    config.num_hidden_layers = count
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind: Any = type(dense)
        model: PreTrainedModel = kind(config)
        for module in model.modules():
            # Biases and norms as initialised; matrices of zeros or ones would be too easy.
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.to(dense.dtype).eval()


def _shortened(stage: MethodConfig, depth: int) -> MethodConfig:
    """The recipe for two blocks in place of all."""
    changes: dict[str, Any] = {"modules_to_not_convert": ()}
    unique = getattr(stage, "unique_layers", None)
    if unique is not None:
        changes |= {"unique_layers": 1 if unique < depth else BLOCKS, "inference_iterations": None, "steps": None}
        changes["group_sizes"] = None
    if getattr(stage, "allocation", "") == "search":
        changes["allocation"] = "block_influence"
    return stage.model_copy(update=changes)


def _run(model: Any, stage: MethodConfig, workload: Workload, tokens: int) -> _Times:
    anatomy = resolve_anatomy(model)
    method_class(stage).reopen(model, stage)
    method = create_method(stage, anatomy)
    batches: list[Any] = []
    held_out: list[Any] = []
    if method.needs_calibration:
        data = load_calibration_data(_random_tokens(model, workload, tokens))
        batches, held_out = data.batches, data.held_out
    session = _TimedSession(anatomy, batches, held_out)
    with torch.no_grad(), seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few tokens, and of random weights
        began = time.perf_counter()
        method.survey(session)
        surveyed = time.perf_counter()
        walk(session, method, ResumePoint(None, {}))
    marks = session.marks
    blocks = tuple(after - before for before, after in itertools.pairwise(marks))
    outside = marks[0] - surveyed
    return _Times(surveyed - began, session.looped, outside, blocks if len(blocks) > 1 else blocks * 2)


def _random_tokens(model: PreTrainedModel, workload: Workload, tokens: int) -> CalibrationConfig:
    positions = getattr(text_config(model), "max_position_embeddings", None) or SEQUENCE
    length = min(SEQUENCE, workload.sequence_length, tokens, positions)
    held_out = min(workload.num_held_out, -(-HELD_OUT // length))
    vocabulary = int(text_config(model).vocab_size)
    generator = torch.Generator().manual_seed(0)
    count = -(-tokens // length)
    ids = torch.randint(vocabulary, (count + held_out, length), generator=generator)
    size = max(min(workload.batch_tokens // length, count), 1)
    return CalibrationConfig(ids, num_samples=count, num_held_out=held_out, batch_size=size)
