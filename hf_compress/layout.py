"""The layout: which modules were replaced, by what. It is the file format of a compressed checkpoint.

An entry is `{"path", "type", "spec"}`: a module path, a registered module type and a small JSON spec. Everything that
is an array is a named tensor in safetensors. Every module type keeps one contract, [`CompressedModule`].
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from .checked import is_integer, is_path, short
from .errors import CheckpointError, CompressionError

FORMAT_VERSION = 1
# Attribute of a model with masks while a Trainer trains it: its checkpoints are dense on purpose.
TRAINED = "_hf_compress_trained"
# Attribute of a model whose compression stopped half way.
UNFINISHED = "_hf_compress_unfinished"
# In the configuration that is saved beside masks of a pruning in a training.
MASKED = "has_pruning_masks"
# Characters of a detail in a message: it may quote a field as large as the file.
_SHOWN = 600
# What activation checkpointing and torch.compile put between a module and its parent. Neither is in the file.
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


@runtime_checkable
class CompressedModule(Protocol):
    """What a module type must offer.

    The main tensor is named `weight` (its own or a child's) and has another shape than in the dense model, so that
    plain Transformers without this package stops with a size mismatch instead of filling in random weights.
    """

    layout_type: ClassVar[str]

    def spec(self) -> dict[str, Any]:
        """Plain JSON from which `from_spec` rebuilds the module's structure."""

    @classmethod
    def from_spec(cls, dense: nn.Module, spec: dict[str, Any]) -> nn.Module:
        """Build the module in place of `dense` on the same device, tensors uninitialised.

        Raises `ValueError` (or `KeyError`, `TypeError`) for a spec that does not fit `dense`, before it takes memory.
        """

    def dequantize(self, dense: nn.Module) -> dict[str, torch.Tensor]:
        """The state dict of the dense module (given on meta) that computes the same function."""


ModuleType = TypeVar("ModuleType", bound=type[Any])
_MODULE_TYPES: dict[str, type[Any]] = {}
# Module types that need another package: where they are registered, and the extra that brings it.
_ON_DEMAND = dict.fromkeys(
    ("bnb_linear4bit", "bnb_linear8bit"), ("hf_compress.methods.bitsandbytes.modules", "bitsandbytes")
)


def register_module_type(cls: ModuleType) -> ModuleType:
    """Class decorator: make a module type known to the layout under its `layout_type`."""
    kind: Any = cls
    _MODULE_TYPES[kind.layout_type] = cls
    return cls


def layout_of(model: nn.Module) -> list[dict[str, Any]]:
    """Derive the layout from a live model: parents before children, nothing inside a parent that rebuilds it."""
    return [layout_entry(path, module) for path, module in compressed_modules(model)]


def compressed_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Path and module of every line of the layout. Modules of a skeleton may not know their specs yet."""
    return [
        (".".join(part for part in path.split(".") if part not in _WRAPPERS), module)
        for path, module in model.named_modules()
        if _is_ours(module)
    ]


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is of a registered type, or of a class made of one: FSDP2 makes them of those it shards."""
    return getattr(type(module), "layout_type", None) in _MODULE_TYPES


def layout_entry(path: str, module: Any) -> dict[str, Any]:
    """The layout's line for one compressed module."""
    return {"path": path, "type": module.layout_type, "spec": module.spec()}


def replay(model: nn.Module, layout: Any) -> None:
    """Rebuild the structure that a layout describes on a dense skeleton, usually on the meta device.

    Raises:
        CheckpointError: an entry that is malformed, names an unknown type or module, or does not fit the module.
    """
    check_layout(layout)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    with_head = any(entry["path"].startswith(prefix) for entry in layout)
    replaced: set[str] = set()
    above: set[str] = set()
    for entry in layout:
        if with_head and not entry["path"].startswith(prefix) and not _has(model, entry["path"]):
            continue  # part of a head that this class of model does not have
        path = _path_in(model, entry["path"])
        if path in replaced or path in above:
            # A module is built once, so that the work is bounded by the model's size, not the layout's.
            wrong = "twice" if path in replaced else "after a part of it"
            raise CheckpointError(
                f"the layout replaces {path!r} {wrong}: expected every module once, parents before children. "
                "The layout is damaged. Download or compress again."
            )
        replaced.add(path)
        above.update(path[:place] for place, character in enumerate(path) if character == ".")
        model.set_submodule(path, build_module(model.get_submodule(path), entry))
    _tie_heads(model)
    connect(model)


def check_layout(layout: Any) -> None:
    """Whether a layout is a list of entries of known types, before any model is looked at.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(layout, list) or not layout:
        raise CheckpointError("the checkpoint's quantization_config has no `layout`: it is damaged. Compress again.")
    for entry in layout:
        _check_entry(entry)


def _tie_heads(model: Any) -> None:
    """A head that is tied to a table which was compressed in a model without a head."""
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        head, table = target.removesuffix(".weight"), source.removesuffix(".weight")
        if not (_has(model, head) and _has(model, table)):
            continue
        tie, old = getattr(model.get_submodule(table), "tied_head", None), model.get_submodule(head)
        if tie is not None and not _is_ours(old):
            try:
                model.set_submodule(head, tie(old, table))
            except ValueError as error:
                raise CheckpointError(f"{head!r}, which the config ties to {table!r}, {error}.") from error
        elif getattr(old, "source_path", None) is not None:
            continue
        elif tie is not None or _is_ours(old):
            raise CheckpointError(
                f"the config ties {head!r} to {table!r}, and the layout has codes of its own for {head!r}. "
                "The config and the layout belong to different models."
            )


def connect(model: nn.Module) -> None:
    """Let modules that use another module's tensors find it: their `connect` is handed the module at `source_path`.

    Transformers would tie the dense weights that are no longer there, so these pairs are taken from its list.

    Raises:
        CheckpointError: no such module, or one that does not fit.
    """
    for path, module in list(model.named_modules()):
        source = getattr(module, "source_path", None)
        if not _is_ours(module) or source is None:
            continue
        try:
            found = model.get_submodule(_path_in(model, source))
        except CheckpointError:
            raise CheckpointError(
                f"{path!r} is tied to {source!r}, which {type(model).__name__} does not have."
            ) from None
        try:
            module.connect(found)
        except ValueError as error:
            raise CheckpointError(f"{path!r} {error}.") from error
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            tied = getattr(model, name, None) or {}
            setattr(model, name, {target: of for target, of in tied.items() if target != f"{path}.weight"})


def is_sharded(tensor: Any) -> bool:
    """Whether FSDP2 or tensor parallelism has divided a tensor over processes: a `DTensor`, of which this process
    holds a part."""
    return hasattr(tensor, "device_mesh")


def require_gathered(owner: nn.Module, path: str | None) -> None:
    """Called by a module that uses tensors of another.

    Raises:
        CompressionError: FSDP2 shards the other module on its own, and gathers its tensors for its own calls only.
    """
    if any(is_sharded(parameter) for parameter in owner._parameters.values()):
        raise CompressionError(
            f"FSDP shards {path!r} on its own, and other layers use its weights, which are not gathered for them. "
            'Make the model one unit with auto_wrap_policy="NO_WRAP". Accelerate still makes the embedding a unit: '
            "if it is tied and has trainable codebooks, train with DDP, or compress again with "
            "trainable_codebooks=False."
        )


def disconnect(model: Any) -> None:
    """After the last such module has gone: let Transformers tie the dense weights again."""
    if "_tied_weights_keys" in model.__dict__:
        del model._tied_weights_keys
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()


def _has(model: nn.Module, path: str) -> bool:
    """Whether a path names a module by the names of its parents. Torch's `get_submodule` also goes through properties,
    such as `base_model`, which lead to one module under any number of paths."""
    module: nn.Module | None = model
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module is not None


def _path_in(model: nn.Module, path: str) -> str:
    """A layout's path in this model: with a head the base model has a prefix, on its own it has none."""
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        if _has(model, candidate):
            return candidate
    raise CheckpointError(
        f"the layout replaces {path!r}, which {type(model).__name__} does not have. "
        "The config and the layout belong to different models."
    )


def build_module(dense: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """The module that a layout entry describes, in place of `dense`. Raises `CheckpointError` if it does not fit."""
    try:
        module: nn.Module = _MODULE_TYPES[entry["type"]].from_spec(dense, entry["spec"])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        detail = f"missing field {error}" if isinstance(error, KeyError) else str(error)
        shown = detail if len(detail) <= _SHOWN else f"{detail[:_SHOWN]}..."
        raise CheckpointError(f"layout entry of {entry['path']!r} ({entry['type']}): {shown}.") from error
    reference = next(dense.parameters(), None)
    for parameter in module.parameters():
        wanted = reference is None or reference.requires_grad
        parameter.requires_grad_(wanted and parameter.is_floating_point())
    return module.train(dense.training)


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, dict) or set(entry) != {"path", "type", "spec"}:
        raise CheckpointError(f"a layout entry must have exactly `path`, `type` and `spec`, got {short(entry)}.")
    path, kind, spec = entry["path"], entry["type"], entry["spec"]
    if not is_path(path) or not isinstance(spec, dict):
        raise CheckpointError(f"layout entry {short(entry)}: `path` must be a module path and `spec` an object.")
    if isinstance(kind, str) and kind in _ON_DEMAND and kind not in _MODULE_TYPES:
        home, extra = _ON_DEMAND[kind]
        try:
            importlib.import_module(home)
        except ImportError as error:
            raise CheckpointError(
                f"{path!r} was made with {extra}, which cannot be imported ({error}): pip install "
                f"'hf_compress[{extra}]'."
            ) from error
    if not isinstance(kind, str) or kind not in _MODULE_TYPES:
        raise CheckpointError(
            f"layout entry of {path!r} has module type {short(kind)}, which this version of hf_compress does not know "
            f"(known: {sorted(_MODULE_TYPES)}). Update hf_compress if the checkpoint is newer."
        )


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes that the tensors of a skeleton have, for `check_loaded`."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor.dtype for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def check_loaded(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """After loading: every tensor of a replaced module came from the checkpoint, and every tensor has the kind that
    the model computes with. Transformers fills in whatever the memory holds for those that did not come, marks those
    that did, and casts floats but leaves integers, truth values and complex numbers as the file has them.

    Args:
        dtypes: of the skeleton before loading.

    Raises:
        CheckpointError: a tensor is missing, or of another kind.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        expected = dtypes.get(name)
        if expected is None:
            continue  # tied since then, or no tensor
        fits = tensor.is_floating_point() if expected.is_floating_point else tensor.dtype == expected
        if not tensor.is_meta and not fits:
            raise CheckpointError(
                f"the checkpoint's tensor {name!r} is of {tensor.dtype}, expected {expected}: it is damaged. Download "
                "or compress again."
            )
    for path, module in model.named_modules():
        if not _is_ours(module):
            continue
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"the checkpoint lacks the tensor '{path}.{name}': it is damaged. Download or compress again."
                )


def check_tensors(model: nn.Module) -> None:
    """Let the modules look at loaded tensors whose values matter, such as indices. Raises `CheckpointError`."""
    for path, module in model.named_modules():
        check = getattr(module, "check_tensors", None)
        if _is_ours(module) and check is not None:
            try:
                check()
            except ValueError as error:
                detail = str(error).removesuffix(".")
                raise CheckpointError(f"tensors of {path!r}: {detail}. The checkpoint is damaged.") from error


def checked_size(spec: dict[str, Any], name: str, largest: int) -> int:
    """An integer field of a spec within 1 to `largest`. Raises `ValueError` with both numbers."""
    value = spec[name]
    if not is_integer(value, 1, largest):
        raise ValueError(f"`{name}` must be an integer from 1 to {largest}, got {short(value)}")
    found: int = value
    return found
