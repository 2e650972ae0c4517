"""Small checkpoints of every module type, and what becomes of one that somebody has tampered with."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import ALL_KINDS, FAMILIES, VOCABULARY, calibration, recipe
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    PreTrainedModel,
    ResNetConfig,
)

import hf_compress
from hf_compress import CodebookConfig, CompressionConfig, CompressionError, LayerSharingConfig, PruningConfig


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint.

    Args:
        dense: makes the model.
        recipe: makes what is done to it.
        auto_class: loads it.
    """

    dense: Callable[[], PreTrainedModel]
    recipe: Callable[[], Any]
    auto_class: str = "AutoModelForCausalLM"


def _language_model(family: str = "llama", **fields: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = FAMILIES[family]()
        for name, value in {"num_hidden_layers": 2, **fields}.items():
            setattr(config, name, value)
        return AutoModelForCausalLM.from_config(config).eval()

    return build


def _gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 0
    return AutoModelForCausalLM.from_config(config).eval()


def _albert() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    config = AlbertConfig(vocab_size=VOCABULARY, embedding_size=16, num_hidden_layers=4, num_hidden_groups=2, **sizes)
    return AutoModelForMaskedLM.from_config(config).eval()


def _resnet() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 32], depths=[1, 1], layer_type="basic")
    return AutoModel.from_config(config).eval()


def _pruned(sparsity: float, **fields: Any) -> PruningConfig:
    return PruningConfig(sparsity=sparsity, criterion="magnitude", **fields)


def _coded(bits: Any = 3, **fields: Any) -> CodebookConfig:
    return CodebookConfig(bits=bits, learning="none", rows_per_codebook=8, **fields)


def _after(first: Any, second: Any) -> CompressionConfig:
    return CompressionConfig(stages=[first, second], calibration=calibration())


_TABLES = {"mlp": 3, "query_key": 4, "value_output": 1.58, "embedding": 4}
_LOOPS: dict[str, Any] = {"unique_layers": 1, "lora_rank": 2}

KINDS: dict[str, Kind] = {
    "modular": Kind(_language_model(), lambda: recipe(kinds=ALL_KINDS)),
    "modular, norms of heads": Kind(
        _language_model("qwen3", layer_types=["full_attention"] * 2), lambda: recipe(kinds=ALL_KINDS)
    ),
    "modular, coded": Kind(_language_model(), lambda: _after(recipe(kinds=ALL_KINDS), _coded())),
    "modular, pruned": Kind(_language_model(), lambda: _after(recipe(kinds=ALL_KINDS), _pruned(0.95))),
    "coded, tied": Kind(_language_model(tie_word_embeddings=True), lambda: _coded(_TABLES)),
    "coded, trained": Kind(
        _language_model(), lambda: _coded(2, trainable_codebooks=True, integer_scales=False, column_group=None)
    ),
    "coded GPT-2": Kind(_gpt2, lambda: _coded(2)),
    "coded convolutions": Kind(_resnet, lambda: _coded(3), "AutoModel"),
    "pruned, gaps": Kind(_language_model("llama_bias"), lambda: _pruned(0.95)),
    "pruned, mask in int8": Kind(_language_model(), lambda: _pruned(0.6, values="int8")),
    "pruned, heads": Kind(_language_model(), lambda: _pruned(0.3, structured=True)),
    "shared": Kind(_language_model(num_hidden_layers=4), lambda: LayerSharingConfig(**_LOOPS, inference_iterations=3)),
    "shared with norms": Kind(_language_model("llama_bias"), lambda: LayerSharingConfig(**_LOOPS, share_norms=True)),
    "shared, coded": Kind(_language_model(), lambda: _after(LayerSharingConfig(**_LOOPS), _coded())),
    "ALBERT": Kind(_albert, lambda: LayerSharingConfig(inference_iterations=2), "AutoModelForMaskedLM"),
    "bitsandbytes, 4 bits": Kind(
        _language_model(), lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    ),
    "bitsandbytes, 8 bits": Kind(_language_model(), lambda: BitsAndBytesConfig(load_in_8bit=True)),
}


def save(name: str, folder: Path) -> None:
    """Make and save the checkpoint of a kind."""
    kind = KINDS[name]
    hf_compress.compress(kind.dense(), CompressionConfig.wrap(kind.recipe())).save_pretrained(folder)


def run(model: PreTrainedModel, name: str) -> torch.Tensor:
    """One forward pass."""
    if KINDS[name].auto_class == "AutoModel":
        inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}
    else:
        inputs = {"input_ids": torch.arange(12).view(2, 6) % VOCABULARY}
    with torch.no_grad():
        output = model(**inputs)
    found: torch.Tensor = output[0]
    return found


def attempt(folder: Path, name: str) -> tuple[str, str]:
    """Load a checkpoint that may be damaged, run it and print its report: what happened, and the error's class.

    Returns:
        `("loaded", "")`; `("refused", ...)`, by us or by the libraries below before or after our code;
        `("forward raised", ...)` with a clean exception; `("unclean", ...)` for an error of another kind that went
        through our code while the model was loaded or its report printed.
    """
    try:
        model = getattr(transformers, KINDS[name].auto_class).from_pretrained(folder)
    except CompressionError as error:
        return "refused", type(error).__name__
    except Exception as error:  # whatever the libraries raise is a refusal, if it did not come out of our code
        return ("unclean" if _ours(error) else "refused"), _described(error)
    try:
        str(model.compression_report)
    except Exception as error:
        return "unclean", f"report: {_described(error)}"
    try:
        run(model, name)
    except Exception as error:  # sizes that fit the file and not each other
        return "forward raised", type(error).__name__
    return "loaded", ""


def _ours(error: BaseException) -> bool:
    package = Path(hf_compress.__file__).parent
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(package in file.parents and file.name != "integration.py" for file in frames)


def _described(error: BaseException) -> str:
    if not _ours(error):
        return f"{type(error).__module__}.{type(error).__qualname__}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__qualname__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:200]}"
