"""torch.compile with inductor, its default back end, on a compressed model that generates with a static cache."""

from __future__ import annotations

import pytest
import torch
from compiling import needs_cpp_compiler
from conftest import recipe, token_ids
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, PreTrainedModel

import hf_compress
from hf_compress.methods.modular.modules import DecomposedAttention

pytestmark = [needs_cpp_compiler, pytest.mark.usefixtures("unchecked_types")]

IDS = token_ids(2, 12, seed=7)


@pytest.fixture
def model() -> PreTrainedModel:
    """Two blocks, so that the compiler is done soon; every kind of module is reduced, the heads to unequal sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shares = {"mlp": 0.25, "query_key": 0.25, "value_output": 0.5}
    hf_compress.compress(model, recipe(reduction=shares, allocation="uniform"))
    attention = [module for module in model.modules() if isinstance(module, DecomposedAttention)]
    assert [(module.query_key_dim, module.value_dim) for module in attention] == [(12, 8)] * 2
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return model


def test_compiled_generation_with_a_static_cache(model: PreTrainedModel) -> None:
    """As Transformers compiles it on a GPU, asked for on a CPU by the one switch that there is."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(IDS, **options)
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    found = model.generate(IDS, cache_implementation="static", compile_config=compile_config, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph serves all new tokens"
