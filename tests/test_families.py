"""Every method on every family that is described matrix by matrix or has several parts."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers as hf
from conftest import interrupt, token_ids
from families import CONFIGS, DECODERS, MULTIMODAL, STACKS, auto_class, calibration, inputs, make, outputs
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from typer.testing import CliRunner

import hf_compress
from hf_compress import CodebookConfig, LayerSharingConfig, ModularDecompositionConfig, PruningConfig
from hf_compress.anatomy import known_model_types, resolve_anatomy
from hf_compress.calibration.data import load_calibration_data
from hf_compress.cli.app import app
from hf_compress.engine import activations
from hf_compress.engine.blocks import BlockStream, complete, model_inputs
from hf_compress.methods.modular.compress import compress_block
from hf_compress.methods.modular.sizes import Geometry
from hf_compress.methods.modular.statistics import collect_statistics

every_family = pytest.mark.parametrize("name", sorted(CONFIGS))
# Their query, key and value are one matrix, and so are gate and up, or the MLP has a part that stays dense.
NO_GROUPS = ("gpt2", "modernbert", "phi3", "t5", "t5_gated")
NO_SHARING = (*STACKS, "modernbert", "qwen3_moe", "albert", "albert_groups")


def reloaded(model: PreTrainedModel, name: str, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    again: PreTrainedModel = auto_class(name).from_pretrained(folder)
    return again


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_family
def test_the_stream_follows_the_model(name: str) -> None:
    model, batch = make(name), inputs(name, 4, seed=3)
    anatomy = resolve_anatomy(model)
    stream, seen = BlockStream(anatomy, [batch]), {}

    def observe(index: int, output: Any) -> None:
        seen[index] = output[0] if isinstance(output, tuple) else output

    handles = [
        anatomy.block(index).register_forward_hook(lambda _, __, output, at=index: observe(at, output))
        for index in range(len(anatomy))
    ]
    with torch.no_grad():
        model(**model_inputs(model, batch))
    for handle in handles:
        handle.remove()
    assert len(anatomy.stacks) == (2 if name in STACKS else 1)
    for index in range(len(anatomy)):
        stream.advance(index)
        assert torch.equal(stream.hidden[0], seen[index])


@pytest.mark.parametrize("name", ["bart", "bloom", "clip", "dinov3_vit", "gemma3", "mixtral", "t5"])
def test_what_goes_with_a_stream_is_kept_in_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, rotary tables and what an encoder hands to a decoder may be larger than the hidden states."""
    monkeypatch.setattr(activations, "WORTH_A_FILE", 1)
    model, batch = make(name), inputs(name, 4, seed=3)
    if "attention_mask" in batch:
        batch["attention_mask"][1, -3:] = 0
    anatomy = resolve_anatomy(model)
    stream, other = BlockStream(anatomy, [batch]), BlockStream(anatomy, [batch], tmp_path)
    for index in range(len(anatomy)):
        stream.advance(index)
        single = other.by_sequence()
        other.advance(index)
        assert not any(isinstance(part, torch.Tensor) for part in tree_leaves(other._arguments))
        assert torch.equal(stream.hidden[0], other.hidden[0])
        if len(anatomy.stacks) == 1:
            rows = torch.cat([single.run(index, row) for row in range(len(single))])
            torch.testing.assert_close(rows, stream.hidden[0], rtol=1e-4, atol=1e-5)
    # One file a tensor, whichever blocks it is for; they go with the stream.
    assert len(list(tmp_path.iterdir())) <= 7 * (1 + len(single))
    del stream, other, single
    gc.collect()
    assert not list(tmp_path.iterdir())


@every_family
def test_codebooks_with_data(name: str, tmp_path: Path) -> None:
    recipe = CodebookConfig(bits=3, rows_per_codebook=8, rounds=1, calibration=calibration(name))
    # GPT-J's table of rotations is not the same after a load in bfloat16, dense as well.
    dtype = torch.float32 if name == "gptj" else torch.bfloat16
    model = hf_compress.compress(make(name, dtype), recipe)
    kinds = {row.kind for row in model.compression_report.modules}
    assert {"query_key", "value_output"} <= kinds
    again = reloaded(model, name, tmp_path)
    assert again.dtype == dtype
    assert same(outputs(again, name), outputs(model, name))
    assert str(again.compression_report) == str(model.compression_report)

    model.float().train()
    sum(tensor.float().square().sum() for tensor in forward(model, name)).backward()
    packed = [path for path, module in model.named_modules() if hasattr(module, "layout_type")]
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), path
    # Norms in the blocks are there to be trained, and their gradients go through the packed layers.
    anatomy = resolve_anatomy(make(name))
    norms = [
        path for path, _ in model.named_parameters() if "norm" in path and path.startswith(anatomy.block_paths[0])
    ]
    assert packed and (not norms or any(model.get_parameter(path).grad is not None for path in norms))


def forward(model: PreTrainedModel, name: str) -> list[torch.Tensor]:
    found = model(**model_inputs(model, inputs(name, 4, seed=7)))
    return [value for value in found.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


@every_family
def test_pruning_without_data(name: str, tmp_path: Path) -> None:
    identity = PruningConfig(sparsity=0, criterion="magnitude", values="float32")
    for got, dense in zip(
        outputs(hf_compress.compress(make(name), identity), name), outputs(make(name), name), strict=True
    ):
        torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-4)
    model = hf_compress.compress(make(name), PruningConfig(sparsity=0.7, criterion="magnitude"))
    assert same(outputs(reloaded(model, name, tmp_path), name), outputs(model, name))


@every_family
def test_heads_and_columns(name: str, tmp_path: Path) -> None:
    recipe = PruningConfig(sparsity=0.3, criterion="magnitude", structured=True)
    if name in NO_GROUPS:
        with pytest.raises(hf_compress.ConfigurationError, match="structured=True"):
            hf_compress.compress(make(name), recipe)
        return
    model = hf_compress.compress(make(name), recipe)
    # Mixtral's experts, which count, stay as they are.
    assert model.compression_report.block_linear_reduction > (0.02 if name == "mixtral" else 0.05)
    assert same(outputs(reloaded(model, name, tmp_path), name), outputs(model, name))


@every_family
def test_shared_layers(name: str, tmp_path: Path) -> None:
    recipe = LayerSharingConfig(unique_layers=1, lora_rank=2)
    if name in NO_SHARING:
        with pytest.raises(hf_compress.CompressionError, match="list of blocks|not of one shape|shares its layers"):
            hf_compress.compress(make(name), recipe)
        return
    model = hf_compress.compress(make(name), recipe)
    assert same(outputs(reloaded(model, name, tmp_path), name), outputs(model, name))


@every_family
def test_smaller_mlps_and_attention(name: str, tmp_path: Path) -> None:
    def recipe(reduction: float) -> ModularDecompositionConfig:
        return ModularDecompositionConfig(
            reduction=reduction, kinds=_kinds(name), allocation="uniform", calibration=calibration(name)
        )

    assert same(outputs(hf_compress.compress(make(name), recipe(0.0)), name), outputs(make(name), name))
    model, again = (hf_compress.compress(make(name), recipe(0.25)) for _ in range(2))
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    rows = model.compression_report.modules
    assert rows and all(row.size_after < row.size_before for row in rows)
    assert {row.kind for row in rows} == set(_kinds(name))
    assert not same(outputs(model, name), outputs(make(name), name))
    assert same(outputs(reloaded(model, name, tmp_path), name), outputs(model, name))


@every_family
def test_full_rank_is_exact(name: str) -> None:
    """Every module rebuilt at full size computes what the dense one does."""
    model = make(name, torch.float64)
    if resolve_anatomy(model).record.experts is not None:
        model.set_experts_implementation("eager")  # torch has no grouped product of it
    dense, anatomy = outputs(model, name), resolve_anatomy(model)
    config = ModularDecompositionConfig(reduction=0.1, ridge=1e-12)
    sizes = Geometry.of(anatomy, config).dense()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in inputs(name, 32).items()}
    stream = BlockStream(anatomy, [batch])
    for block, own in enumerate(sizes):
        with collect_statistics(anatomy, block, set(own)) as statistics:
            stream.advance(block)
        for path, module in compress_block(anatomy, config, block, own, statistics).modules.items():
            model.set_submodule(path, module)
    # Norms and softmax of many families compute in float32 and flip a rounding here and there.
    for got, wanted in zip(outputs(model, name), dense, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def small_recipe(name: str, method: str) -> Any:
    recipes: dict[str, Any] = {
        "modular": lambda: ModularDecompositionConfig(reduction=0.1, allocation="uniform", kinds=_kinds(name)),
        "codebook": lambda: CodebookConfig(bits=3, rows_per_codebook=8, learning="none"),
        "pruning": lambda: PruningConfig(sparsity=0.5, criterion="wanda"),
        "sharing": lambda: LayerSharingConfig(unique_layers=1, lora_rank=2),
    }
    return recipes[method]()


@pytest.mark.parametrize("method", ["modular", "pruning", "sharing"])
@every_family
def test_gradients_reach_what_was_made(name: str, method: str) -> None:
    if method == "sharing" and name in NO_SHARING:
        pytest.skip("its layers cannot be shared, see test_shared_layers")
    model = hf_compress.compress(make(name), small_recipe(name, method), calibration=calibration(name)).train()
    sum(tensor.float().square().sum() for tensor in forward(model, name)).backward()
    made = [module for module in model.modules() if hasattr(module, "layout_type")]
    parameters = {id(p): (n, p) for m in made for n, p in m.named_parameters() if p.requires_grad}
    assert parameters
    for path, parameter in parameters.values():
        # Of these the last block's output may make no use, and no expert has to get a token.
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), path
    assert any(p.grad is not None and p.grad.abs().max() > 0 for _, p in parameters.values())


@pytest.mark.parametrize("method", ["modular", "codebook", "pruning", "sharing"])
@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_cache_changes_nothing(name: str, method: str) -> None:
    if method == "sharing" and name in NO_SHARING:
        pytest.skip("its layers cannot be shared, see test_shared_layers")
    model = hf_compress.compress(make(name), small_recipe(name, method), calibration=calibration(name))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = {key: value for key, value in inputs(name, 2, seed=9).items() if key != "labels"}
    # The padding is on the left here, where generation goes on.
    batch = {key: value.flip(1) for key, value in batch.items()}
    with_cache = model.generate(**batch, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(**batch, use_cache=False, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("name", ["bart", "m2m_100", "t5", "whisper"])
def test_the_caches_of_encoder_decoders_change_nothing(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    auto = hf.AutoModelForSpeechSeq2Seq if name == "whisper" else hf.AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    dense = auto.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    recipe = ModularDecompositionConfig(reduction=0.2, allocation="uniform", kinds=_kinds(name), rank_multiple=2)
    hf_compress.compress(dense, recipe, calibration=calibration(name)).save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path)
    batch = {key: value for key, value in inputs(name, 2, seed=9).items() if key != "labels"}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    # Whisper's own cuts what it takes for silence.
    with_cache = hf.GenerationMixin.generate(model, **batch, use_cache=True, **options)
    options.pop("cache_implementation", None)
    assert with_cache.shape[1] >= 8
    assert torch.equal(with_cache, hf.GenerationMixin.generate(model, **batch, use_cache=False, **options))


def _kinds(name: str) -> list[Any]:
    """What of a family modular decomposition can make smaller."""
    geometry = Geometry.of(resolve_anatomy(make(name)), ModularDecompositionConfig(reduction=0.1))
    return list(geometry.kinds())


@pytest.mark.parametrize("name", STACKS)
def test_several_stacks_are_calibrated_one_after_the_other(name: str) -> None:
    """Wanda's input norms, block by block, are those of the model as it is compressed by then."""
    recipe = PruningConfig(sparsity=0.5, criterion="wanda", calibration=calibration(name))
    first, second = (hf_compress.compress(make(name), recipe).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def error(model: PreTrainedModel, name: str) -> float:
    pairs = list(zip(outputs(model, name), outputs(make(name), name), strict=True))
    return sum(float((got - dense).square().mean() / dense.square().mean()) for got, dense in pairs)


@pytest.mark.parametrize(
    ("name", "order"), [("bart", "sequential"), ("t5", "dense"), ("whisper", "dense"), ("clip", "sequential")]
)
def test_data_help(name: str, order: Any) -> None:
    alone = hf_compress.compress(make(name), CodebookConfig(bits=3, learning="none", rows_per_codebook=8))
    recipe = CodebookConfig(bits=3, rows_per_codebook=8, order=order, calibration=calibration(name, 32))
    assert error(hf_compress.compress(make(name), recipe), name) < 0.9 * error(alone, name)


def test_an_interrupted_run_goes_on_in_the_second_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "t5"
    recipe = CodebookConfig(bits=3, rows_per_codebook=8, rounds=1, calibration=calibration(name))
    whole = hf_compress.compress(make(name), recipe).state_dict()
    advance = BlockStream.advance

    def stop(stream: BlockStream, index: int, check: bool = True) -> None:
        if index == 3:
            interrupt()
        advance(stream, index, check)

    options = {"working_directory": tmp_path, "keep_activations": True}
    monkeypatch.setattr(BlockStream, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        hf_compress.compress(make(name), recipe, **options)
    monkeypatch.setattr(BlockStream, "advance", advance)
    again = hf_compress.compress(make(name), recipe, **options).state_dict()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "dinov3_gated", "albert"])
def test_portable(name: str, tmp_path: Path) -> None:
    """A plain model of its class whose config has the new width, of encoder and decoder alike."""
    recipe = ModularDecompositionConfig(reduction=0.2, portable=True, calibration=calibration(name))
    model = hf_compress.compress(make(name), recipe)
    again = reloaded(model, name, tmp_path)
    assert not hasattr(again, "hf_quantizer")
    assert same(outputs(again, name), outputs(model, name))


def test_attentions_are_told_apart(tmp_path: Path) -> None:
    recipe = ModularDecompositionConfig(
        reduction=0.2, kinds=["query_key", "value_output"], allocation="uniform", calibration=calibration("bart")
    )
    batch = model_inputs(make("bart"), inputs("bart", 2))
    model = make("bart")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = model(**batch, output_attentions=True)
        hf_compress.compress(model, recipe)
        for found in (model, reloaded(model, "bart", tmp_path)):
            found.set_attn_implementation("eager")
            output = found(**batch, output_attentions=True)
            for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
                assert [a.shape for a in output[name]] == [a.shape for a in dense[name]], name
        model.dequantize()
        again = model(**batch, output_attentions=True)
    assert len(again.cross_attentions) == len(again.decoder_attentions) == 2
    torch.testing.assert_close(again.cross_attentions, output.cross_attentions)


def test_a_decoder_alone_attends_to_itself() -> None:
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["bart"]())
    source = hf_compress.CalibrationConfig(token_ids(12, 16) % 90 + 3, num_samples=8, num_held_out=4)
    hf_compress.compress(model, ModularDecompositionConfig(reduction=0.3, calibration=source))
    attention = model.model.decoder.layers[0].encoder_attn
    assert type(attention).__name__ == "BartAttention"


def test_one_of_two_attentions_can_be_left_out() -> None:
    recipe = ModularDecompositionConfig(
        reduction=0.15,
        kinds=["query_key", "value_output"],
        allocation="uniform",
        modules_to_not_convert=["encoder_attn"],
        calibration=calibration("bart"),
    )
    model = hf_compress.compress(make("bart"), recipe)
    kinds = [(type(b.self_attn).__name__, type(b.encoder_attn).__name__) for b in model.decoder.layers]
    assert kinds == [("DecomposedAttention", "BartAttention")] * 2
    report = model.compression_report
    assert report.bytes_after == hf_compress.plan(make("bart"), recipe).bytes_on_disk
    assert any("encoder_attn.q_proj' is in modules_to_not_convert" in line for line in report.left_alone)


@pytest.mark.parametrize("name", ["falcon", "bloom", "dinov3_vit", "dinov2_giant"])
def test_the_temperature_is_chosen(name: str) -> None:
    source = calibration(name).model_copy(update={"num_samples": 12, "num_held_out": 4})
    recipe = ModularDecompositionConfig(reduction=0.2, kinds=["mlp"], temperature="auto", calibration=source)
    notes = hf_compress.compress(make(name), recipe).compression_report.notes
    assert notes["temperature"] in [float(trial) for trial in notes["temperature_trials"]]


@every_family
def test_half_precision(name: str) -> None:
    """Some families keep their tables of rotations in float32."""
    dtype = torch.float32 if name == "gptj" else torch.bfloat16
    dense = make(name, dtype)
    model = hf_compress.compress(make(name, dtype), small_recipe(name, "modular"), calibration=calibration(name))
    wanted = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(name, 4).items()}
    with torch.no_grad():
        found, before = (each(**model_inputs(each, wanted))[0] for each in (model, dense))
    assert found.dtype == before.dtype and bool(torch.isfinite(found).all())


def test_bert_has_no_cross_attentions() -> None:
    """Before, after, and of others of its class."""
    import encoders

    def counts(model: PreTrainedModel) -> list[int]:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            found = model(**encoders.inputs("bert", 2), output_attentions=True)
        return [len(found.attentions), len(found.cross_attentions or ())]

    recipe = ModularDecompositionConfig(reduction={"value_output": 0.5}, calibration=encoders.calibration("bert"))
    model = hf_compress.compress(encoders.make_encoder("bert"), recipe)
    assert counts(model) == [3, 0]
    model.dequantize()
    assert counts(model) == counts(encoders.make_encoder("bert")) == [3, 0]


@pytest.mark.parametrize(
    ("order", "dtype"), [("dense", torch.float32), ("sequential", torch.float32), ("dense", torch.float16)]
)
def test_position_biases_reach_streamed_blocks(order: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    make("t5", dtype).save_pretrained(tmp_path / "dense")
    recipe = ModularDecompositionConfig(
        reduction=0.2, kinds=["mlp"], allocation="uniform", order=order, calibration=calibration("t5")
    )
    hf_compress.compress_checkpoint(tmp_path / "dense", tmp_path / "small", recipe)
    whole = hf_compress.compress(auto_class("t5").from_pretrained(tmp_path / "dense"), recipe)
    again = auto_class("t5").from_pretrained(tmp_path / "small")
    assert {p.dtype for p in again.parameters()} == {dtype, torch.float32}
    assert same(outputs(again, "t5"), outputs(whole, "t5"))


@pytest.mark.parametrize(("name", "dtype"), [("t5", torch.float16), ("marian", torch.float32)])
def test_a_plan_knows_what_is_written_otherwise(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """T5's `wo` in float32, and no tables of positions that are made anew."""
    make(name).save_pretrained(tmp_path)
    recipe = CodebookConfig(bits=3, learning="none", rows_per_codebook=8)
    model = auto_class(name).from_pretrained(tmp_path, dtype=dtype)
    hf_compress.compress(model, recipe).save_pretrained(tmp_path / "small")
    written = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "small" / "model.safetensors").values())
    assert hf_compress.plan(tmp_path, recipe, dtype=dtype).bytes_on_disk == written


@pytest.mark.parametrize("name", ["bart", "whisper", "clip"])
def test_kinds_are_probed_on_several_stacks(name: str) -> None:
    """What the probe says of its choice is what a user measures on the held-out data."""
    data = inputs(name, 24, seed=1)

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {key: tensor[torch.tensor(rows)] for key, tensor in data.items()}

    source = hf_compress.CalibrationConfig(
        list(range(24)), data_collator=collate, num_samples=16, num_held_out=8, batch_size=8
    )
    recipe = ModularDecompositionConfig(reduction=0.3, rank_multiple=2, calibration=source)
    model = hf_compress.compress(make(name), recipe)
    notes = model.compression_report.notes
    assert len(notes["block_influence"]) == len(resolve_anatomy(make(name)))
    chosen = notes["kind_reductions"]
    trial = next(trial for trial in notes["division_trials"] if chosen.items() <= trial.items())

    held_out = complete(make(name), load_calibration_data(source, None).held_out[0])
    found, wanted = (final_states(each, held_out) for each in (model, make(name)))
    errors = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(found, wanted, strict=True)]
    assert trial["hidden_state_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-3, abs=1e-5)


def final_states(model: PreTrainedModel, batch: Any) -> list[torch.Tensor]:
    """Of the positions that are no padding: the decoder's states behind its norm, or those of both towers before."""
    anatomy, seen = resolve_anatomy(model), dict[int, Any]()
    handles = [
        anatomy.block(stack.stop - 1).register_forward_hook(lambda _, __, output, at=at: seen.update({at: output}))
        for at, stack in enumerate(anatomy.stacks)
    ]
    with torch.no_grad():
        output = model(**model_inputs(model, batch))
    for handle in handles:
        handle.remove()
    if "last_hidden_state" in output:
        states, mask = output.last_hidden_state, batch.get("decoder_attention_mask")
        return [states if mask is None else states[mask.bool()]]
    return [seen[0][batch["attention_mask"].bool()], seen[1]]


class TestEncoderDecoderBatches:
    def test_the_decoder_reads_labels_one_token_later(self) -> None:
        model = make("bart")
        labels = torch.tensor([[7, 8, -100, -100], [4, 5, 6, 2]])
        found = complete(model, {"input_ids": token_ids(2, 6), "labels": labels})
        assert found["decoder_input_ids"].tolist() == [[2, 7, 8, 0], [2, 4, 5, 6]]
        assert found["decoder_attention_mask"].tolist() == [[True, True, True, False], [True] * 4]

    def test_without_labels_it_reads_the_text(self) -> None:
        ids = torch.tensor([[7, 8, 9], [4, 5, 0]])
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        found = complete(make("t5"), {"input_ids": ids, "attention_mask": mask})
        assert found["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 4, 5]]
        assert found["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]

    def test_sounds_alone_are_not_enough(self) -> None:
        model, batch = make("whisper"), inputs("whisper", 2)
        batch.pop("labels")
        with pytest.raises(hf_compress.CalibrationError, match="decoder.*labels"):
            BlockStream(resolve_anatomy(model), [batch])

    def test_padding_of_both_sides_counts_for_nothing(self) -> None:
        """Other tokens under the masks give the same codes."""
        name, found = "bart", []
        for filler in (0, 50):
            data = inputs(name, 16, seed=1)
            data["input_ids"][data["attention_mask"] == 0] = filler
            data = dict(complete(make(name), data))
            padding = ~data["decoder_attention_mask"].bool()
            data["decoder_input_ids"] = data["decoder_input_ids"].masked_fill(padding, filler)

            def collate(rows: list[int], data: Any = data) -> dict[str, torch.Tensor]:
                return {key: tensor[torch.tensor(rows)] for key, tensor in data.items()}

            source = hf_compress.CalibrationConfig(
                list(range(16)), data_collator=collate, num_samples=16, num_held_out=0, batch_size=8
            )
            recipe = CodebookConfig(bits=3, rows_per_codebook=8, rounds=1, calibration=source)
            found.append(hf_compress.compress(make(name), recipe).state_dict())
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_images_alone_do_not_reach_both_towers() -> None:
    images = {"pixel_values": inputs("clip", 2)["pixel_values"]}
    with pytest.raises(hf_compress.CalibrationError, match="CLIPModel reads 'input_ids'.*pixel_values"):
        BlockStream(resolve_anatomy(make("clip")), [images])


@pytest.mark.parametrize("criterion", ["wanda", "snip_magnitude"])
def test_texts_do_not_fit_a_model_of_images(criterion: Any) -> None:
    source = hf_compress.CalibrationConfig(token_ids(), num_samples=8, num_held_out=0, batch_size=8)
    recipe = PruningConfig(sparsity=0.5, criterion=criterion, calibration=source)
    with pytest.raises(hf_compress.CalibrationError, match="reads 'pixel_values'.*'input_ids'.*image processor"):
        hf_compress.compress(make("siglip_vision_model"), recipe)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mixtral", ["mlp.gate.weight (MixtralTopKRouter) in 3 blocks: "]),
        ("t5", ["layer.1.DenseReluDense.wo.weight (Linear) in 2 blocks: "]),
        ("gemma3", ["model.vision_tower (outside the blocks): "]),
    ],
)
def test_what_no_method_reaches_is_named_with_its_share(name: str, parts: list[str]) -> None:
    model = hf_compress.compress(make(name), CodebookConfig(bits=3, learning="none", rows_per_codebook=8))
    left = "\n".join(model.compression_report.left_alone)
    assert all(part in left for part in parts), left
    assert "experts" not in left


def test_experts_that_a_method_leaves_dense_are_named_with_their_share() -> None:
    model = hf_compress.compress(make("qwen3_moe"), PruningConfig(sparsity=0.5, criterion="magnitude"))
    weights = {name: parameter.numel() for name, parameter in make("qwen3_moe").named_parameters()}
    share = sum(count for name, count in weights.items() if ".experts." in name) / sum(weights.values())
    line = f"mlp.experts (Qwen3MoeExperts) in 2 blocks: {share:.1%} of the model's weights stay as they are"
    assert line in model.compression_report.left_alone


@pytest.mark.parametrize("name", sorted(MULTIMODAL))
def test_of_a_multimodal_model_the_language_part_is_compressed(name: str) -> None:
    model = hf_compress.compress(make(name), CodebookConfig(bits=3, learning="none", rows_per_codebook=8))
    paths = [row.path for row in model.compression_report.modules]
    assert len(paths) == 3 * 7
    assert all(".language_model.layers." in path or ".text_model.layers." in path for path in paths)


def test_families_on_the_command_line() -> None:
    run = CliRunner().invoke(app, ["families", "t5", "mixtral", "--json"])
    assert run.exit_code == 0
    t5, mixtral = json.loads(run.stdout)
    assert t5["methods"]["MLPs"] == {"works": "yes", "reason": ""}
    assert t5["methods"]["codebooks"]["works"] == "partly" and "wo.weight" in t5["methods"]["codebooks"]["reason"]
    assert t5["methods"]["sharing"]["works"] == "no" and "one list of blocks" in t5["methods"]["sharing"]["reason"]
    assert mixtral["methods"]["MLPs"]["works"] == mixtral["methods"]["codebooks"]["works"] == "yes"
    assert sum(mixtral["left_dense"].values()) < 0.01

    table = CliRunner().invoke(app, ["families", "llama", "t5", "--reasons"]).stdout
    assert "| llama " in table and "t5: sharing: layers are shared within one list" in table
    wrong = CliRunner().invoke(app, ["families", "lama"])
    assert wrong.exit_code == 2 and "no anatomy record" in wrong.stderr


def test_the_battery_has_every_family_that_it_should() -> None:
    """A record without a tiny model here or in another battery is a promise that nobody keeps."""
    import conftest
    import encoders

    def types(configs: Any) -> set[str]:
        return {make_config().model_type for make_config in configs.values()}

    here = types(DECODERS) | types(families.ENCODERS) | types(conftest.FAMILIES) | types(encoders.ENCODERS)
    same_classes = {
        "xlm-roberta", "camembert", "hubert", "mbart", "pegasus", "blenderbot", "blenderbot-small", "mt5",
        "siglip_text_model", "speech_to_text",
    }  # fmt: skip
    found = hf_compress.families(sorted(same_classes))
    assert all(family.architecture and family.methods["codebooks"].works != "no" for family in found)
    assert set(known_model_types()) - here == same_classes | {"resnet"}
