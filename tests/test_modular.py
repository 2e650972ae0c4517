"""Modular decomposition on every family: what only it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_KINDS, FAMILIES, compressed, make_model, recipe, token_ids
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_compress
from hf_compress.anatomy import resolve_anatomy
from hf_compress.engine.blocks import BlockStream
from hf_compress.layout import layout_of
from hf_compress.methods.modular.compress import compress_block
from hf_compress.methods.modular.statistics import collect_statistics

IDS = token_ids(3, 20, seed=5)


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def test_reduction_zero_changes_nothing(family: str) -> None:
    model = hf_compress.compress(make_model(family), recipe(reduction=0.0, calibration=None))
    assert torch.equal(logits(model), logits(make_model(family)))
    assert layout_of(model) == []


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_full_rank_is_exact(family: str, kind: str) -> None:
    """Every block rebuilt at full size computes what the dense one does."""
    model = make_model(family, torch.float64)
    dense = logits(model)
    anatomy = resolve_anatomy(model)
    sizes = {"mlp": 64}.get(kind, 16)
    config = recipe(ridge=1e-12)
    for block in range(len(anatomy)):
        attention = anatomy.model.get_submodule(anatomy.attention_path(block))
        if kind == "query_key" and not getattr(attention, "use_rope", True) and family in ("qwen3", "gemma3"):
            continue
        stream = BlockStream(anatomy, [{"input_ids": token_ids(40, 32)}])
        for earlier in range(block):
            stream.advance(earlier)
        with collect_statistics(anatomy, block, {kind}) as statistics:  # type: ignore[arg-type]
            stream.run(block, 0)
        result = compress_block(anatomy, config, block, {kind: sizes}, statistics)  # type: ignore[dict-item]
        assert result.modules
        for path, module in result.modules.items():
            model.set_submodule(path, module)
    # The families' norms and softmax compute in float32 and flip a rounding here and there.
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))


@pytest.mark.parametrize("kinds", ["auto", ALL_KINDS, ("mlp",), ("query_key", "value_output")])
def test_budget_is_met(family: str, kinds: object) -> None:
    reduction = {("query_key", "value_output"): 0.1, ("mlp",): 0.2}.get(kinds, 0.3)  # type: ignore[call-overload]
    model = hf_compress.compress(make_model(family), recipe(reduction=reduction, kinds=kinds))
    report = model.compression_report
    geometry_step = max(row.parameters_before / row.size_before for row in report.modules) * 8
    tolerance = max(0.005, geometry_step / 2 / report.block_linear_before)
    assert report.block_linear_reduction == pytest.approx(reduction, abs=tolerance)
    now = sum(p.numel() for p in model.parameters())
    assert now == report.parameters_after < report.parameters_before


def test_the_cache_holds_small_heads(family: str) -> None:
    model = compressed(family)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    rows = {(row.block, row.kind): row.size_after for row in model.compression_report.modules}
    for block in range(4):
        assert cache.layers[block].keys.shape[-1] == rows.get((block, "query_key"), 16)
        assert cache.layers[block].values.shape[-1] == rows.get((block, "value_output"), 16)


def recorded(model: PreTrainedModel, **options: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """What the blocks and their attentions returned, by hooks of our own, and what the model recorded."""
    blocks = model.get_decoder().layers
    hidden: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def keep_hidden(_: torch.nn.Module, __: object, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep_hidden) for block in blocks]
    handles += [block.self_attn.register_forward_hook(lambda *call: weights.append(call[2][1])) for block in blocks]
    with torch.no_grad():
        output = model(IDS, **options)
    for handle in handles:
        handle.remove()
    return hidden, weights, output


def test_attentions_and_hidden_states_of_all_blocks_are_recorded(family: str, tmp_path: Path) -> None:
    model = compressed(family)
    types = {type(block.self_attn) for block in model.get_decoder().layers}
    assert len(types) == 2, "some blocks dense and some decomposed"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, again):
        each.set_attn_implementation("eager")
        for _ in range(2):  # hooks are installed at the first call and must not pile up
            hidden, weights, output = recorded(each, output_attentions=True, output_hidden_states=True)
            assert len(weights) == len(output.attentions) == 4
            assert all(torch.equal(a, b) for a, b in zip(output.attentions, weights, strict=True))
            assert all(a.shape == (3, 4, 20, 20) for a in output.attentions)
            for attention in output.attentions:
                torch.testing.assert_close(attention.sum(-1), torch.ones(3, 4, 20))
            assert len(output.hidden_states) == 5
            # The last one is recorded after the final norm.
            assert all(torch.equal(a, b) for a, b in zip(output.hidden_states[1:-1], hidden[:-1], strict=True))
        assert recorded(each)[2].attentions is None


def test_attentions_asked_for_before_are_recorded_after() -> None:
    """Transformers installs its hooks once; modules that change place later must be hooked as well."""
    model = make_model("llama")
    model.set_attn_implementation("eager")
    assert len(recorded(model, output_attentions=True)[2].attentions) == 4
    hf_compress.compress(model, recipe(kinds=ALL_KINDS))
    before = recorded(model, output_attentions=True)[2].attentions
    assert len(before) == 4
    model.dequantize()
    after = recorded(model, output_attentions=True)[2].attentions
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_a_model_can_be_pickled(family: str, tmp_path: Path) -> None:
    model = compressed(family)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))


def test_sequential_order_and_padding(family: str) -> None:
    """Sequential statistics run, and padding in the calibration data has no influence on them."""
    ids = token_ids(8, 24)
    padded = torch.cat((torch.zeros(8, 5, dtype=torch.long), ids), dim=1)

    def collate(with_padding: bool) -> object:
        def collator(rows: list[int]) -> dict[str, torch.Tensor]:
            index = torch.tensor(rows)
            if not with_padding:
                return {"input_ids": ids[index], "attention_mask": torch.ones_like(ids[index])}
            mask = torch.ones_like(padded[index])
            mask[:, :5] = 0
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            return {"input_ids": padded[index], "attention_mask": mask, "position_ids": positions}

        return collator

    states = []
    for with_padding in (False, True):
        source = hf_compress.CalibrationConfig(
            list(range(8)), data_collator=collate(with_padding), num_samples=8, num_held_out=0, batch_size=4
        )
        model = compressed(family, order="sequential", calibration=source, allocation="uniform")
        states.append(logits(model))
    torch.testing.assert_close(states[0], states[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_dequantize_gives_the_same_function(name: str) -> None:
    folds = name == "qwen2"  # a value bias and no output bias to fold it into
    narrow_norms = name in ("qwen3", "gemma3")
    model = compressed(name, torch.float64, kinds=("mlp",) if folds or narrow_norms else ALL_KINDS)
    before = logits(model)
    model.dequantize()
    assert layout_of(model) == []
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in make_model(name).parameters())
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3"])
def test_dequantize_says_what_has_no_dense_form(name: str) -> None:
    with pytest.raises(hf_compress.CompressionError, match="Keep the compressed model"):
        compressed(name).dequantize()
