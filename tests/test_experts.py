"""Experts in parameters of three dimensions: every expert by its own tokens, in memory and in files as before."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXPERTS, IDS, calibration, logits, make_model, recipe, token_ids
from safetensors.torch import load_file, save_file
from test_streaming import assert_same, in_memory
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import hf_compress
from hf_compress import (
    CheckpointError,
    CodebookConfig,
    CompressionConfig,
    ConfigurationError,
    NumericalError,
    PruningConfig,
    UnsupportedModelError,
)
from hf_compress.anatomy import check_record, find_record, register_anatomy, resolve_anatomy
from hf_compress.engine.experts import ExpertStatistics, collect_experts
from hf_compress.layout import layout_of

every_family = pytest.mark.parametrize("name", sorted(EXPERTS))
MLPS: dict[str, Any] = {"kinds": ["mlp"], "allocation": "uniform"}
RECIPES: dict[str, Any] = {
    "modular": lambda: recipe(**MLPS),
    "modular, sequential": lambda: recipe(**MLPS, order="sequential"),
    "codebook": lambda: CodebookConfig(bits=3, rows_per_codebook=16, calibration=calibration()),
    "codebook, no data": lambda: CodebookConfig(bits=2, learning="none"),
    "codebook, tuned": lambda: CodebookConfig(bits=2, block_epochs=1, calibration=calibration()),
    "stack": lambda: CompressionConfig(
        stages=[recipe(**MLPS, calibration=None), CodebookConfig(bits=3)], calibration=calibration()
    ),
}
every_recipe = pytest.mark.parametrize("kind", RECIPES)


@contextmanager
def inputs_of(model: PreTrainedModel, block: int) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """What the experts of a block are called with."""
    seen: list[tuple[torch.Tensor, ...]] = []
    experts = resolve_anatomy(model).experts(block)
    assert experts is not None
    handle = experts.module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    yield seen
    handle.remove()


def routed_rows(seen: list[tuple[torch.Tensor, ...]], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of an expert and the weights of its output, one by one."""
    rows, weights = [], []
    for hidden, index, factors in seen:
        for token in range(len(hidden)):
            for place in range(index.shape[1]):
                if index[token, place] == expert:
                    rows.append(hidden[token])
                    weights.append(factors[token, place])
    return torch.stack(rows), torch.stack(weights)


@every_family
def test_every_expert_is_the_optimum_for_its_own_tokens(name: str) -> None:
    """Given the channels that it keeps, an expert's down projection is the least-squares solution over the tokens
    that the router gave it, each weighted by the router, and over the floor for experts with few."""
    ids = token_ids(40, 32)
    data = calibration(num_samples=40, num_held_out=0).model_copy(update={"dataset": ids})
    dense = make_model(name, torch.float64)
    with inputs_of(dense, 0) as seen, torch.no_grad():
        dense(ids)
    model = hf_compress.compress(make_model(name, torch.float64), recipe(**MLPS, ridge=1e-9, calibration=data))
    old, new = (resolve_anatomy(each).experts(0) for each in (dense, model))
    assert old is not None and new is not None and new.width < old.width
    tokens = [routed_rows(seen, expert) for expert in range(old.count)]
    inner = [old.inner(rows, expert) * weights[:, None] for expert, (rows, weights) in enumerate(tokens)]
    floor = sum(float(each.square().sum()) for each in inner) / old.width / sum(len(each) for each in inner)
    for expert, seen_by_it in enumerate(inner):
        alike = new.up[expert, : new.width, None] == old.up[expert, None, : old.width]
        kept = alike.all(dim=-1).float().argmax(dim=1)
        assert len(set(kept.tolist())) == new.width
        lacking = old.width**2 / (old.width + len(seen_by_it)) * floor
        rows = torch.cat((seen_by_it, lacking**0.5 * torch.eye(old.width).double()))
        best = torch.linalg.lstsq(rows[:, kept], rows @ old.down[expert].T).solution
        torch.testing.assert_close(new.down[expert].T, best, rtol=1e-4, atol=1e-5)
    error = model.compression_report.modules[0].error
    assert 0 < error < 1


@every_family
def test_nothing_removed_is_the_dense_model(name: str) -> None:
    model = make_model(name, torch.float64)
    before = logits(model)
    hf_compress.compress(model, recipe(reduction=0.0))
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


@every_family
def test_statistics_are_those_of_a_loop_over_tokens(name: str) -> None:
    model = make_model(name, torch.float64)
    experts = resolve_anatomy(model).experts(1)
    assert experts is not None
    with inputs_of(model, 1) as seen, collect_experts(experts, ("input", "inner")) as found, torch.no_grad():
        model(IDS)
        model(IDS[:1, :7])
    for expert in range(experts.count):
        if not found.tokens[expert]:
            continue
        rows, weights = routed_rows(seen, expert)
        assert len(rows) == found.tokens[expert]
        for place, values in (("input", rows), ("inner", experts.inner(rows, expert))):
            scaled = values * weights[:, None]
            torch.testing.assert_close(found.grams[place][expert], scaled.T @ scaled)  # type: ignore[index]
    assert int(found.tokens.sum()) == (IDS.numel() + 7) * 2


def test_rare_experts_get_more_of_the_floor() -> None:
    grams = [torch.eye(4).double() * 8, torch.zeros(4, 4).double(), torch.diag(torch.tensor([1.0, 1, 1, 5])).double()]
    seen = ExpertStatistics({"inner": grams, "input": [g.clone() for g in grams]}, torch.tensor([8, 0, 2]))
    flat, full = seen.floors("inner"), seen.floors("input")
    torch.testing.assert_close(flat, torch.tensor((8 + 0 + 2) / 10).double())
    torch.testing.assert_close(full, sum(grams) / 10)
    torch.testing.assert_close(seen.gram("inner", 0, flat), grams[0] + 16 / 12 * torch.eye(4).double())
    torch.testing.assert_close(seen.gram("inner", 1, flat), 4 * torch.eye(4).double())
    torch.testing.assert_close(seen.gram("input", 2, full), grams[2] + 16 / 6 * full)
    assert torch.equal(grams[1], torch.zeros(4, 4).double()), "the sums themselves stay"


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_experts_that_saw_no_token_are_named_and_compressed(kind: str) -> None:
    model, ids = make_model("qwen3_moe"), token_ids(1, 4)
    with inputs_of(model, 1) as seen:
        logits(model, ids)
    unseen = sorted(set(range(6)) - set(seen[0][1].flatten().tolist()))
    assert unseen, "eight choices leave some of six experts out"
    data = calibration(num_samples=1, num_held_out=0).model_copy(update={"dataset": ids})
    numbers = ", ".join(map(str, unseen))
    message = rf"layers\.1\.mlp\.experts: no calibration token went to {len(unseen)} of 6 experts \({numbers}\)"
    config = recipe(**MLPS) if kind == "modular" else CodebookConfig(bits=3)
    with pytest.warns(UserWarning, match=message):
        hf_compress.compress(model, config, calibration=data)
    assert torch.isfinite(logits(model)).all()


def test_few_tokens_for_most_experts_are_named() -> None:
    data = calibration(num_samples=2, num_held_out=0).model_copy(update={"dataset": token_ids(2, 32)})
    with pytest.warns(UserWarning, match=r"half of the experts got no more than \d+ tokens, and have 64 channels"):
        hf_compress.compress(make_model("mixtral"), recipe(**MLPS), calibration=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_compress.compress(make_model("mixtral"), recipe(**MLPS))


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_more_data_do_not_hurt(kind: str) -> None:
    """As many tokens as channels, the worst number for a least-squares fit, are better than an eighth of them."""
    fresh, errors = token_ids(20, 32, seed=99), []
    for count, length in ((1, 8), (1, 32), (4, 32), (20, 32)):
        data = calibration(num_samples=count, num_held_out=0).model_copy(update={"dataset": token_ids(count, length)})
        config = recipe(**MLPS) if kind == "modular" else CodebookConfig(bits=3, rows_per_codebook=16)
        dense, found = make_model("mixtral"), 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = hf_compress.compress(make_model("mixtral"), config, calibration=data)
        for block in range(4):
            with inputs_of(dense, block) as seen:
                logits(dense, fresh)
            path = resolve_anatomy(dense).experts_path(block)
            assert path is not None
            with torch.no_grad():
                wanted, got = dense.get_submodule(path)(*seen[0]), model.get_submodule(path)(*seen[0])
            found += float((got - wanted).square().sum() / wanted.square().sum()) / 4
        errors.append(found)
    assert errors[0] > errors[2] > errors[3] and errors[1] < 1.1 * errors[0], errors


def test_an_expert_without_activations_stops_nothing() -> None:
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.gate_up_proj[1] = 0
    hf_compress.compress(model, RECIPES["modular"]())
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_pickles(kind: str) -> None:
    model = hf_compress.compress(make_model("mixtral"), RECIPES[kind]())
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@pytest.mark.parametrize("second", [PruningConfig(sparsity=0.5), BitsAndBytesConfig(load_in_4bit=True)])
def test_a_stage_that_leaves_experts_alone_says_so(second: Any) -> None:
    stages = CompressionConfig(stages=[recipe(**MLPS, calibration=None), second], calibration=calibration())
    model = hf_compress.compress(make_model("mixtral"), stages)
    total = sum(parameter.numel() for parameter in make_model("mixtral").parameters())
    experts = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    line = f"mlp.experts (ResizedMixtralExperts) in 4 blocks: {experts / total:.1%} of the model's weights"
    assert any(found.startswith(line) for found in model.compression_report.left_alone)


def test_a_record_of_experts_alone() -> None:
    """Attention that no record describes leaves the experts to be decomposed."""
    record = find_record("mixtral")
    assert record is not None
    alone = replace(record, attention=None)
    register_anatomy(alone, replace=True)
    try:
        model = hf_compress.compress(make_model("mixtral"), RECIPES["modular"]())
    finally:
        register_anatomy(record, replace=True)
    assert len(model.compression_report.modules) == 4


@every_recipe
@every_family
def test_save_and_reload(name: str, kind: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model(name, torch.bfloat16), RECIPES[kind]())
    model.save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / "model.safetensors"))
    assert any(".experts.3." in key and key.endswith((".w2.weight", ".down_proj.weight")) for key in keys)
    assert not any(key.endswith("experts.down_proj") for key in keys), "files have one tensor an expert, as before"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert str(again.compression_report) == str(model.compression_report)
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(logits(again.to(dtype)), logits(model.to(dtype)))


@every_recipe
def test_plans_are_exact(kind: str) -> None:
    planned = hf_compress.plan(make_model("qwen3_moe"), RECIPES[kind](), measure_time=False)
    model = hf_compress.compress(make_model("qwen3_moe"), RECIPES[kind]())
    assert planned.bytes_on_disk == model.compression_report.bytes_after
    assert any(row.path.endswith("mlp.experts") for row in planned.rows)


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_transformers_without_the_package_stops(kind: str, tmp_path: Path) -> None:
    hf_compress.compress(make_model("mixtral"), RECIPES[kind]()).save_pretrained(tmp_path)
    script = """
import sys
sys.modules["hf_compress"] = None
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=None)
except Exception as error:
    print("stopped:", type(error).__name__, str(error)[:200])
import json
from pathlib import Path
config = Path(sys.argv[1], "config.json")
fields = json.loads(config.read_text())
del fields["quantization_config"]  # as if it were a dense model
config.write_text(json.dumps(fields))
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("mismatch:", "size" in str(error) or "mismatch" in str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    assert "stopped:" in done.stdout and "mismatch: True" in done.stdout, done.stdout + done.stderr


@every_family
def test_portable_experts_are_a_plain_model(name: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model(name), recipe(portable=True))
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch; sys.modules['hf_compress'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.load(sys.argv[2])\n"
        "torch.save(model(ids).logits.detach(), sys.argv[3])\n"
        "print(type(model.model.layers[0].mlp.experts).__name__)"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, tmp_path / "ids.pt", tmp_path / "logits.pt"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == {"mixtral": "MixtralExperts", "qwen3_moe": "Qwen3MoeExperts"}[name]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_of_transformers_runs(implementation: str, dtype: torch.dtype) -> None:
    model = hf_compress.compress(make_model("qwen3_moe", dtype), recipe(**MLPS))
    reference = logits(model.float()).clone()
    model.to(dtype).set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model).float(), reference, rtol=0.1, atol=0.1 * float(reference.abs().max()))


@pytest.mark.parametrize("kind", ["modular", "codebook", "stack"])
@every_family
def test_from_files_to_files(name: str, kind: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    hf_compress.compress_checkpoint(tmp_path / "dense", tmp_path / "streamed", RECIPES[kind](), device="cpu")
    assert_same(in_memory(tmp_path / "dense", RECIPES[kind](), tmp_path / "whole"), tmp_path / "streamed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")


@pytest.mark.parametrize("kind", ["modular", "codebook", "stack"])
def test_offloaded_to_disk_after_loading(kind: str, tmp_path: Path) -> None:
    model = hf_compress.compress(make_model("mixtral"), RECIPES[kind]())
    model.save_pretrained(tmp_path / "out")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map={**places, "model.layers": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_an_interrupted_run_goes_on(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    whole = hf_compress.compress(make_model("mixtral"), RECIPES[kind]()).state_dict()
    from hf_compress.engine.resume import ResumePoint

    keep = ResumePoint.keep

    def stop(self: Any, place: int, *arguments: Any) -> None:
        keep(self, place, *arguments)
        if place == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResumePoint, "keep", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_compress.compress(make_model("mixtral"), RECIPES[kind](), working_directory=tmp_path)
    again = hf_compress.compress(make_model("mixtral"), RECIPES[kind](), working_directory=tmp_path).state_dict()
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("kind", ["modular", "codebook"])
def test_padding_counts_for_nothing(kind: str) -> None:
    found = []
    for filler in (0, 50):
        ids, mask = token_ids(24), torch.ones(24, 32, dtype=torch.long)
        ids[::2, -9:], mask[::2, -9:] = filler, 0

        def collate(rows: list[int], ids: Any = ids, mask: Any = mask) -> dict[str, torch.Tensor]:
            return {"input_ids": ids[torch.tensor(rows)], "attention_mask": mask[torch.tensor(rows)]}

        data = hf_compress.CalibrationConfig(
            list(range(24)), data_collator=collate, num_samples=24, num_held_out=0, batch_size=8
        )
        config = recipe(**MLPS) if kind == "modular" else CodebookConfig(bits=3)
        found.append(hf_compress.compress(make_model("mixtral"), config, calibration=data).state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_data_help_every_expert() -> None:
    """Learned codes leave less of the outputs' error than nearest ones."""
    alone, learned = (
        hf_compress.compress(make_model("mixtral"), RECIPES[kind]()) for kind in ("codebook, no data", "codebook")
    )
    del alone
    nearest = hf_compress.compress(
        make_model("mixtral"), CodebookConfig(bits=3, rows_per_codebook=16, learning="none", calibration=calibration())
    )
    errors = [
        sum(row.error for row in model.compression_report.modules if ".experts." in row.path)
        for model in (nearest, learned)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_codes_train_with_their_tables() -> None:
    config = CodebookConfig(bits=3, rows_per_codebook=16, trainable_codebooks=True, learning="none")
    model = hf_compress.compress(make_model("mixtral"), config).train()
    ids = token_ids(8, 32)
    model(ids, labels=ids).loss.backward()
    tables = [(key, value) for key, value in model.named_parameters() if ".experts." in key]
    assert len(tables) == 4 * 2 * 2
    assert all(value.grad is not None and value.grad.abs().max() > 0 for _, value in tables)


@every_family
def test_the_record_describes_the_module(name: str) -> None:
    check_record(make_model(name))


def test_a_module_that_computes_something_else_is_found() -> None:
    model = make_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda hidden, index, weights: type(experts).forward(experts, hidden, index, weights.square())
    with pytest.raises(UnsupportedModelError, match="ExpertsAnatomy"):
        check_record(model)


class TestBadInput:
    def test_experts_of_another_form(self) -> None:
        model = make_model("mixtral")
        model.model.layers[2].mlp.experts.is_transposed = True
        with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.experts.*|is_transposed.*False"):
            hf_compress.compress(model, RECIPES["modular"]())
        model = make_model("mixtral")
        model.model.layers[0].mlp.experts = nn.Linear(3, 3)
        with pytest.raises(UnsupportedModelError, match="three dimensions"):
            hf_compress.compress(model, RECIPES["modular"]())

    def test_three_codes(self) -> None:
        with pytest.raises(ConfigurationError, match=r"experts.*2, 3 or 4 bits, not 1\.58"):
            hf_compress.compress(make_model("mixtral"), CodebookConfig(bits={"mlp": 1.58}, learning="none"))

    def test_average_bits(self) -> None:
        config = CodebookConfig(bits="auto", average_bits=3, calibration=calibration())
        with pytest.raises(ConfigurationError, match=r"experts.*average_bits"):
            hf_compress.compress(make_model("mixtral"), config)

    def test_weights_that_are_not_finite(self) -> None:
        model = make_model("mixtral")
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
        with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.experts"):
            hf_compress.compress(model, RECIPES["codebook, no data"]())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 0}, "width"),
            ({"width": 10**9}, "width"),
            ({"width": 16, "other": 1}, "width"),
            ({}, "width"),
        ],
    )
    def test_a_damaged_width(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        self.damage(tmp_path, "modular", change)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"up": 3}, "up"),
            ({"up": {}}, "bits"),
            ({"width": 10**9}, "width"),
            ({"extra": 3}, "extra"),
        ],
    )
    def test_damaged_codes(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        self.damage(tmp_path, "codebook", change, keep=True)
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @staticmethod
    def damage(folder: Path, kind: str, change: dict[str, Any], keep: bool = False) -> None:
        import json

        model = hf_compress.compress(make_model("mixtral"), RECIPES[kind]())
        model.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text())
        entry = next(e for e in fields["quantization_config"]["layout"] if e["path"].endswith("experts"))
        entry["spec"] = {**entry["spec"], **change} if keep else change
        (folder / "config.json").write_text(json.dumps(fields))

    def test_a_book_that_is_not_there(self, tmp_path: Path) -> None:
        hf_compress.compress(make_model("mixtral"), RECIPES["codebook"]()).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        key = next(key for key in tensors if key.endswith("down_proj_row_codebook"))
        tensors[key][1, 0] = 99
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="row_codebook"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_layouts_have_one_line_for_all_experts_of_a_block() -> None:
    model = hf_compress.compress(make_model("mixtral"), RECIPES["stack"]())
    lines = [entry for entry in layout_of(model) if "experts" in entry["path"]]
    assert [entry["path"] for entry in lines] == [f"model.layers.{block}.mlp.experts" for block in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.compression_report.bits_per_weight is not None
