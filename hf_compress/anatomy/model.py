"""A record applied to a live model: the paths of its blocks and their parts, checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from .checks import check_parts
from .experts import Experts
from .records import Anatomy, AttentionAnatomy, MlpAnatomy, find_record, known_model_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What counts as a matrix of a block: its weight, flattened, is a matrix.
MATRICES = (nn.Linear, Conv1D, nn.Conv2d)


def weight_count(module: Any) -> int:
    """Weights of the dense layer that a module is or stands for."""
    count = getattr(module, "dense_weights", None)
    if count is None:
        experts = Experts.of(module)
        count = module.weight.numel() if experts is None else experts.weights
    return int(count)


def dense_rows(dense: nn.Module) -> Float[Tensor, "rows columns"]:
    """The weight of a dense layer as a matrix: a row is an output, a filter or a token."""
    weight: Tensor = dense.weight.detach()  # type: ignore[operator]
    if isinstance(dense, nn.Linear):
        return weight.flatten(end_dim=-2)  # one that several layers use has a dimension of size 1 in front
    return weight.T if isinstance(dense, Conv1D) else weight.flatten(start_dim=1)


def read_attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def join(*parts: str) -> str:
    """A module path from its parts, empty ones left out."""
    return ".".join(part for part in parts if part)


def text_config(model: nn.Module) -> Any:
    """The config of the language part: of a multimodal model the sub-config, otherwise the config itself."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def described_type(model: nn.Module) -> str:
    """The model type whose record describes a model: its own, or that of its language part."""
    config: Any = model.config
    own = str(config.model_type)
    return own if find_record(own) is not None else str(text_config(model).model_type)


@dataclass(frozen=True)
class ModelAnatomy:
    """The blocks of a model and how to find their parts.

    Args:
        model: the model.
        record: the record of its family.
        block_paths: module path of every block, in the order of execution.
        stacks: the indices of the blocks of every stack: of encoder and decoder, or of two towers; else of one.
    """

    model: PreTrainedModel
    record: Anatomy
    block_paths: tuple[str, ...]
    stacks: tuple[range, ...]

    def __len__(self) -> int:
        return len(self.block_paths)

    def block(self, index: int) -> nn.Module:
        block: nn.Module = self.model.get_submodule(self.block_paths[index])
        return block

    def mlp(self, index: int) -> MlpAnatomy | None:
        """The description of a block's MLP, of several the first that fits; `None` for a block without."""
        block, described = self.block(index), self.record.mlps
        for record in described:
            if all(_has_module(block, join(record.path, getattr(record, role))) for role in record.roles):
                return record
        # What is missing without experts is for an error to name.
        return described[0] if described and self.experts_path(index) is None else None

    @property
    def attention(self) -> AttentionAnatomy:
        assert self.record.attention is not None
        return self.record.attention

    def mlp_path(self, index: int, role: str) -> str:
        """Path of the projection with `role` "up", "gate" or "down" of a block that has an MLP."""
        return self.mlp_paths(index)[role]

    def mlp_paths(self, index: int) -> dict[str, str]:
        """Paths of the projections of a block's MLP by their roles, "down" as the last; none for a block without."""
        record, block = self.mlp(index), self.block_paths[index]
        if record is None:
            return {}
        return {role: join(block, record.path, getattr(record, role)) for role in record.roles}

    def attention_count(self, index: int) -> int:
        """How many attentions of a block the record describes: none, its own, and in some that to the encoder, which
        never runs in a decoder by itself."""
        record = self.record.attention
        if record is None:
            return 0
        crosses = record.cross_path is not None and len(self.stacks) > 1
        return 1 + (crosses and _has_module(self.block(index), str(record.cross_path)))

    def attention_path(self, index: int, role: str | None = None, which: int = 0) -> str:
        """Path of an attention module, or of its projection with `role` "query", "key", "value" or "output"; the
        second of two is that to the encoder."""
        record = self.attention
        inner = getattr(record, role) if role else ""
        if role == "output" and record.output_outside:
            return join(self.block_paths[index], inner)
        module = record.cross_path if which else record.path
        assert module is not None
        return join(self.block_paths[index], module, inner)

    def matrices_of_kind(self, index: int) -> Iterator[tuple[str, str]]:
        """Path and kind of every matrix that the record names; a fused query, key and value counts as "query_key"."""
        found: dict[str, str] = {}
        for which in range(self.attention_count(index)):
            for role in ("query", "key", "value", "output"):
                kind = "query_key" if role in ("query", "key") else "value_output"
                found.setdefault(self.attention_path(index, role, which), kind)
        found.update((path, "mlp") for path in self.mlp_paths(index).values())
        found.update(self.named_matrices(index))
        yield from found.items()

    def named_matrices(self, index: int) -> Iterator[tuple[str, str]]:
        """Path and kind of the matrices that the record's `kinds` names, without those that only other blocks have."""
        for path, kind in self.record.kinds:
            name = path.removesuffix("?")
            if name == path or _has_module(self.block(index), name):
                yield join(self.block_paths[index], name), kind

    def experts_path(self, index: int) -> str | None:
        """Path of the module that holds a block's experts; `None` for a block without."""
        record = self.record.experts
        if record is None:
            return None
        name = record.path.removesuffix("?")
        present = name == record.path or _has_module(self.block(index), name)
        return join(self.block_paths[index], name) if present else None

    def experts(self, index: int) -> Experts | None:
        """A block's experts, dense or smaller; `None` for a block without, or where they are packed."""
        path = self.experts_path(index)
        return None if path is None else Experts.of(self.model.get_submodule(path), path)

    def mlp_feeds_residual(self, index: int) -> bool:
        """Whether the down projection's output is added to the residual stream and no norm of the block follows."""
        record = self.mlp(index)
        if record is None:
            return False
        field = record.feeds_residual_field
        return bool(getattr(text_config(self.model), field)) if field else record.feeds_residual

    def predicts_tokens(self) -> bool:
        """Whether the model is a causal language model with its head."""
        return self.record.decoder and self.outside("head") is not None

    def block_matrices(self, index: int) -> list[tuple[str, str]]:
        """Path and kind of every matrix of a block that may be compressed: "mlp", "query_key" or "value_output" if the
        record names it, otherwise "other"."""
        kinds = dict(self.matrices_of_kind(index))
        dense = {name.removesuffix("?") for name in self.record.left_dense}
        return [
            (path, kinds.get(path, "other"))
            for name, module in self.block(index).named_modules()
            if isinstance(module, MATRICES) and name not in dense
            for path in [join(self.block_paths[index], name)]
        ]

    def block_weights(self, index: int) -> list[tuple[str, str]]:
        """`block_matrices` and the module of all experts, which is of kind "mlp"."""
        experts = self.experts_path(index)
        return self.block_matrices(index) + ([] if experts is None else [(experts, "mlp")])

    def linear_paths(self) -> Iterator[str]:
        """The matrices of all blocks that a record names, and the modules of experts: what `reduction` counts."""
        for index in range(len(self)):
            yield from (path for path, _ in self.matrices_of_kind(index))
            experts = self.experts_path(index)
            if experts is not None:
                yield experts
            elif not (self.record.attention or self.record.mlp or self.record.kinds):
                yield from (path for path, _ in self.block_matrices(index))

    def outside(self, role: Literal["embedding", "head"]) -> str | None:
        """Path of the table of token vectors or of the head that gives logits; `None` where the model has none."""
        model = self.model
        try:
            module = model.get_input_embeddings() if role == "embedding" else model.get_output_embeddings()
        except NotImplementedError:  # models of images
            return None
        if not isinstance(module, nn.Embedding if role == "embedding" else nn.Linear):
            return None
        return next(str(name) for name, other in model.named_modules() if other is module)

    def head_is_tied(self) -> bool:
        """Whether the head multiplies with the table of token vectors."""
        head, table = self.outside("head"), self.outside("embedding")
        if head is None or table is None:
            return False
        # A skeleton may not be tied yet, and then Transformers has it on its list.
        same = self.model.get_submodule(head).weight is self.model.get_submodule(table).weight
        return same or f"{head}.weight" in self.model.all_tied_weights_keys


def resolve_anatomy(model: PreTrainedModel) -> ModelAnatomy:
    """Find the record of a model's family and check it against the model.

    Raises:
        UnsupportedModelError: no record for the family; a module that the record names is missing or is no matrix; or
            an attribute, an argument or a size is not what the record says. The message lists what was found.
    """
    config, base = text_config(model), model.base_model
    # A record of the whole model comes before one of its language part.
    record = find_record(model.config.model_type)
    if record is None:
        record, base = find_record(config.model_type), _language_part(model, config)
    if record is None:
        raise UnsupportedModelError(
            f"no anatomy record describes model type {config.model_type!r} ({type(model).__name__}). "
            f"Known: {', '.join(known_model_types())}. Found {_describe(model)}. "
            "Describe the family with hf_compress.register_anatomy(Anatomy(model_types=(...), ...))."
        )
    model_type = described_type(model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    lists = [join(prefix, path) for path in record.stacks]
    found = [paths for paths in (_block_paths(model, path) for path in lists) if paths]
    if not found:
        raise UnsupportedModelError(
            f"the record of {model_type!r} expects a list of blocks at "
            f"{' or '.join(repr(path) for path in lists)}, but there is none in {type(model).__name__}. Found "
            f"{_describe(model)}."
        )
    ends = list(itertools.accumulate(len(paths) for paths in found))
    stacks = tuple(range(end - len(paths), end) for end, paths in zip(ends, found, strict=True))
    paths = tuple(itertools.chain.from_iterable(found))
    anatomy = ModelAnatomy(model=model, record=record, block_paths=paths, stacks=stacks)
    missing = [path for path in anatomy.linear_paths() if not _has_module(model, path)]
    if missing:
        first = [path for path in missing if path.startswith(f"{paths[0]}.")] or missing[:1]
        raise UnsupportedModelError(
            f"the record of {model_type!r} expects a projection at {', '.join(map(repr, first))}, which "
            f"{type(model).__name__} does not have. Found {_describe(model)}."
        )
    experts = {anatomy.experts_path(index) for index in range(len(anatomy))}
    for path in anatomy.linear_paths():
        if path in experts:
            continue  # looked at below
        module = model.get_submodule(path)
        # A record of attention and MLP describes linear layers; one of single matrices any kind of them.
        if not isinstance(module, (nn.Linear, Conv1D) if record.attention or record.mlp else MATRICES):
            raise UnsupportedModelError(
                f"{path!r} is a {type(module).__name__}, where the record of {model_type!r} expects an "
                "nn.Linear. Compress the plain checkpoint, without adapters or another quantization."
            )
    check_parts(anatomy, model_type)
    return anatomy


def _language_part(model: PreTrainedModel, config: Any) -> nn.Module:
    """The base model that runs the text of a multimodal model; of others their own."""
    base: nn.Module = model.base_model
    if config is model.config:
        return base
    for part in model.modules():
        # With a head, the model below it is meant.
        if getattr(part, "config", None) is config and part.base_model is part:
            return part  # type: ignore[no-any-return]
    return base


def _has_module(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _block_paths(model: nn.Module, pattern: str) -> tuple[str, ...]:
    """The blocks in the lists that match a path, in which `*` stands for every member of a list."""
    paths = [""]
    for name in [*pattern.split("."), "*"]:
        found = []
        for path in paths:
            parent = model.get_submodule(path)
            if name != "*":
                found += [join(path, name)] if hasattr(parent, name) else []
            elif isinstance(parent, (nn.ModuleList, nn.Sequential)):
                found += [join(path, member) for member, _ in parent.named_children()]
        paths = found
    return tuple(paths)


def require_parts(anatomy: ModelAnatomy, what: str) -> None:
    """Raise `UnsupportedModelError` for a family whose attention and MLP no record describes."""
    record = anatomy.record
    if record.attention is None and record.mlp is None and record.experts is None:
        raise UnsupportedModelError(
            f"{what} needs to know attention and MLP of a block, and the record of "
            f"{described_type(anatomy.model)!r} ({type(anatomy.model).__name__}) describes only single "
            "matrices. Learned codebooks work on it."
        )


def _describe(model: nn.Module) -> str:
    """The longest ModuleList of the model and the children of its first block, for an error message."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return f"no nn.ModuleList in {type(model).__name__}"
    name, blocks = max(lists, key=lambda item: len(item[1]))
    if len(blocks) == 0:
        return f"an empty nn.ModuleList at {name!r}"
    leaves = [
        f"{path}: {type(module).__name__}"
        for path, module in blocks[0].named_modules()
        if path and not any(module.children())
    ]
    return f"{len(blocks)} blocks at {name!r} with {{{', '.join(leaves)}}}"
