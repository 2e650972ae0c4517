"""Whether a record's attention and MLP are those of the model: attributes, arguments and sizes of the dense modules.

Modules that an earlier stage has replaced have sizes of their own and are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from .experts import expert_faults
from .records import AttentionAnatomy, MlpAnatomy

if TYPE_CHECKING:
    from .model import ModelAnatomy


def check_parts(anatomy: ModelAnatomy, model_type: str) -> None:
    """Check the attention and the MLP of every block.

    Args:
        model_type: of the record.

    Raises:
        UnsupportedModelError: with what the record expects, where, and what the model has there.
    """
    for block in range(len(anatomy)):
        for fault in _faults(anatomy, block):
            raise UnsupportedModelError(
                f"the record of {model_type!r} does not fit {type(anatomy.model).__name__}: {fault}. Correct it "
                "(hf_compress/anatomy/README.md), or name the block's matrices in `kinds` alone."
            )


def _faults(anatomy: ModelAnatomy, block: int) -> Iterator[str]:
    for which in range(anatomy.attention_count(block)):
        yield from _attention_faults(anatomy, block, which)
    record = anatomy.mlp(block)
    if record is not None:
        yield from _mlp_faults(anatomy, block, record)
    path = anatomy.experts_path(block)
    if path is not None:
        yield from expert_faults(path, anatomy.model.get_submodule(path))


def is_dense_class(module: Any) -> bool:
    """Whether a module is of the model's own class, not one that a method put there."""
    return not hasattr(type(module), "layout_type")


def dense_sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a dense matrix; `None` for one that a stage has replaced."""
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    return (int(module.nx), int(module.nf)) if type(module) is Conv1D else None


def _find(module: nn.Module, path: str) -> tuple[bool, Any]:
    """Whether there is an attribute at a dotted path, and its value."""
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            return False, None
        value = getattr(value, name)
    return True, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _attention_faults(anatomy: ModelAnatomy, block: int, which: int) -> Iterator[str]:
    record, path = anatomy.attention, anatomy.attention_path(block, which=which)
    module = anatomy.model.get_submodule(path)
    if not is_dense_class(module):
        return
    where = f"the {type(module).__name__} at {path!r}"
    yield from _attribute_faults(record, module, where)
    if any(_find(module, flag)[1] for flag in record.left_if):
        return
    yield from _argument_faults(record, module, where)
    get = anatomy.model.get_submodule
    sizes = {
        role: dense_sizes(get(anatomy.attention_path(block, role, which)))
        for role in ("query", "key", "value", "output")
    }
    head_dim = int(_find(module, record.head_dim)[1])
    yield from (f"{fault}, in {where}" for fault in _head_faults(record, head_dim, sizes))


def _attribute_faults(record: AttentionAnatomy, module: nn.Module, where: str) -> Iterator[str]:
    """Names that are no attributes, and attributes that hold something else."""
    numbers = ("head_dim", "scaling", "dropout", "output_dropout")
    fields = (*numbers, "softcap", "sliding_window", "rotary_flag", "query_norm", "key_norm")
    named = [("left_if", flag) for flag in record.left_if]
    for field, name in [*named, *((field, getattr(record, field)) for field in fields)]:
        found, value = (True, None) if name is None else _find(module, name)
        if not found:
            yield f"`{field}` is {name!r}, an attribute that {where} does not have"
        if field == "left_if" and value and _find(module, record.head_dim)[0]:
            return  # it computes something else: the other attributes are not read
        if name is not None and field in numbers and not _is_number(value):
            yield f"`{field}` is {name!r}, expected a number there, and {where} has {value!r:.80}"
        if field == "head_dim" and (not isinstance(value, int) or value < 1):
            yield f"`head_dim` is {name!r}, expected a size of 1 or more there, and {where} has {value!r:.80}"
        if name is not None and field in ("query_norm", "key_norm") and is_dense_class(value):
            width: int | None = int(_find(module, record.head_dim)[1])
            if record.norms_span_heads:
                projected = dense_sizes(_find(module, getattr(record, field.removesuffix("_norm")))[1])
                width = None if projected is None else projected[1]
            if width is not None:
                yield from _norm_faults(field, name, value, width, where)
    if not hasattr(module, "config"):
        yield f"attention needs the model's `config` to choose its implementation, which {where} does not have"


def _norm_faults(field: str, name: str, norm: Any, width: int, where: str) -> Iterator[str]:
    weight = getattr(norm, "weight", None)
    size = getattr(weight, "numel", lambda: None)()
    if size != width or not (hasattr(norm, "variance_epsilon") or hasattr(norm, "eps")):
        found = f"{type(norm).__name__}" + ("" if size is None else f" over {size}")
        yield (
            f"`{field}` is {name!r}, expected an RMS norm over the {width} dimensions of a head, or of "
            f"all with `norms_span_heads`, found {found} in {where}"
        )


def _argument_faults(record: AttentionAnatomy, module: nn.Module, where: str) -> Iterator[str]:
    """A cache or a rotary embedding that the dense class is handed otherwise than the record says."""
    arguments = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    listed = f"{where} takes {', '.join(arguments)}"
    # A cache may also come among the keyword arguments; one of another name tells that it does not.
    caches = [name for name in arguments if "past" in name or name == "cache"]
    if caches and record.cache not in arguments:
        yield f"`cache` is {record.cache!r}, expected {caches[0]!r}: {listed}"
    rotary = "position_embeddings" in arguments
    if record.rotary is not None and not rotary:
        yield f"`rotary` is {record.rotary!r}, which needs the argument `position_embeddings`: {listed}"
    if record.rotary is None and rotary:
        yield f"`rotary` is None, and there is a rotary embedding: {listed}"


def _head_faults(record: AttentionAnatomy, head_dim: int, sizes: dict[str, tuple[int, int] | None]) -> Iterator[str]:
    """Sizes of projections that are not those of whole heads."""
    of_heads = f"heads of `head_dim` {record.head_dim!r} = {head_dim}"
    for role in ("query", "key", "value"):
        size = sizes[role]
        if size is not None and size[1] % head_dim:
            yield f"the `{role}` {getattr(record, role)!r} has {size[1]} outputs, which are no {of_heads}"
    query, key, value, output = (sizes[role] for role in ("query", "key", "value", "output"))
    if output is not None and output[0] % head_dim:
        yield f"the `output` {record.output!r} has {output[0]} inputs, which are no {of_heads}"
    if record.fused is not None:
        if query is not None and output is not None:
            rows, heads = query[1] // head_dim, output[0] // head_dim
            if rows <= heads or (rows - heads) % 2:
                yield (
                    f"`fused` is {record.fused!r}, expected the queries of {heads} heads, as the `output` "
                    f"{record.output!r} has, and as many keys as values in {record.query!r}, which has {query[1]} "
                    f"outputs: {rows} {of_heads}"
                )
            yield from _group_faults(heads, (rows - heads) // 2)
        return
    if query is not None and output is not None and query[1] != output[0]:
        yield (
            f"the `query` {record.query!r} has {query[1]} outputs, expected the {output[0]} inputs of the `output` "
            f"{record.output!r}"
        )
    if key is not None and value is not None and key[1] != value[1]:
        yield (
            f"the `value` {record.value!r} has {value[1]} outputs, expected the {key[1]} of the `key` {record.key!r}"
        )
    if query is not None and key is not None:
        yield from _group_faults(query[1] // head_dim, key[1] // head_dim)


def _group_faults(heads: int, key_heads: int) -> Iterator[str]:
    if heads % key_heads:
        yield f"{heads} query heads cannot share {key_heads} key/value heads evenly"


def _mlp_faults(anatomy: ModelAnatomy, block: int, record: MlpAnatomy) -> Iterator[str]:
    paths = anatomy.mlp_paths(block)
    sizes = {role: dense_sizes(anatomy.model.get_submodule(path)) for role, path in paths.items()}
    up, gate, down = sizes["up"], sizes.get("gate"), sizes["down"]
    if gate is not None and up is not None and gate[1] != up[1]:
        yield f"the `gate` {paths['gate']!r} has {gate[1]} outputs, expected the {up[1]} of the `up` {paths['up']!r}"
    if up is not None and down is not None:
        wanted = 2 * down[0] if record.fused else down[0]
        if up[1] != wanted:
            what = "twice the" if record.fused else "the"
            only = "" if record.fused or up[1] != 2 * down[0] else "; name it as `gate` too if it is both in one"
            yield (
                f"the `up` {paths['up']!r} has {up[1]} outputs, expected {what} {down[0]} inputs of the `down` "
                f"{paths['down']!r}{only}"
            )
        reads = _block_width(anatomy, block)
        if reads == up[1] != up[0]:
            yield (
                f"the `up` {paths['up']!r} has {up[0]} inputs, expected the {reads} that the block's attention has: "
                "`up` and `down` look swapped"
            )
    field = record.feeds_residual_field
    if field is not None and not hasattr(anatomy.model.config.get_text_config(decoder=True), field):
        yield f"`feeds_residual_field` is {field!r}, which the model's config does not have"


def _block_width(anatomy: ModelAnatomy, block: int) -> int | None:
    """The inputs of the block's first projection of queries, if it is dense."""
    paths = (path for path, kind in anatomy.matrices_of_kind(block) if kind == "query_key")
    path = next(paths, None)
    sizes = None if path is None else dense_sizes(anatomy.model.get_submodule(path))
    return None if sizes is None else sizes[0]
