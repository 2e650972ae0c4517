"""Whether a model computes what its record says: an exact trial, for what names and sizes cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, UnsupportedModelError
from .checks import dense_sizes, is_dense_class
from .experts import Experts, chosen_tokens, routed
from .model import ModelAnatomy, read_attribute, resolve_anatomy, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest difference that counts as rounding, as a share of the largest value, by how coarse the dtype is.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Tokens of the random texts.
_LENGTH = 12


@torch.no_grad()
def check_record(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Run a model on random input and compare it with what its record describes. The model is left as it was.

    Every attention that the record describes is computed by `DecomposedAttention` at full rank as well; the inner
    channels of every MLP change places, which must not change what it puts out; experts are added up one by one.
    Modules that a stage has replaced are left out, and so are records of single matrices, which describe nothing that
    could be compared. Weights drawn at random tell more than an untrained model's zero biases.

    Args:
        model: with weights, which the meta device has none of.
        inputs: keyword arguments of the model's forward; random tokens or images if left out.

    Raises:
        UnsupportedModelError: as `resolve_anatomy`, or a block whose output differs; names the module.
        ConfigurationError: no inputs, for a model that reads neither tokens nor images, or a model without weights.
    """
    anatomy = resolve_anatomy(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError("check_record runs the model, and this one is on the meta device. Load its weights.")
    batch = _random_inputs(model) if inputs is None else dict(inputs)
    tolerance = _TOLERANCES.get(model.dtype, 1e-1)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for block in range(len(anatomy)):
            for path, field, found in _differences(anatomy, block, batch):
                if not found <= tolerance:
                    raise UnsupportedModelError(
                        f"{path!r} of {type(model).__name__} computes something else than its record says: the "
                        f"outputs differ by {found:.2g} of the largest, expected at most {tolerance:.0e}. Correct "
                        f"{field}, or name the block's matrices in `kinds` alone."
                    )
    finally:
        for module, training in modes.items():
            module.training = training


def _random_inputs(model: Any) -> dict[str, Tensor]:
    generator, config, name = torch.Generator().manual_seed(0), text_config(model), model.main_input_name
    if name == "input_ids":
        tokens = torch.randint(3, int(config.vocab_size), (2, _LENGTH), generator=generator)
        return {name: tokens.to(model.device)}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and isinstance(size, int):
        images = torch.randn(2, getattr(config, "num_channels", 3), size, size, generator=generator)
        return {name: images.to(model.device, model.dtype)}
    raise ConfigurationError(
        f"{type(model).__name__} reads {name!r}, of which check_record makes none. Pass `inputs`: a dictionary of the "
        "model's arguments."
    )


def _differences(anatomy: ModelAnatomy, block: int, batch: dict[str, Tensor]) -> Iterator[tuple[str, str, float]]:
    """Path of every part of a block, the fields of its record, and how far the two outputs are apart."""
    record, get = anatomy.record, anatomy.model.get_submodule
    for which in range(anatomy.attention_count(block)):
        assert record.attention is not None
        path = anatomy.attention_path(block, which=which)
        matrices = [get(anatomy.attention_path(block, role, which)) for role in ("query", "key", "value", "output")]
        dense = is_dense_class(get(path)) and all(dense_sizes(matrix) for matrix in matrices)
        if dense and not any(read_attribute(get(path), flag) for flag in record.attention.left_if):
            fields = "`fused`, `rotary`, the norms, `scaling`, `softcap` or the projections of its AttentionAnatomy"
            yield path, fields, _attention_difference(anatomy, block, which, batch)
    if anatomy.mlp(block) is not None:
        path = anatomy.mlp_path(block, "down")
        yield path, "`up`, `gate` or `down` of its MlpAnatomy", _mlp_difference(anatomy, block, batch)
    experts = anatomy.experts(block)
    if experts is not None:
        yield experts.path, "the `path` of its ExpertsAnatomy", _expert_difference(anatomy, experts, batch)


def _relative(found: Tensor, wanted: Tensor) -> float:
    difference = float((found.double() - wanted.double()).abs().max())
    return difference / max(float(wanted.double().abs().max()), 1e-30)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handle: Any = (
        module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


def _run(model: PreTrainedModel, batch: dict[str, Tensor], decoder: bool) -> None:
    # A cache would be filled twice.
    model(**batch, **({"use_cache": False} if decoder else {}))


def _attention_difference(anatomy: ModelAnatomy, block: int, which: int, batch: dict[str, Tensor]) -> float:
    from ..methods.modular.heads import INPUTS, Heads  # a method, which stands on this package
    from ..methods.modular.modules import DecomposedAttention

    path, heads = anatomy.attention_path(block, which=which), Heads.of_block(anatomy, block, which)
    dense = anatomy.model.get_submodule(path)
    described = DecomposedAttention(dense, anatomy.attention, heads.head_dim, heads.head_dim, output_bias=False)
    described.fill({role: heads.weights(role) for role in (*INPUTS, "output")}, {})
    described.eval()
    differences: list[float] = []

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        wanted = output[0] if isinstance(output, tuple) else output
        try:
            found, _ = described(*args, **kwargs)
            differences.append(_relative(found.reshape(wanted.shape), wanted))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise UnsupportedModelError(
                f"{path!r} of {type(anatomy.model).__name__} cannot be computed as its "
                f"record says: {str(error) or type(error).__name__}. Correct its AttentionAnatomy, or name the "
                "block's matrices in `kinds` alone."
            ) from error

    with _hooked(dense, compare):
        _run(anatomy.model, batch, anatomy.record.decoder)
    return max(differences, default=0.0)


def _mlp_difference(anatomy: ModelAnatomy, block: int, batch: dict[str, Tensor]) -> float:
    """How the down projection's output changes when the channels before and after the activation are turned round."""
    record, get = anatomy.mlp(block), anatomy.model.get_submodule
    assert record is not None
    *before, down = (get(path) for path in anatomy.mlp_paths(block).values())
    outputs: list[Tensor] = []

    def turned(_: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Tensor) -> Tensor:
        halves: Tensor = output.unflatten(-1, (2 if record.fused else 1, -1))
        return halves.flip(-1).flatten(-2)

    def keep(_: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Tensor) -> None:
        outputs.append(output)

    with _hooked(down, keep):
        _run(anatomy.model, batch, anatomy.record.decoder)
        with ExitStack() as hooks:
            for module in before:
                hooks.enter_context(_hooked(module, turned))
            hooks.enter_context(_hooked(down, lambda _, args: (args[0].flip(-1), *args[1:]), before=True))
            _run(anatomy.model, batch, anatomy.record.decoder)
    if not outputs:  # the random tokens did not come this way
        return 0.0
    return _relative(outputs[1], outputs[0])


def _expert_difference(anatomy: ModelAnatomy, experts: Experts, batch: dict[str, Tensor]) -> float:
    """How far the module of experts is from the sum of its experts' outputs by the router's weights."""
    differences: list[float] = []

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        hidden, index, weights = routed(args, kwargs)
        wanted = torch.zeros_like(output, dtype=torch.float64)
        for expert, tokens, places in chosen_tokens(index, experts.count):
            out = experts.inner(hidden[tokens], expert) @ experts.down[expert].T
            wanted.index_add_(0, tokens, (out * weights[tokens, places, None]).double())
        differences.append(_relative(output.reshape(wanted.shape), wanted))

    with _hooked(experts.module, compare):
        _run(anatomy.model, batch, anatomy.record.decoder)
    return max(differences, default=0.0)
