"""What no method reaches in a model, with its share of the weights."""

from __future__ import annotations

from torch import nn

from .model import ModelAnatomy, join

# Parts outside the blocks below this share are not named: biases of position, small projections.
NAMED_SHARE = 0.01


def unreached(anatomy: ModelAnatomy) -> list[str]:
    """`unreached_shares` as lines of a report."""
    return [
        f"{what}: {share:.1%} of the model's weights stay as they are"
        for what, share in unreached_shares(anatomy).items()
    ]


def unreached_shares(anatomy: ModelAnatomy) -> dict[str, float]:
    """Shares of all weights that no method reaches: those of two and more dimensions in the blocks that are no matrix
    of a layer and no experts, and large parts outside the blocks but the token table and the head."""
    model = anatomy.model
    inside: dict[str, list[int]] = {}
    for index in range(len(anatomy)):
        matrices = {path for path, _ in anatomy.block_weights(index)} | set(anatomy.mlp_paths(index).values())
        for name, module in anatomy.block(index).named_modules():
            if join(anatomy.block_paths[index], name) not in matrices:
                for own, weights in _weights(module):
                    inside.setdefault(f"{join(name, own)} ({type(module).__name__})", []).append(weights)
    found = {f"{what} in {len(counts)} blocks": sum(counts) for what, counts in inside.items()}
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = {part: weights for part, weights in _outside(anatomy).items() if weights >= NAMED_SHARE * total}
    found.update((f"{part} (outside the blocks)", weights) for part, weights in outside.items())
    return {what: weights / total for what, weights in found.items()}


def untouched_experts(anatomy: ModelAnatomy, total: int) -> list[str]:
    """For a method that does not reach experts: those of the model, as a line of its report.

    Args:
        total: weights of the dense model.
    """
    found = [anatomy.experts(index) for index in range(len(anatomy))]
    left = [experts for experts in found if experts is not None]
    if not left:
        return []
    assert anatomy.record.experts is not None
    what = f"{anatomy.record.experts.path.removesuffix('?')} ({type(left[0].module).__name__})"
    share = sum(experts.weights for experts in left) / total
    return [f"{what} in {len(left)} blocks: {share:.1%} of the model's weights stay as they are"]


def untouched_matrices(anatomy: ModelAnatomy, total: int) -> list[str]:
    """For a method that does not reach matrices which the record wants dense and another method makes smaller: those
    of the model, as lines of its report.

    Args:
        total: weights of the dense model.
    """
    found: dict[str, list[int]] = {}
    for index in range(len(anatomy)):
        touched = {path for path, _ in anatomy.block_matrices(index)}
        for path in anatomy.mlp_paths(index).values():
            module = anatomy.model.get_submodule(path)
            name = path.removeprefix(f"{anatomy.block_paths[index]}.")
            for own, weights in () if path in touched else _weights(module):
                found.setdefault(f"{join(name, own)} ({type(module).__name__})", []).append(weights)
    return [
        f"{what} in {len(counts)} blocks: {sum(counts) / total:.1%} of the model's weights stay as they are"
        for what, counts in found.items()
    ]


def _outside(anatomy: ModelAnatomy) -> dict[str, int]:
    """Weights of the base model's parts and of what comes after it, without blocks, tables of vectors and head."""
    model, found = anatomy.model, dict[str, int]()
    head = anatomy.outside("head")
    base = next(str(name) for name, module in model.named_modules() if module is model.base_model)
    for path, module in model.named_modules():
        if path == head or isinstance(module, nn.Embedding) or _is_inside(path, anatomy.block_paths):
            continue
        names = path.split(".")
        part = ".".join(names[: 1 + base.count(".") + 1] if base and _is_inside(path, (base,)) else names[:1])
        for _, weights in _weights(module):
            found[part] = found.get(part, 0) + weights
    return found


def _weights(module: nn.Module) -> list[tuple[str, int]]:
    """Names and sizes of a dense module's own parameters that are no vectors."""
    if hasattr(module, "layout_type"):  # of an earlier compression
        return []
    own = module.named_parameters(recurse=False)
    return [(name, parameter.numel()) for name, parameter in own if parameter.dim() > 1]


def _is_inside(path: str, blocks: tuple[str, ...]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)
