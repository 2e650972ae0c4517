"""What PEFT's adapters cannot do to a compressed model, said before they fail or train nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .engine.report import CompressionReport
from .errors import CompressionError


def is_unsaved(model: Any) -> bool:
    """A model that was compressed here and has no name of its own yet."""
    return isinstance(getattr(model, "compression_report", None), CompressionReport) and not model.name_or_path


def check_merge_allowed(original: Callable[..., Any], tuner: Any) -> None:
    """An adapter cannot be added to weights that are packed; PEFT itself would stop at their shape."""
    packed = next(
        (path for path, module in tuner.model.named_modules() if getattr(module, "packs_weight", False)), None
    )
    masked = next((path for path, m in tuner.model.named_modules() if "pruning_mask" in m._buffers), None)
    if masked is not None:
        raise CompressionError(
            f"the adapter cannot be merged: {masked!r} is pruned, and the sum would fill its zeros. Keep the adapter "
            "beside the model."
        )
    if packed is not None:
        raise CompressionError(
            f"the adapter cannot be merged: {packed!r} keeps its weights as codes, or only those that a pruning has "
            "left. Keep the adapter beside the compressed model, or call dequantize() on the compressed model before "
            "the adapter is attached; where weights were pruned, the merge then fills their zeros."
        )
    original(tuner)


def init_peft_model(
    original: Callable[..., Any], peft_model: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any
) -> None:
    """In place of `PeftModel.__init__`."""
    _refuse_on_codes(model, peft_config)
    # An adapter that was trained before and is loaded here has a name of its base already.
    if not peft_config.base_model_name_or_path:
        _warn_if_unsaved(model)
    original(peft_model, model, peft_config, *args, **kwargs)


def add_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `model.add_adapter`."""
    config = args[0] if args else kwargs.get("adapter_config")
    _refuse_on_codes(model, config)
    _warn_if_unsaved(model)
    return original(model, *args, **kwargs)


def _refuse_on_codes(model: Any, config: Any) -> None:
    """What PEFT would do to dense weights and cannot do to codes, before it fails or trains nothing."""
    if not isinstance(model, PreTrainedModel) or config is None:
        return
    packed = [path for path, module in model.named_modules() if getattr(module, "packs_weight", False)]
    if not packed:
        return
    coded_table = any(hasattr(model.get_submodule(path), "num_embeddings") for path in packed)
    heads = [path for path in packed if not hasattr(model.get_submodule(path), "weight")]

    def names(field: str, paths: list[str]) -> bool:
        wanted = getattr(config, field, None)
        wanted = [wanted] if isinstance(wanted, str) else wanted or []
        return any(f".{path}".endswith(f".{name}") for path in paths for name in wanted)

    reasons = {
        "use_dora": bool(getattr(config, "use_dora", False)),
        "modules_to_save": names("modules_to_save", packed),
        "target_modules": names("target_modules", heads),
        "trainable_token_indices": coded_table and getattr(config, "trainable_token_indices", None) is not None,
        "peft_type": coded_table and bool(getattr(config, "is_prompt_learning", False)),
    }
    field = next((name for name, refused in reasons.items() if refused), None)
    if field is not None:
        raise CompressionError(
            f"`{field}` of {type(config).__name__} needs dense weights where this model keeps codes (for example "
            f"{packed[0]!r}). Leave them out of the adapter, or call dequantize() first."
        )


def _warn_if_unsaved(model: Any) -> None:
    if is_unsaved(model):
        warnings.warn(
            "the adapter is attached to a compressed model that has not been saved, so it cannot name the model that "
            "it belongs to. Call model.save_pretrained(...) first: the adapter then names the compressed checkpoint.",
            stacklevel=4,
        )
