"""The only wrappers round Transformers: small, idempotent, reversible, acting only where our recipes or models are."""

from __future__ import annotations

import copy
import functools
import os
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
from transformers import AutoConfig, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations import PeftAdapterMixin
from transformers.utils import PushToHubMixin
from transformers.utils.hub import resolve_revision

from . import adapters
from .configuration import QUANT_METHOD, CompressionConfig, MethodConfig
from .engine.placement import refuse_sharded_loading
from .errors import CheckpointError, CompressionError, ConfigurationError
from .layout import MASKED, TRAINED, UNFINISHED, check_layout, layout_of
from .saving import keep_state_dict, move_into_place

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
# Attribute of a model: the folder that it was loaded from. Never saved.
SOURCE = "_hf_compress_source"
_TRAINER = "transformers.trainer"
# Attribute of a wrapper: what stood in its place.
_ORIGINAL = "_hf_compress_original"
_LOAD_ARGUMENTS: ContextVar[dict[str, Any] | None] = ContextVar("load_arguments", default=None)


def current_load_arguments() -> dict[str, Any]:
    """Where the model now being loaded comes from: the arguments that its tokenizer is loaded with."""
    return _LOAD_ARGUMENTS.get() or {}


def commit_of(arguments: dict[str, Any]) -> str | None:
    """The commit of a model on the Hub that is loaded with these arguments of `from_pretrained`."""
    return getattr(arguments.get("revision"), "resolved", None)


@contextmanager
def _load_arguments(arguments: dict[str, Any]) -> Iterator[None]:
    token = _LOAD_ARGUMENTS.set(arguments)
    try:
        yield
    finally:
        _LOAD_ARGUMENTS.reset(token)


def install() -> None:
    """Wrap `from_pretrained`, `save_pretrained`, the ways to the Hub and what attaches PEFT's adapters; idempotent."""
    if hasattr(PreTrainedModel.from_pretrained, _ORIGINAL):
        return
    from_pretrained = PreTrainedModel.__dict__["from_pretrained"]
    PreTrainedModel.from_pretrained = classmethod(_marked(_from_pretrained, from_pretrained.__func__, from_pretrained))
    _wrap(PreTrainedModel, "save_pretrained", _save_pretrained)
    _wrap(PreTrainedModel, "push_to_hub", _at_door("push_to_hub"))
    _wrap(PushToHubMixin, "_upload_modified_files", _at_door("upload_modified_files"))
    _wrap(PreTrainedModel, "resize_token_embeddings", _resize_token_embeddings)
    _wrap(PeftAdapterMixin, "add_adapter", adapters.add_adapter)
    _wrap_late()
    sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Undo `install`."""
    names = ("from_pretrained", "save_pretrained", "push_to_hub", "resize_token_embeddings")
    wrapped = [(PreTrainedModel, name) for name in names]
    wrapped += [(PeftAdapterMixin, "add_adapter"), (PushToHubMixin, "_upload_modified_files")]
    wrapped += [(owner, name) for owner, name, _ in _late_methods()]
    for owner, name in wrapped:
        original = getattr(getattr(owner, name), _ORIGINAL, None)
        if original is not None:
            setattr(owner, name, original)
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


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
    local = isinstance(name, (str, os.PathLike)) and os.path.isdir(name)
    subfolder = kwargs.get("subfolder") or ""
    if name is not None and not local:
        # Transformers does this as well and keeps what it finds to itself; a push names the commit of the base.
        where = {key: kwargs[key] for key in ("token", "local_files_only", "cache_dir") if kwargs.get(key) is not None}
        kwargs["revision"] = resolve_revision(name, kwargs.get("revision"), **where)
    loaded = _load_or_compress(original, cls, name, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if local:
        # A push looks there for the tokenizer.
        model.__dict__[SOURCE] = os.path.join(name, subfolder)
    elif (commit := commit_of(kwargs)) is not None:
        model.config._commit_hash = commit
    return loaded


def _load_or_compress(
    original: Callable[..., Any], cls: type[PreTrainedModel], name: Any, *args: Any, **kwargs: Any
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

    refuse_sharded_loading(kwargs)
    shared = {key: kwargs[key] for key in _SHARED_ARGUMENTS if kwargs.get(key) is not None}
    if _goes_on(name, kwargs.get("config"), shared, recipe):
        # The quantizer calls this module, so the engine cannot be imported above.
        from .engine.compress import compress

        loaded = original(cls, name, *args, **kwargs)
        with _load_arguments(shared):
            compress(loaded[0] if isinstance(loaded, tuple) else loaded, recipe, load_arguments=shared)
        return loaded
    if shared.get("gguf_file"):
        options = {**kwargs, "quantization_config": GgufConfig(dequantize=True)}
        return _load_then_compress(original, cls, name, args, options, recipe, shared)
    if kwargs.get("device_map") is not None:
        # Accelerate's hooks, which know where offloaded weights are, come after Transformers asks its quantizer.
        return _load_then_compress(original, cls, name, args, kwargs, recipe, shared)
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
    from .engine.order import continues

    if isinstance(config, (str, os.PathLike)):
        name, config = config, None
    if config is None and name is not None and not shared.get("gguf_file"):
        config = AutoConfig.from_pretrained(name, **shared)
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method != QUANT_METHOD:
        return False
    layout: Any = stored.get("layout") if isinstance(stored, dict) else getattr(stored, "layout", None)
    check_layout(layout)
    if not continues(recipe, layout):
        raise ConfigurationError(
            f"{name!r} is compressed already, and a second compression on top of the first is not supported. Load it "
            "without a recipe, or compress its dense original with the stages that you want: "
            "compression_config=CompressionConfig(stages=[...])."
        )
    return True


def _load_then_compress(
    original: Callable[..., Any],
    cls: type[PreTrainedModel],
    name: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recipe: CompressionConfig,
    shared: dict[str, Any],
) -> Any:
    """Load a dense model and compress it then: one of a GGUF file, which Transformers refuses together with a
    quantization, or one that Accelerate places."""
    # The engine reports through the quantizer, which imports this module.
    from .engine.compress import compress, prepare

    config = kwargs.get("config")
    if not isinstance(config, PretrainedConfig):
        config = cls.config_class.from_pretrained(config or name, **shared)
    with torch.device("meta"):
        skeleton = cls(copy.deepcopy(config), *args)
    # Whether the recipe can be met shows before the weights are read, which takes longest.
    prepare(skeleton, recipe)
    loaded = original(cls, name, *args, **kwargs)
    # With output_loading_info=True there is a dictionary beside the model.
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    if (commit := commit_of(shared)) is not None:
        model.config._commit_hash = commit
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
    masked = any("pruning_mask" in module._buffers for module in model.modules())
    if masked and TRAINED not in model.__dict__:
        warnings.warn(
            "the model holds masks of a pruning and is saved dense, with them. For a sparse file call finalize() of "
            "its Pruner or PruningCallback first; at the end of a training the callback does it.",
            stacklevel=4,
        )
    # In the file, where from_pretrained finds no masks again; models in memory may share a configuration.
    model.config.__dict__.pop(MASKED, None)
    if masked:
        setattr(model.config, MASKED, True)
    try:
        return _save_whole(original, model, save_directory, *args, **kwargs)
    finally:
        model.config.__dict__.pop(MASKED, None)


def _save_whole(
    original: Callable[..., Any],
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if getattr(model.config, "auto_map", None):
        from .hub.shim import forget_shim

        # Only a push puts the shim beside the config that names it.
        forget_shim(model.config)
    if (kwargs.get("push_to_hub") or args[2:3] == (True,)) and not kwargs.get("distributed_checkpoint"):
        from .hub.doors import known, save_and_push

        if known(model) is not None:
            # A whole folder first: whatever becomes of the upload, it stays.
            save = functools.partial(_save_pretrained, original, model)
            return save_and_push(save, model, save_directory, *args, **kwargs)
    original = functools.partial(keep_state_dict, original)
    stored = getattr(model.config, "quantization_config", None)
    ours = getattr(stored, "quant_method", None) == QUANT_METHOD
    if ours and not layout_of(model) and not getattr(model, "_hf_peft_config_loaded", False):
        # A fresh model built from a compressed model's config is dense: a layout beside it would be a lie.
        del model.config.quantization_config
        ours = False
    kept = ours or adapters.is_unsaved(model) or "compression_record" in model.__dict__
    if not kept or getattr(model, "_hf_peft_config_loaded", False):
        return original(model, save_directory, *args, **kwargs)
    target = Path(save_directory)
    # Not every process of a distributed run writes, whatever it says of itself.
    writes_here = model.should_save_on_this_rank(kwargs.get("is_main_process", args[0] if args else True))
    if not writes_here or kwargs.get("distributed_checkpoint") or target.is_file():
        result = original(model, save_directory, *args, **kwargs)
    else:
        target.mkdir(parents=True, exist_ok=True)
        # Inside the folder, so that moving the files never crosses to another file system.
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as scratch:
            result = original(model, scratch, *args, **kwargs)
            move_into_place(Path(scratch), target, kwargs.get("variant"))
        if not ours:
            from .hub.publish import keep_report

            keep_report(model, target)
    # An adapter trained on this model must name the compressed checkpoint, not the dense base.
    model.name_or_path = model.config.name_or_path = os.fspath(save_directory)
    return result


def _at_door(name: str) -> Callable[..., Any]:
    """A function of `hub.doors`, imported when it is first needed: most programs never go to the Hub."""

    def door(*args: Any, **kwargs: Any) -> Any:
        from .hub import doors

        return getattr(doors, name)(*args, **kwargs)

    return door


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


class _Finder(MetaPathFinder):
    """Wraps PEFT and the Trainer when the user imports them. Importing them from here would cost seconds to those who
    do not use them."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in ("peft", _TRAINER) else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                _wrap_late()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_FINDER = _Finder()


def _late_methods() -> list[tuple[type[Any], str, Callable[..., Any]]]:
    """What `peft.get_peft_model` and `PeftModel.from_pretrained` build, what every merge asks first, and a Trainer's
    ways to the Hub; none before the user has imported PEFT and the Trainer."""
    peft = sys.modules.get("peft")
    names = [name for name in ("PeftModel", "PeftMixedModel") if hasattr(peft, name)]
    found: list[tuple[type[Any], str, Callable[..., Any]]] = [
        (getattr(peft, name), "__init__", adapters.init_peft_model) for name in names
    ]
    utilities = sys.modules.get("peft.tuners.tuners_utils")
    if utilities is not None:
        found.append((utilities.BaseTuner, "_check_merge_allowed", adapters.check_merge_allowed))
    trainer = getattr(sys.modules.get(_TRAINER), "Trainer", None)
    if trainer is not None:
        found += [
            (trainer, "push_to_hub", _at_door("trainer_push_to_hub")),
            (trainer, "create_model_card", _at_door("create_model_card")),
            (trainer, "_push_from_checkpoint", _at_door("push_from_checkpoint")),
        ]
    return found


def _wrap_late() -> None:
    for owner, name, wrapper in _late_methods():
        _wrap(owner, name, wrapper)
