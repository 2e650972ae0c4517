"""Perplexity against a brute-force float64 reference; sizes, speed and the comparison on tiny random models."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_compress.errors import ConfigurationError, NumericalError
from hf_compress.evaluation import compare, count_parameters, measure_speed, perplexity, size_on_disk
from hf_compress.evaluation.perplexity import sliding_windows

VOCABULARY = 97


def tiny_llama(tie: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def token_ids(count: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


def reference(model: PreTrainedModel, ids: torch.Tensor, context: int, stride: int) -> tuple[float, int]:
    """Every token by itself, in float64: the window that scores it is the first one that reaches past it."""
    model = model.double()
    losses = []
    for position in range(1, len(ids)):
        start = 0
        while start + context <= position:
            start += stride
        if start == position:
            continue
        with torch.no_grad():
            logits = model(input_ids=ids[None, start:position]).logits[0, -1]
        losses.append(-torch.log_softmax(logits, -1)[ids[position]])
    return float(torch.stack(losses).mean()), len(losses)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("count", "context", "stride"),
    [
        (50, 16, None),  # a shorter last window
        (48, 16, 16),  # windows that fit
        (49, 16, None),  # a last window of one token, which has nothing to be predicted from
        (50, 16, 5),
        (41, 16, 1),
        (10, 16, 4),  # all in one window
        (2, 2, None),
    ],
)
def test_perplexity_equals_brute_force(count: int, context: int, stride: int | None, batch_size: int) -> None:
    model, ids = tiny_llama(), token_ids(count)
    result = perplexity(model, ids, context=context, stride=stride, batch_size=batch_size)
    nll, scored = reference(model, ids, context, stride or context)
    assert result.num_tokens == scored
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert (result.context, result.stride) == (context, stride or context)


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (5, 4)])
@pytest.mark.parametrize("count", range(2, 30))
def test_windows_score_every_token_once_with_its_left_context(count: int, context: int, stride: int) -> None:
    scored = []
    for window in sliding_windows(count, context, stride):
        assert window.end - window.start <= context
        scored += range(window.first, window.end)
        if window.start > 0:
            assert window.first - window.start >= max(1, context - stride)
    assert len(scored) == len(set(scored))
    missing = set(range(count)) - set(scored)
    assert missing == (set(range(0, count, stride)) if stride == context else {0})


def test_perplexity_takes_lists_rows_and_texts() -> None:
    model, ids = tiny_llama(), token_ids(40)
    expected = perplexity(model, ids, context=16)
    assert perplexity(model, ids.tolist(), context=16) == expected
    assert perplexity(model, ids[None], context=16) == expected

    def tokenizer(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % VOCABULARY for character in text]}

    texts = perplexity(model, ["to be or", "not to be"], tokenizer, context=16)
    assert texts == perplexity(model, "to be or\n\nnot to be", tokenizer, context=16)
    assert texts.num_tokens == 17


def test_perplexity_without_logits_to_keep() -> None:
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> object:  # type: ignore[override]
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    model = tiny_llama()
    plain = Plain(model.config).eval()
    plain.load_state_dict(model.state_dict())
    ids = token_ids(50)
    for stride in (16, 5):
        expected = perplexity(model, ids, context=16, stride=stride).nll
        assert perplexity(plain, ids, context=16, stride=stride).nll == pytest.approx(expected, rel=1e-6)


def test_perplexity_leaves_the_model_as_it_was() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, token_ids(20), context=16)
    assert [module.training for module in model.modules()] == before
    model(input_ids=token_ids(8)[None], labels=token_ids(8)[None]).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context >= 2"),
        ({"context": 16, "stride": 17}, "stride"),
        ({"context": 16, "stride": 0}, "stride"),
        ({"context": 16, "batch_size": 0}, "batch_size"),
        ({"context": 128}, "64 positions"),
    ],
)
def test_perplexity_refuses_bad_windows(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        perplexity(tiny_llama(), token_ids(200), **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "at least two tokens"),
        ([1, VOCABULARY], "outside the model's vocabulary of 97"),
        ([-100, 1], "outside"),
        (torch.zeros(2, 8, dtype=torch.long), "shape"),
        (torch.zeros(8), "integer"),
        ("a text", "processing_class"),
        (["a", 1], "mixture"),
    ],
)
def test_perplexity_refuses_bad_data(data: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        perplexity(tiny_llama(), data, context=16)  # type: ignore[arg-type]


def test_perplexity_names_nan() -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        perplexity(model, token_ids(20), context=16)


def test_count_parameters_counts_tied_ones_once() -> None:
    assert count_parameters(tiny_llama()) - count_parameters(tiny_llama(tie=True)) == VOCABULARY * 32


def test_size_on_disk_adds_up_shards(tmp_path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    size = size_on_disk(tmp_path / "shards")
    assert size.weights == sum(shard.stat().st_size for shard in shards) >= 4 * count_parameters(model)
    assert size.total > size.weights
    assert size_on_disk(tmp_path / "one").weights == (tmp_path / "one" / "model.safetensors").stat().st_size


def test_size_on_disk_refuses_what_is_no_model(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="not a folder"):
        size_on_disk(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="no weight file"):
        size_on_disk(tmp_path)


def test_measure_speed_pairs_models_of_two_families() -> None:
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    models = {"llama": tiny_llama().train(), "gpt2": GPT2LMHeadModel(config)}
    speeds = measure_speed(models, prompt_length=20, new_tokens=4, repeats=3)
    assert list(speeds) == ["llama", "gpt2"]
    assert models["llama"].training
    assert (speeds["llama"].prompt_ratio, speeds["llama"].generated_ratio) == (1, 1)
    for speed in speeds.values():
        assert all(math.isfinite(rate) and rate > 0 for rate in speed.to_dict().values())


def test_measure_speed_decodes_with_the_cache() -> None:
    model = tiny_llama()
    lengths = []
    model.register_forward_pre_hook(
        lambda _, __, options: lengths.append(options["input_ids"].shape), with_kwargs=True
    )
    measure_speed({"one": model}, prompt_length=9, new_tokens=3, repeats=2, warmup=1, batch_size=2)
    assert lengths == [(2, 9), (2, 1), (2, 1), (2, 1)] * 3


@pytest.mark.parametrize("options", [{"repeats": 0}, {"new_tokens": 0}, {"prompt_length": 61, "new_tokens": 4}])
def test_measure_speed_refuses(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        measure_speed({"one": tiny_llama()}, **{"prompt_length": 4, "new_tokens": 4, **options})


def test_measure_speed_needs_a_model() -> None:
    with pytest.raises(ConfigurationError, match="needs a model"):
        measure_speed({})


def test_compare_prints_models_side_by_side(tmp_path) -> None:
    dense, small = tiny_llama(), tiny_llama(tie=True)
    small.save_pretrained(tmp_path)
    comparison = compare(
        {"dense": dense, "compressed": small},
        token_ids(40),
        context=16,
        paths={"compressed": tmp_path},
        prompt_length=8,
        new_tokens=2,
        repeats=1,
    )
    plain = comparison.to_dict()
    assert list(plain) == ["dense", "compressed"]
    assert plain["dense"]["size"] is None
    assert plain["compressed"]["size"]["weights"] == size_on_disk(tmp_path).weights
    assert plain["dense"]["perplexity"]["num_tokens"] == 37
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(comparison.table())
    text = console.export_text()
    for title in ("parameters", "bytes on disk", "perplexity", "prompt tokens/s", "generated tokens/s", "stride 16"):
        assert title in text
    assert f"{count_parameters(small):,} ({count_parameters(small) / count_parameters(dense):.2f}x)" in text


def test_compare_leaves_out_what_was_not_measured() -> None:
    comparison = compare({"dense": tiny_llama()}, speed=False)
    assert comparison.to_dict()["dense"]["perplexity"] is None
    assert len(comparison.table().rows) == 1
    assert "parameters" in str(comparison) and "dense" in str(comparison)
