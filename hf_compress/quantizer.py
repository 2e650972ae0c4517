"""The quantizer that Transformers calls: replays a layout before loading, compresses after loading."""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.output_capturing import OutputRecorder, install_output_capuring_hook
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checked import DEPTH, is_integer, is_nested_deeper, short
from .configuration import QUANT_METHOD, CompressionConfig
from .engine.compress import compress, prepare
from .engine.placement import refuse_sharded_loading, refuse_unfit_training
from .errors import CheckpointError, CompressionError
from .integration import commit_of, current_load_arguments
from .layout import (
    FORMAT_VERSION,
    check_loaded,
    check_tensors,
    compressed_modules,
    disconnect,
    dtypes_of,
    layout_of,
    replay,
)
from .provenance import report_in
from .saved_names import accept_saved_names
from .saving import kept_beside_parameters, state_to_save


class CompressedModelConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What a compressed checkpoint's `config.json` holds under `quantization_config`.

    Args:
        format_version: of the layout and the tensors; a newer one than this package knows is refused.
        recipe: what was done, the stages' configurations as JSON.
        layout: the replaced modules; derived from the live model whenever it is saved.
        provenance: what was measured and hashed: base, calibration data, versions, report. Unknown parts are kept.
    """

    def __init__(
        self,
        /,
        recipe: Any = None,
        layout: Any = None,
        provenance: Any = None,
        format_version: Any = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if not is_integer(format_version, 1, FORMAT_VERSION):
            raise CheckpointError(
                f"the checkpoint has format_version {short(format_version)}, this hf_compress knows up to "
                f"{FORMAT_VERSION}. Update hf_compress to load it."
            )
        if unknown:
            raise CheckpointError(f"unknown fields {short(sorted(unknown))} in the checkpoint's quantization_config.")
        for name, value in (("recipe", recipe), ("layout", layout), ("provenance", provenance)):
            kind = list if name == "layout" else dict
            if value is not None and not isinstance(value, kind):
                raise CheckpointError(
                    f"the checkpoint's `{name}` is a {type(value).__name__}, expected a {kind.__name__}: it is "
                    "damaged. Download or compress again."
                )
            if is_nested_deeper(value):
                raise CheckpointError(
                    f"the checkpoint's `{name}` is nested deeper than {DEPTH} levels, which hf_compress never writes: "
                    "it is damaged. Download or compress again."
                )
        self.quant_method = quant_method
        self.format_version = format_version
        self.recipe = recipe or {}
        self.layout = layout or []
        self.provenance = provenance or {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "recipe": self.recipe,
            "layout": self.layout,
            "provenance": self.provenance,
        }


class CompressionQuantizer(HfQuantizer):  # type: ignore[misc]
    """Serves `from_pretrained` for compressed checkpoints and for recipes given as `quantization_config`."""

    requires_calibration = False
    _dtypes: dict[str, torch.dtype]
    # Whether the model keeps tensors that are no parameters.
    _packed = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        # All of these raise before any weight is read.
        if self.pre_quantized:
            refuse_unfit_training(None, packed=False)
        else:
            refuse_sharded_loading({})
            # A recipe's dictionary or object.
            CompressionConfig.wrap(self.quantization_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            strange = [file for file in kwargs.get("checkpoint_files") or [] if not str(file).endswith(".safetensors")]
            if strange:
                # Transformers also reads files that are pickled.
                raise CheckpointError(
                    f"the tensors of the compressed checkpoint are in {os.path.basename(strange[0])!r}, expected "
                    "safetensors. Compress again, or ask its author for that format."
                )
            replay(model, self.quantization_config.layout)
            refuse_unfit_training(model, packed=bool(kept_beside_parameters(model)))
            self._dtypes = dtypes_of(model)
            if any(getattr(module, "has_trainable_tables", False) for module in model.modules()):
                # Tables that are trained stay in float32, whatever the model's dtype.
                model._keep_in_fp32_modules_strict |= {"codebooks", "scales", "row_scales"}
        else:
            commit = commit_of(current_load_arguments())
            if commit is not None:
                # For the provenance. Transformers leaves it out of every file.
                model.config._commit_hash = commit
            # The skeleton tells whether the recipe can be met, before any weight is read.
            prepare(model, CompressionConfig.wrap(self.quantization_config))
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What a tensor of the file is cast to. Floats where codes or positions belong are left as they are, for
        `check_loaded` to refuse: a cast would make garbage of them."""
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new if new is None or new.is_floating_point else None

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            check_loaded(model, self._dtypes)
            check_tensors(model)
            self.attach(model)
            return model
        recipe = self.quantization_config
        # From here on the model is dense and plain until `compress` attaches a quantizer for the result.
        self.remove_quantization_config(model)
        compress(model, recipe, load_arguments=current_load_arguments())
        return model

    def attach(self, model: PreTrainedModel) -> None:
        """Make `model` a compressed one for Transformers: saved with its layout, trainable, castable."""
        model.hf_quantizer = self
        model.config.quantization_config = self.quantization_config
        model.quantization_method = QUANT_METHOD
        # Transformers refuses `.half()` and `.float()` where this is true; our tensors are cast like any others.
        model.is_quantized = False
        self._packed = bool(kept_beside_parameters(model))
        model._ddp_params_and_buffers_to_ignore = _constant_buffers(model)
        accept_saved_names(model)
        if not hasattr(model, "compression_report"):
            model.compression_report = report_in(self.quantization_config.provenance)
        for path, module in list(model.named_modules()):
            for name, value in getattr(module, "model_flags", {}).items():
                setattr(model, name, value)
            for name, function in getattr(module, "model_methods", {}).items():
                setattr(model, name, MethodType(function, model))
            _record_outputs(model, path, module, getattr(module, "recorded_outputs", ()))

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Called first in `save_pretrained`: the layout is derived afresh from what the model is now.

        Returns:
            The tensors to write, the caller's if there are any (of a model that FSDP has divided only he has them
            whole); `None` for the model's own.

        Raises:
            CheckpointError: see `state_to_save`.
        """
        state = state_to_save(model)
        stored = model.config.quantization_config
        stored.layout = layout_of(model)
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """The Trainer asks this before it starts. Raises `ConfigurationError` for what it cannot train."""
        refuse_unfit_training(None, packed=self._packed)
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Dense modules of the original sizes in place of ours; the same function, without the savings."""
        if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values()):
            raise CompressionError("an offloaded model cannot be made dense in place. Save it, and load it whole.")
        with torch.device("meta"):
            skeleton = type(model)(model.config)
        packed = _make_inner_layers_plain(model)
        states: dict[str, dict[str, torch.Tensor]] = {}
        for entry in layout_of(model):
            path = entry["path"]
            try:
                states[path] = model.get_submodule(path).dequantize(skeleton.get_submodule(path))
            except NotImplementedError as error:
                for inner, layer in packed.items():
                    model.set_submodule(inner, layer)
                raise CompressionError(f"{path}: {error}") from error
        # Transformers writes the config's dtype as a string when it saves, and hands it in where none is asked for:
        # then the model stays in the dtype that it has now.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        configured = model.config.dtype
        if dtype == (getattr(torch, configured) if isinstance(configured, str) else configured):
            dtype = None
        for path, state in states.items():
            module, dense = model.get_submodule(path), skeleton.get_submodule(path)
            # Packed tensors have formats of their own: then the model's dtype is the one they were made from.
            own = next((parameter.dtype for parameter in module.parameters()), model.dtype)
            own = model.dtype if any(getattr(part, "packs_weight", False) for part in module.modules()) else own
            dense.to(own).to_empty(device=state["weight"].device if "weight" in state else model.device)
            dense.load_state_dict(state)
            restore = getattr(module, "restore_buffers", None)
            if restore is not None:
                restore(dense)
            model.set_submodule(path, dense.train(module.training))
            _record_outputs(model, path, dense, getattr(module, "recorded_outputs", ()))
        disconnect(model)
        return model if dtype is None else model.to(dtype)


def _constant_buffers(model: PreTrainedModel) -> list[str]:
    """The names under which DDP may find the buffers of our modules, with and without PEFT around them.

    By default it sends all buffers to all processes before every step. Ours never change in a training, and some are
    int16, which neither gloo nor NCCL sends.
    """
    names = []
    for path, module in compressed_modules(model):
        for buffer in module._buffers:
            inner = (f"{path}.{buffer}", f"{path}.base_layer.{buffer}")
            names += [*inner, *(f"base_model.model.{name}" for name in inner)]
    return names


def _make_inner_layers_plain(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Dense layers in place of packed ones inside a module that has been replaced as a whole: it puts together its own
    dense form from theirs. Returns what stood in their places."""
    packed: dict[str, nn.Module] = {}
    paths = {entry["path"]: entry["type"] for entry in layout_of(model)}
    for path in paths:
        outer = next((other for other in paths if path.startswith(f"{other}.") and paths[other] == "attention"), None)
        layer: Any = model.get_submodule(path)
        if outer is None or not isinstance(layer, nn.Linear):
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        dequantize: Any = layer.dequantize
        state: dict[str, torch.Tensor] = dequantize(plain)
        dtype = model.dtype if layer.bias is None else layer.bias.dtype
        plain = plain.to(dtype).to_empty(device=state["weight"].device)
        plain.load_state_dict(state)
        packed[path] = layer
        model.set_submodule(path, plain.train(layer.training))
    return packed


def _record_outputs(model: PreTrainedModel, path: str, module: nn.Module, outputs: tuple[str, ...]) -> None:
    """Let `output_attentions=True` find a module that has taken the place of another.

    Transformers hooks the modules that stand in a table of the class of the model they are in, by their class and,
    where a block has several of it, by a part of their path; once, when outputs are first asked for. As its own
    `patch_output_recorders` does, this changes the table for all models of the class; those without modules of ours do
    not notice.
    """
    names = path.split(".")
    owners = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    owner = next(part for part in reversed(owners) if isinstance(part, PreTrainedModel))
    table, dense_class = owner.can_record_outputs, getattr(module, "dense_class", type(module))
    for output in outputs:
        known = table.get(output, [])
        known = known if isinstance(known, list) else [known]
        layers = [str(getattr(entry, "layer_name", None) or path).strip(".") for entry in known]
        here = [entry for entry, layer in zip(known, layers, strict=True) if f".{layer}." in f".{path}."]
        own = [entry for entry in here if _records(entry, type(module))]
        fitting = [entry for entry in here if _records(entry, dense_class)]
        if fitting and not own:
            layer = getattr(fitting[0], "layer_name", None)
            own = [OutputRecorder(target_class=type(module), index=1, layer_name=layer)]
            table[output] = [*known, *own]
        hooked = any(
            getattr(hook, "__name__", "") == "output_capturing_hook" for hook in module._forward_hooks.values()
        )
        if own and not hooked and getattr(owner, "_output_capturing_hooks_installed", False):
            install_output_capuring_hook(module, output, index=1)


def _records(entry: Any, kind: type[nn.Module]) -> bool:
    """Whether an entry of a table, a class, its name or more about it, means modules of a class."""
    name = entry if isinstance(entry, str) else getattr(entry, "class_name", None)
    target = getattr(entry, "target_class", entry)
    return (isinstance(target, type) and issubclass(kind, target)) or (name is not None and kind.__name__ in name)


def register() -> None:
    """Make the method known to Transformers; a second call changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = CompressedModelConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = CompressionQuantizer


def is_compressed(model: nn.Module) -> bool:
    """Whether a model holds modules of ours."""
    return bool(layout_of(model))


__all__ = ["CompressedModelConfig", "CompressionQuantizer", "is_compressed", "register"]
