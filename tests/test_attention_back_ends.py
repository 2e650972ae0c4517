"""Heads of unequal sizes through every attention back end of Transformers, and the errors where there is none."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import needs_cpp_compiler
from conftest import compressed, make_model, token_ids
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils import is_flash_attn_2_available

from hf_compress.methods.modular.modules import DecomposedAttention

IDS = token_ids(2, 20, seed=5)
PADDED = torch.ones_like(IDS)
PADDED[1, :7] = 0
REDUCTIONS = {
    "wider query": {"query_key": 0.3, "value_output": 0.55},
    "wider value": {"query_key": 0.55, "value_output": 0.3},
}


def unequal(family: str, wider: str = "wider query", **fields: Any) -> PreTrainedModel:
    """A compressed model whose query/key heads and value heads differ in every block that is compressed."""
    fields = {"kinds": "auto", "allocation": "uniform", **fields}
    model = compressed(family, reduction=REDUCTIONS[wider], **fields)
    sizes = [(m.query_key_dim, m.value_dim) for m in model.modules() if isinstance(m, DecomposedAttention)]
    assert len(sizes) >= 3 and all(first != second for first, second in sizes)
    return model


def logits(model: Any, mask: torch.Tensor = PADDED) -> torch.Tensor:
    """(real tokens, vocabulary): what stands on padding may be anything."""
    with torch.no_grad():
        return model(IDS, attention_mask=mask).logits[mask.bool()]


@functools.cache
def reference_logits(family: str, wider: str) -> torch.Tensor:
    """Of the dense class with zeros for what was removed; Gemma 3 has no such form and runs eagerly."""
    model = unequal(family, wider)
    if family != "gemma3":
        model.dequantize()
    model.set_attn_implementation("eager")
    return logits(model)


class Spy:
    """Stands before an attention function and writes down the head sizes of query, key and value."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.sizes: list[tuple[int, int, int]] = []

    def __call__(self, module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        self.sizes.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return self.function(module, query, key, value, *args, **kwargs)


# Gemma 2 has a softcap, which sdpa refuses for the dense model as well; both Gemmas and Mistral slide windows of 8.
# Gemma 3 run eagerly is its own reference.
PAIRS = [
    (family, implementation)
    for family in ("llama", "mistral", "gemma2", "gemma3", "opt")
    for implementation in ("eager", "sdpa", "flex_attention")
    if (family, implementation) not in (("gemma2", "sdpa"), ("gemma3", "eager"))
]


@pytest.mark.parametrize("wider", REDUCTIONS)
@pytest.mark.parametrize(("family", "implementation"), PAIRS)
def test_unequal_heads_compute_what_the_dense_class_does(
    family: str, implementation: str, wider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference_logits(family, wider)  # before the spy, which would see its calibration as well
    model = unequal(family, wider)
    model.set_attn_implementation(implementation)
    spy = None
    if implementation != "eager":
        spy = Spy(ALL_ATTENTION_FUNCTIONS[implementation])
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, implementation, spy)
    # Without compilation flex_attention runs its own plain version; the compiled one is below.
    with torch.compiler.set_stance("force_eager"):
        found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if spy is not None:
        assert len(spy.sizes) == 4, "every block went through the back end that was asked for"
        assert all(query == key == value for query, key, value in spy.sizes), "fused kernels want equal sizes"
        assert all(size % 8 == 0 for size, _, _ in spy.sizes)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flex_attention_generates_with_a_cache(family: str) -> None:
    model = unequal(family)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": PADDED}
    model.set_attn_implementation("eager")
    expected = model.generate(IDS, **options)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model.generate(IDS, **options), expected)


@needs_cpp_compiler
@pytest.mark.usefixtures("unchecked_types")
def test_compiled_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run it: Transformers compiles flex_attention itself."""
    # Every block at one padded size, the dense one too: one kernel to compile.
    model = unequal("llama", modules_to_not_convert=["model.layers.3"])
    expected = logits(model)
    torch._dynamo.reset()
    model.set_attn_implementation("flex_attention")
    spy = Spy(ALL_ATTENTION_FUNCTIONS["flex_attention"])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", spy)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert spy.sizes == [(16, 16, 16)] * 4


def test_heads_below_what_flex_attention_takes_on_a_gpu_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU kernels refuse heads of fewer than 16 dimensions, equal or not."""
    model = compressed("llama", reduction={"query_key": 0.5, "value_output": 0.5}, kinds="auto", allocation="uniform")
    assert {m.query_key_dim for m in model.modules() if isinstance(m, DecomposedAttention)} == {8}
    expected = logits(model)
    model.set_attn_implementation("flex_attention")
    spy = Spy(ALL_ATTENTION_FUNCTIONS["flex_attention"])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", spy)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert spy.sizes == [(16, 16, 16)] * 4


@pytest.mark.parametrize("wider", REDUCTIONS)
def test_a_registered_back_end_gets_equal_heads(wider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash attention, which is not to be had here: it refuses unequal sizes and keeps to the given scale."""

    def refuses_unequal(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            raise RuntimeError("unequal head sizes")
        assert kwargs["scaling"] == 16**-0.5, "the scale of the dense heads, not of the smaller ones"
        return sdpa(module, query, key, value, *args, **kwargs)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "refuses_unequal", refuses_unequal)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "refuses_unequal", sdpa_mask)
    model = unequal("llama", wider)
    expected = logits(model)
    model.set_attn_implementation("refuses_unequal")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_continuous_batching_generates_the_same(family: str, implementation: str) -> None:
    """Its paged cache has one head size for all blocks."""
    model = unequal(family)
    model.set_attn_implementation(implementation)
    prompts = [[5, 6, 7], list(range(8, 21))]
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
    batched = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=cache, warmup=False)
    for prompt, output in zip(prompts, batched.values(), strict=True):
        assert output.error is None
        alone = model.generate(torch.tensor([prompt]), generation_config=greedy)[0, len(prompt) :]
        assert output.generated_tokens == alone.tolist()


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash_attn is installed")
def test_a_back_end_that_is_not_installed_is_named(tmp_path: Path) -> None:
    """Transformers' own error, the same as for a dense model; the compressed model stays as it was."""
    model = unequal("llama")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for ask in (
        lambda: make_model("llama").set_attn_implementation("flash_attention_2"),
        lambda: model.set_attn_implementation("flash_attention_2"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2"),
    ):
        with pytest.raises(ImportError, match="FlashAttention2.*installed"):
            ask()
    assert torch.equal(logits(model), expected)
