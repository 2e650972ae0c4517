"""The layout that sizes lead to, without weights: what a plan is made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...anatomy import ModelAnatomy
from ...layout import ResizedLinear
from .configuration import Kind
from .modules import DecomposedAttention
from .sizes import Geometry, Sizes

# Bytes of an index of a kept rotary pair.
INDEX_BYTES = 4


def layout_for_sizes(anatomy: ModelAnatomy, geometry: Geometry, sizes: Sizes) -> list[dict[str, Any]]:
    """Layout entries of the modules that these sizes make smaller."""
    get = anatomy.model.get_submodule
    entries: list[dict[str, Any]] = []
    dense = {(m.block, m.kind): m.size for m in geometry.modules}
    for block, own in enumerate(sizes):
        reduced = {kind: size for kind, size in own.items() if size < dense[block, kind]}
        if reduced.keys() - {"mlp"}:
            entries.append(_attention_entry(anatomy, block, reduced))
        if "mlp" in reduced:
            for role in ("up", "gate", "down") if anatomy.mlp.gate else ("up", "down"):
                path = anatomy.mlp_path(block, role)
                linear = get(path)
                shape = {"in_features": linear.in_features, "out_features": linear.out_features}
                shape["in_features" if role == "down" else "out_features"] = reduced["mlp"]
                entries.append({"path": path, "type": ResizedLinear.layout_type, "spec": shape})
    return entries


def _attention_entry(anatomy: ModelAnatomy, block: int, reduced: dict[Kind, int]) -> dict[str, Any]:
    path = anatomy.attention_path(block)
    attention = anatomy.model.get_submodule(path)
    head_dim = int(attention.head_dim)
    value_dim = reduced.get("value_output", head_dim)
    value: Any = anatomy.model.get_submodule(anatomy.attention_path(block, "value"))
    spec = {
        "query_key_dim": reduced.get("query_key", head_dim),
        "value_dim": value_dim,
        "output_bias": value_dim < head_dim and value.bias is not None,
    }
    return {"path": path, "type": DecomposedAttention.layout_type, "spec": spec}


def attention_extras(anatomy: ModelAnatomy, kinds: list[Kind]) -> int:
    """The most bytes that decomposed attention has beside its matrices: indices of pairs, norms a head, biases."""
    if not set(kinds) - {"mlp"} or anatomy.record.attention is None:
        return 0
    total = 0
    for block in range(len(anatomy)):
        key, output = (anatomy.model.get_submodule(anatomy.attention_path(block, r)) for r in ("key", "output"))
        assert isinstance(key, nn.Linear) and isinstance(output, nn.Linear)
        width = key.weight.element_size()
        total += key.out_features // 2 * INDEX_BYTES + output.out_features * width
        norms = (anatomy.attention.query_norm, anatomy.attention.key_norm)
        total += sum(name is not None for name in norms) * key.out_features * width
    return total
