"""The layout that sizes lead to, without weights: what a plan is made of."""

from __future__ import annotations

from typing import Any

from transformers.pytorch_utils import Conv1D

from ...anatomy import ModelAnatomy, dense_rows
from ...experts import ResizedExperts
from ...resized import ResizedConv1D, ResizedLinear
from .configuration import Kind
from .heads import Heads
from .modules import DecomposedAttention
from .sizes import Geometry, Sizes

# Bytes of an index of a kept rotary pair.
INDEX_BYTES = 4


def layout_for_sizes(anatomy: ModelAnatomy, geometry: Geometry, sizes: Sizes) -> list[dict[str, Any]]:
    """Layout entries of the modules that these sizes make smaller."""
    get = anatomy.model.get_submodule
    entries: list[dict[str, Any]] = []
    modules = {(m.block, m.kind): m for m in geometry.modules}
    for block, own in enumerate(sizes):
        reduced = {kind: size for kind, size in own.items() if size < modules[block, kind].size}
        for which in range(anatomy.attention_count(block)):
            given = {kind: size for kind, size in reduced.items() if which in modules[block, kind].attentions}
            entries += _attention_entries(anatomy, block, which, given) if given else []
        experts = anatomy.experts(block) if "mlp" in reduced else None
        if experts is not None:
            spec = {"width": reduced["mlp"]}
            entries.append({"path": experts.path, "type": ResizedExperts.layout_type, "spec": spec})
            continue
        record = anatomy.mlp(block)
        fused = record is not None and record.fused
        for role, path in anatomy.mlp_paths(block).items() if "mlp" in reduced else ():
            layer = get(path)
            outputs, inputs = dense_rows(layer).shape
            shape = {"in_features": inputs, "out_features": outputs}
            if role == "down":
                shape["in_features"] = reduced["mlp"]
            else:
                shape["out_features"] = reduced["mlp"] * (2 if fused else 1)
                shape |= {"groups": 2} if fused else {}
            kind = ResizedConv1D if isinstance(layer, Conv1D) else ResizedLinear
            entries.append({"path": path, "type": kind.layout_type, "spec": shape})
    return entries


def _attention_entries(
    anatomy: ModelAnatomy, block: int, which: int, reduced: dict[Kind, int]
) -> list[dict[str, Any]]:
    heads = Heads.of_block(anatomy, block, which)
    value_dim = reduced.get("value_output", heads.head_dim)
    spec = {
        "query_key_dim": reduced.get("query_key", heads.head_dim),
        "value_dim": value_dim,
        "output_bias": heads.folds_value_bias(value_dim < heads.head_dim),
    }
    path = anatomy.attention_path(block, which=which)
    entries = [{"path": path, "type": DecomposedAttention.layout_type, "spec": spec}]
    if anatomy.attention.output_outside and value_dim < heads.head_dim:
        shape = {
            "in_features": heads.num_heads * value_dim,
            "out_features": len(dense_rows(heads.projections["output"])),
        }
        # As the layer writes it: without a field that says nothing.
        shape |= {"groups": heads.num_heads} if heads.num_heads > 1 else {}
        path = anatomy.attention_path(block, "output")
        entries.append({"path": path, "type": ResizedLinear.layout_type, "spec": shape})
    return entries


def attention_extras(anatomy: ModelAnatomy, kinds: list[Kind]) -> int:
    """The most bytes that decomposed attention has beside its matrices: indices of pairs, norms a head, biases."""
    if not set(kinds) - {"mlp"}:
        return 0
    total = 0
    places = ((block, which) for block in range(len(anatomy)) for which in range(anatomy.attention_count(block)))
    for block, which in places:
        heads = Heads.of_block(anatomy, block, which)
        output: Any = heads.projections["output"]
        width, key_size = output.weight.element_size(), heads.num_key_value_heads * heads.head_dim
        total += key_size // 2 * INDEX_BYTES + len(dense_rows(output)) * width
        norms = (anatomy.attention.query_norm, anatomy.attention.key_norm)
        total += sum(name is not None for name in norms) * key_size * width
    return total
