"""The only wrappers round Transformers: small, idempotent, reversible, acting only where our recipes or models are."""

from __future__ import annotations

import copy
import functools
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations import PeftAdapterMixin

from .configuration import QUANT_METHOD, CompressionConfig, MethodConfig
from .engine.report import CompressionReport
from .errors import CheckpointError, CompressionError, ConfigurationError
from .layout import TRAINED, UNFINISHED, layout_of

# Arguments of from_pretrained that an implicit load of the tokenizer has to share.
_SHARED_ARGUMENTS = (
    "revision",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "trust_remote_code",
    "gguf_file",
)
# Attribute of a wrapper: what stood in its place.
_ORIGINAL = "_hf_compress_original"
_LOAD_ARGUMENTS: ContextVar[dict[str, Any] | None] = ContextVar("load_arguments", default=None)


def current_load_arguments() -> dict[str, Any]:
    """Where the model now being loaded comes from: the arguments that its tokenizer is loaded with."""
    return _LOAD_ARGUMENTS.get() or {}


@contextmanager
def _load_arguments(arguments: dict[str, Any]) -> Iterator[None]:
    token = _LOAD_ARGUMENTS.set(arguments)
    try:
        yield
    finally:
        _LOAD_ARGUMENTS.reset(token)


def install() -> None:
    """Wrap `from_pretrained`, `save_pretrained`, `push_to_hub` and what attaches PEFT's adapters; idempotent."""
    if hasattr(PreTrainedModel.from_pretrained, _ORIGINAL):
        return
    from_pretrained = PreTrainedModel.__dict__["from_pretrained"]
    PreTrainedModel.from_pretrained = classmethod(_marked(_from_pretrained, from_pretrained.__func__, from_pretrained))
    _wrap(PreTrainedModel, "save_pretrained", _save_pretrained)
    _wrap(PreTrainedModel, "push_to_hub", _push_to_hub)
    _wrap(PreTrainedModel, "resize_token_embeddings", _resize_token_embeddings)
    _wrap(PeftAdapterMixin, "add_adapter", _add_adapter)
    if "peft" in sys.modules:
        _wrap_peft()
    sys.meta_path.insert(0, _PEFT_FINDER)


def uninstall() -> None:
    """Undo `install`."""
    names = ("from_pretrained", "save_pretrained", "push_to_hub", "resize_token_embeddings")
    wrapped = [(PreTrainedModel, name) for name in names]
    wrapped += [(PeftAdapterMixin, "add_adapter"), *((owner, name) for owner, name, _ in _peft_methods())]
    for owner, name in wrapped:
        original = getattr(getattr(owner, name), _ORIGINAL, None)
        if original is not None:
            setattr(owner, name, original)
    if _PEFT_FINDER in sys.meta_path:
        sys.meta_path.remove(_PEFT_FINDER)


def _wrap(owner: type[Any], name: str, wrapper: Callable[..., Any]) -> None:
    original = owner.__dict__[name]
    if not hasattr(original, _ORIGINAL):
        setattr(owner, name, _marked(wrapper, original, original))


def _marked(wrapper: Callable[..., Any], function: Callable[..., Any], original: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, *args, **kwargs)

    setattr(wrapped, _ORIGINAL, original)
    return wrapped


def _from_pretrained(
    original: Callable[..., Any], cls: type[PreTrainedModel], name: Any = None, *args: Any, **kwargs: Any
) -> Any:
    recipe = kwargs.pop("compression_config", None)
    if getattr(kwargs.get("quantization_config"), "layout", None):
        raise ConfigurationError(
            "the quantization_config describes a finished checkpoint, whose own is read from its config.json: leave "
            "it out. What is to be done to a model is passed as compression_config=."
        )
    if recipe is not None:
        if kwargs.get("quantization_config") is not None:
            raise ConfigurationError("give either compression_config or quantization_config, not both.")
        recipe = CompressionConfig.wrap(recipe)
    elif _is_recipe(kwargs.get("quantization_config")):
        recipe = CompressionConfig.wrap(kwargs.pop("quantization_config"))
    if recipe is None:
        return _load_with_another(original, cls, name, *args, **kwargs)

    shared = {key: kwargs[key] for key in _SHARED_ARGUMENTS if kwargs.get(key) is not None}
    if _goes_on(name, kwargs.get("config"), shared, recipe):
        # The quantizer calls this module, so the engine cannot be imported above.
        from .engine.compress import compress

        loaded = original(cls, name, *args, **kwargs)
        with _load_arguments(shared):
            compress(loaded[0] if isinstance(loaded, tuple) else loaded, recipe, load_arguments=shared)
        return loaded
    if shared.get("gguf_file"):
        return _from_gguf(original, cls, name, args, kwargs, recipe, shared)
    with _load_arguments(shared):
        return original(cls, name, *args, quantization_config=recipe, **kwargs)


def _load_with_another(
    original: Callable[..., Any], cls: type[PreTrainedModel], name: Any, *args: Any, **kwargs: Any
) -> Any:
    """Load a checkpoint. Where it is one of ours and another quantization is asked for as well, say how: Transformers
    refuses or ignores that."""
    given = kwargs.get("quantization_config")
    try:
        return original(cls, name, *args, **kwargs)
    except ValueError as error:
        if given is None or "CompressedModelConfig" not in str(error):
            raise
        raise ConfigurationError(
            f"{name!r} is compressed already, and Transformers loads a model with one quantization_config, the "
            f"checkpoint's own. To go on with {type(given).__name__}, pass compression_config= in its place, which "
            "takes a recipe of hf_compress or a BitsAndBytesConfig."
        ) from error


def _is_recipe(config: Any) -> bool:
    """One of our configurations, or the dictionary of one."""
    if isinstance(config, dict):
        return "layout" not in config and ("stages" in config or "method" in config)
    return isinstance(config, (CompressionConfig, MethodConfig))


def _goes_on(name: Any, config: Any, shared: dict[str, Any], recipe: CompressionConfig) -> bool:
    """Whether a checkpoint is compressed and the recipe is for going on with it.

    Any other compressed checkpoint is refused here: Transformers would ignore the recipe with a warning.
    """
    from .engine.compress import continues

    if isinstance(config, (str, os.PathLike)):
        name, config = config, None
    if config is None and name is not None and not shared.get("gguf_file"):
        config = AutoConfig.from_pretrained(name, **shared)
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method != QUANT_METHOD:
        return False
    layout = stored.get("layout") if isinstance(stored, dict) else getattr(stored, "layout", None)
    if not continues(recipe, layout or []):
        raise ConfigurationError(
            f"{name!r} is compressed already, and a second compression on top of the first is not supported. Load it "
            "without a recipe, or compress its dense original with the stages that you want: "
            "compression_config=CompressionConfig(stages=[...])."
        )
    return True


def _from_gguf(
    original: Callable[..., Any],
    cls: type[PreTrainedModel],
    name: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recipe: CompressionConfig,
    shared: dict[str, Any],
) -> Any:
    """Transformers refuses a GGUF file together with a quantization: load it dequantized, then compress."""
    from transformers import GgufConfig

    # The engine reports through the quantizer, which imports this module.
    from .engine.compress import compress, prepare

    config = kwargs.get("config")
    if not isinstance(config, PretrainedConfig):
        config = cls.config_class.from_pretrained(config or name, **shared)
    with torch.device("meta"):
        skeleton = cls(copy.deepcopy(config), *args)
    # Whether the recipe can be met shows before the file is dequantized, which takes longest.
    prepare(skeleton, recipe)
    loaded = original(cls, name, *args, quantization_config=GgufConfig(dequantize=True), **kwargs)
    # With output_loading_info=True there is a dictionary beside the model.
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    compress(model, recipe, load_arguments=shared)
    return loaded


def _save_pretrained(
    original: Callable[..., Any],
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if UNFINISHED in model.__dict__:
        raise CheckpointError(
            "the compression of this model was interrupted or failed: some blocks are compressed and some are not. "
            "Load the dense model again and repeat the run."
        )
    if TRAINED not in model.__dict__ and any("pruning_mask" in module._buffers for module in model.modules()):
        warnings.warn(
            "the model holds masks of a pruning and is saved dense, with them. For a sparse file call finalize() of "
            "its Pruner or PruningCallback first; at the end of a training the callback does it.",
            stacklevel=4,
        )
    stored = getattr(model.config, "quantization_config", None)
    ours = getattr(stored, "quant_method", None) == QUANT_METHOD
    if ours and not layout_of(model) and not getattr(model, "_hf_peft_config_loaded", False):
        # A fresh model built from a compressed model's config is dense: a layout beside it would be a lie.
        del model.config.quantization_config
        ours = False
    if not (ours or _is_unsaved(model)) or getattr(model, "_hf_peft_config_loaded", False):
        return original(model, save_directory, *args, **kwargs)
    target = Path(save_directory)
    # Not every process of a distributed run writes, whatever it says of itself.
    writes_here = model.should_save_on_this_rank(kwargs.get("is_main_process", args[0] if args else True))
    if not writes_here or kwargs.get("push_to_hub") or kwargs.get("distributed_checkpoint") or target.is_file():
        result = original(model, save_directory, *args, **kwargs)
    else:
        target.mkdir(parents=True, exist_ok=True)
        # Inside the folder, so that moving the files never crosses to another file system.
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as scratch:
            result = original(model, scratch, *args, **kwargs)
            _move_into_place(Path(scratch), target, kwargs.get("variant"))
    # An adapter trained on this model must name the compressed checkpoint, not the dense base.
    model.name_or_path = model.config.name_or_path = os.fspath(save_directory)
    return result


def _is_unsaved(model: Any) -> bool:
    """A model that was compressed here and has no name of its own yet."""
    return isinstance(getattr(model, "compression_report", None), CompressionReport) and not model.name_or_path


def _push_to_hub(original: Callable[..., Any], model: PreTrainedModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    result = original(model, repo_id, *args, **kwargs)
    if layout_of(model):
        # The upload saved to a temporary folder; the model's name is the repository's.
        model.name_or_path = model.config.name_or_path = repo_id
    return result


def _resize_token_embeddings(
    original: Callable[..., Any], model: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Transformers would take packed codes for token vectors."""
    table = model.get_input_embeddings()
    if getattr(table, "packs_weight", False) and new_num_tokens not in (None, table.num_embeddings):
        raise CompressionError(
            f"the table of {table.num_embeddings} token vectors is kept as codes and cannot be resized to "
            f"{new_num_tokens}. Resize the dense model and compress that, or call dequantize() first."
        )
    return table if getattr(table, "packs_weight", False) else original(model, new_num_tokens, *args, **kwargs)


def _move_into_place(scratch: Path, target: Path, variant: str | None) -> None:
    """Put finished files where they belong: an interrupted save leaves what was there before.

    The config goes last, and shards of an earlier save go with it: together they say which weights are meant.
    """
    suffix = f"\\.{re.escape(variant)}" if variant else ""
    weight_file = re.compile(
        rf"model(-\d{{5}}-of-\d{{5}})?{suffix}(-\d{{5}}-of-\d{{5}})?\.safetensors|"
        rf"model\.safetensors\.index{suffix}\.json"
    )
    new = sorted(scratch.iterdir(), key=lambda file: file.name == "config.json")
    names = {file.name for file in new}
    for file in new:
        os.replace(file, target / file.name)
    for old in target.iterdir():
        if weight_file.fullmatch(old.name) and old.name not in names:
            old.unlink()


class _PeftFinder(MetaPathFinder):
    """Wraps PEFT when the user imports it. Importing it from here would cost seconds to those who do not use it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "peft" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                _wrap_peft()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_PEFT_FINDER = _PeftFinder()


def _peft_methods() -> list[tuple[type[Any], str, Callable[..., Any]]]:
    """What `peft.get_peft_model` and `PeftModel.from_pretrained` build, and what every merge asks first; none before
    the user has imported PEFT."""
    peft = sys.modules.get("peft")
    names = [name for name in ("PeftModel", "PeftMixedModel") if hasattr(peft, name)]
    found: list[tuple[type[Any], str, Callable[..., Any]]] = [
        (getattr(peft, name), "__init__", _init_peft_model) for name in names
    ]
    utilities = sys.modules.get("peft.tuners.tuners_utils")
    if utilities is not None:
        found.append((utilities.BaseTuner, "_check_merge_allowed", _check_merge_allowed))
    return found


def _wrap_peft() -> None:
    for owner, name, wrapper in _peft_methods():
        _wrap(owner, name, wrapper)


def _check_merge_allowed(original: Callable[..., Any], tuner: Any) -> None:
    """An adapter cannot be added to weights that are codes; PEFT itself would stop at their shape."""
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
            f"the adapter cannot be merged: {packed!r} keeps its weights as codes. Keep the adapter beside the "
            "compressed model, or call dequantize() on the compressed model before the adapter is attached."
        )
    original(tuner)


def _init_peft_model(
    original: Callable[..., Any], peft_model: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any
) -> None:
    _refuse_on_codes(model, peft_config)
    # An adapter that was trained before and is loaded here has a name of its base already.
    if not peft_config.base_model_name_or_path:
        _warn_if_unsaved(model)
    original(peft_model, model, peft_config, *args, **kwargs)


def _add_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
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
    if _is_unsaved(model):
        warnings.warn(
            "the adapter is attached to a compressed model that has not been saved, so it cannot name the model that "
            "it belongs to. Call model.save_pretrained(...) first: the adapter then names the compressed checkpoint.",
            stacklevel=4,
        )
