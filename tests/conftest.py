"""Tiny random models of every family, and what the tests share."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from calibration_helpers import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from typechecking import checked_imports

# The shapes in the annotations are checked at run time wherever the tests go.
with checked_imports("hf_compress"):
    import hf_compress
    from hf_compress import (
        CalibrationConfig,
        CodebookConfig,
        LayerSharingConfig,
        ModularDecompositionConfig,
        PruningConfig,
    )

# Tiny models gain nothing from threads, and processes with two each on two cores crawl. Also for processes of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

VOCABULARY = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16}
_WITHOUT_HEAD_DIM = {name: value for name, value in _GROUPED.items() if name != "head_dim"} | {"hidden_size": 64}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "llama_bias": lambda: LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_WITHOUT_HEAD_DIM),
    "qwen3": lambda: Qwen3Config(**_GROUPED),
    "smollm3": lambda: SmolLM3Config(**_WITHOUT_HEAD_DIM, no_rope_layer_interval=2, use_sliding_window=False),
    "gemma2": lambda: Gemma2Config(**_GROUPED, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(
        **_GROUPED,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "opt": lambda: OPTConfig(
        **{**_COMMON, "hidden_size": 64}, ffn_dim=64, word_embed_proj_dim=64, dropout=0.0, activation_dropout=0.0
    ),
}
# Their MLPs are experts, of which a router chooses: for the battery.
EXPERTS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_GROUPED, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48),
}


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny random model whose biases and norm weights are random too: zeros would hide mistakes."""
    torch.manual_seed(seed)
    config = {**FAMILIES, **EXPERTS}[family]()
    attention = "eager" if family == "gemma2" else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    if family in EXPERTS and dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch has no grouped product of it
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)
    return model.eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one at the end."""
    first = ("test_real_model.py", "test_examples.py", "test_families.py", "test_streaming.py", "test_distributed.py")
    items.sort(key=lambda item: item.path.name not in first)


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """For calls with arguments of the wrong type on purpose, and for torch.compile, which cannot trace the checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    return make_model(family)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A folder with a dense Llama."""
    make_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def interrupt(*args: Any, **kwargs: Any) -> None:
    """In place of a function: the user has pressed Ctrl-C."""
    raise KeyboardInterrupt


def token_ids(count: int = 24, length: int = 32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


IDS = token_ids(3, 20, seed=5)


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids, **kwargs).logits
    return result


def calibration(**fields: Any) -> CalibrationConfig:
    return CalibrationConfig(token_ids(), **{"num_samples": 20, "num_held_out": 4, "batch_size": 8, **fields})


def recipe(**fields: Any) -> ModularDecompositionConfig:
    defaults: dict[str, Any] = {"reduction": 0.25, "calibration": calibration()}
    return ModularDecompositionConfig(**{**defaults, **fields})


ALL_KINDS = ("mlp", "query_key", "value_output")


def compressed(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    fields = {"kinds": ALL_KINDS, **fields}
    return hf_compress.compress(make_model(family, dtype), recipe(**fields))


# Every method with a recipe that touches all it can, for the battery.
METHODS: dict[str, Callable[[], Any]] = {
    "modular": lambda: recipe(kinds=ALL_KINDS),
    "codebook": lambda: CodebookConfig(bits=3, rows_per_codebook=8, calibration=calibration()),
    "sharing": lambda: LayerSharingConfig(unique_layers=2, lora_rank=2),
    "pruning": lambda: PruningConfig(sparsity=0.8, scope="layer", calibration=calibration()),
}


@functools.cache
def _compressed_once(method: str, family: str, dtype: torch.dtype) -> PreTrainedModel:
    return hf_compress.compress(make_model(family, dtype), METHODS[method]())


def compress_with(method: str, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A copy of its own of a compressed model; the compression itself is done once a session."""
    return copy.deepcopy(_compressed_once(method, family, dtype))
