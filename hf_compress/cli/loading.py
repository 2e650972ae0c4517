"""Loading models and tokenizers for the commands, with errors that name what was asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..errors import CompressionError, ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    of_any_class: bool = False,
) -> PreTrainedModel:
    """A causal language model from a folder or the Hub; one from a GGUF file is unpacked and is a plain model after.

    Args:
        of_any_class: the class that the checkpoint's config names, such as that of an encoder, where there is one.

    Raises:
        ConfigurationError: for an unknown dtype, a folder that is not there, or a model that cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    if dtype not in DTYPES:
        raise ConfigurationError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}.")
    check_source(name, gguf_file)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "revision": revision}
    if device_map is not None:
        options["device_map"] = device_map
    if gguf_file is not None:
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    kind = _declared_class(name, revision) if of_any_class and gguf_file is None else AutoModelForCausalLM
    # Transformers drops the GGUF quantizer from a model that it has unpacked.
    return load_with(kind, name, options)


def _declared_class(name: str, revision: str | None) -> Any:
    import transformers

    config = load_with(transformers.AutoConfig, name, {"revision": revision})
    for declared in config.architectures or ():
        kind = getattr(transformers, declared, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    return transformers.AutoModelForCausalLM


def load_processing_class(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The model's tokenizer or, of a model of images, its image processor.

    Raises:
        ConfigurationError: where there is neither.
    """
    from transformers import AutoImageProcessor

    try:
        return load_tokenizer(name, revision=revision, gguf_file=gguf_file)
    except ConfigurationError as no_tokenizer:
        try:
            return load_with(AutoImageProcessor, name, {"revision": revision})
        except ConfigurationError:
            raise no_tokenizer from None


def load_tokenizer(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The model's tokenizer; raises `ConfigurationError` where there is none."""
    from transformers import AutoTokenizer

    check_source(name, gguf_file)
    options = {"revision": revision} | ({} if gguf_file is None else {"gguf_file": gguf_file})
    return load_with(AutoTokenizer, name, options)


def is_compressed(name: str, revision: str | None = None) -> bool:
    """Whether a model's config says that it is quantized or compressed already."""
    from transformers import AutoConfig

    return getattr(load_with(AutoConfig, name, {"revision": revision}), "quantization_config", None) is not None


def check_source(name: str, gguf_file: str | None = None) -> None:
    """Raise `ConfigurationError`, before anything is loaded, for a folder that is not there or holds no model."""
    if os.path.isdir(name):
        wanted = gguf_file or "config.json"
        if not os.path.isfile(os.path.join(name, wanted)):
            raise ConfigurationError(f"could not load {name!r}: the folder holds no {wanted}.")
        return
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or (os.sep != "/" and os.sep in name):
        raise ConfigurationError(f"no folder {name!r}; give a folder that holds a model, or a model id of the Hub.")


def load_with(auto_class: Any, name: str, options: dict[str, Any]) -> Any:
    """What an auto class loads; raises `ConfigurationError` where it cannot."""
    try:
        return auto_class.from_pretrained(name, **options)
    except CompressionError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(f"could not load {name!r}: {reason}") from error


def weights_folder(name: str, revision: str | None = None) -> str | None:
    """The folder of a model that was loaded: its own, or the one in the Hub's cache; None where there is neither."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
