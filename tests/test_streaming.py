"""From files to files, block by block: the same result as in memory, bit for bit."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import ALL_KINDS, calibration, interrupt, logits, make_model, recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_compress
from hf_compress import (
    CheckpointError,
    CodebookConfig,
    CompressionConfig,
    CompressionError,
    ConfigurationError,
    LayerSharingConfig,
    NumericalError,
    PruningConfig,
    ResumeError,
    UnsupportedModelError,
)
from hf_compress.cli import app
from hf_compress.engine import residency as residency_module
from hf_compress.methods.modular import method as modular_method
from hf_compress.output import whole_folder

ON_DISK = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"} | {
    "model.layers": "disk"
}
RECIPES: dict[str, Any] = {
    "modular": lambda: recipe(kinds=ALL_KINDS),
    "modular, auto": lambda: recipe(),
    "modular, sequential": lambda: recipe(kinds=ALL_KINDS, order="sequential"),
    "portable": lambda: recipe(portable=True),
    "codebook": lambda: CodebookConfig(bits=3, calibration=calibration()),
    "codebook, tables": lambda: CodebookConfig(
        bits={"mlp": 2, "query_key": 1.58, "embedding": 4}, calibration=calibration()
    ),
    "codebook, no data": lambda: CodebookConfig(bits=4, learning="none"),
    "codebook, tuned": lambda: CodebookConfig(
        bits=2, block_epochs=1, reorder_channels=True, calibration=calibration()
    ),
    "wanda": lambda: PruningConfig(sparsity=0.5, criterion="wanda", calibration=calibration()),
    "stack": lambda: CompressionConfig(
        stages=[recipe(calibration=None), CodebookConfig(bits=3)], calibration=calibration()
    ),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model in several files."""
    make_model("llama").save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    return tmp_path / "dense"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def in_memory(checkpoint: Path, config: Any, out: Path) -> Path:
    model = hf_compress.compress(AutoModelForCausalLM.from_pretrained(checkpoint), config)
    model.save_pretrained(out)
    return out


def assert_same(first: Path, second: Path) -> None:
    before, after = tensors_of(first), tensors_of(second)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert config_of(first) == config_of(second)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_run_in_memory(
    name: str, on_disk: bool, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    if on_disk:
        monkeypatch.setattr("hf_compress.engine.streaming._must_spill", lambda *_: True)
    report = hf_compress.compress_checkpoint(
        checkpoint, tmp_path / "streamed", RECIPES[name](), max_memory="64GB", device="cpu"
    )
    assert_same(in_memory(checkpoint, RECIPES[name](), tmp_path / "whole"), tmp_path / "streamed")
    assert report.bytes_after < report.bytes_before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert torch.isfinite(logits(loaded)).all()
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "streamed", "whole"}, "no scratch is left"


def test_no_more_than_one_block_is_in_memory(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    present: list[int] = []
    real = modular_method.compress_block

    def watched(anatomy: Any, *args: Any) -> Any:
        blocks = [anatomy.block(index) for index in range(len(anatomy))]
        present.append(sum(not any(p.is_meta for p in block.parameters()) for block in blocks))
        return real(anatomy, *args)

    monkeypatch.setattr(modular_method, "compress_block", watched)
    hf_compress.compress_checkpoint(checkpoint, tmp_path / "out", recipe(), device="cpu")
    assert present == [1] * 4


@pytest.mark.parametrize("name", ["modular", "modular, sequential", "stack", "codebook, tuned"])
@pytest.mark.parametrize("stop_at", [0, 2])
def test_an_interrupted_run_goes_on(
    name: str, stop_at: int, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def run(folder: str, **options: Any) -> None:
        hf_compress.compress_checkpoint(checkpoint, tmp_path / folder, RECIPES[name](), device="cpu", **options)

    run("whole")
    kept = residency_module.Residency.moved
    with monkeypatch.context() as patch:
        patch.setattr(
            residency_module.Residency,
            "moved",
            lambda self, block, file: interrupt() if block == stop_at else kept(self, block, file),
        )
        with pytest.raises(KeyboardInterrupt):
            run("out", working_directory=tmp_path / "work")
    assert not (tmp_path / "out").exists()
    run("out", working_directory=tmp_path / "work")
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(("family", "part"), [("gemma2", "embedding"), ("llama", "head")])
def test_tables_and_heads_are_coded_for_their_inputs(family: str, part: str, tmp_path: Path) -> None:
    """They are those of the whole model, which is not in memory."""
    make_model(family).save_pretrained(tmp_path / "dense")
    config = CodebookConfig(bits={"mlp": 3, part: 4}, calibration=calibration())
    hf_compress.compress_checkpoint(tmp_path / "dense", tmp_path / "streamed", config, device="cpu")
    assert_same(in_memory(tmp_path / "dense", config, tmp_path / "whole"), tmp_path / "streamed")


def test_a_run_in_memory_goes_on_block_by_block(checkpoint: Path, tmp_path: Path) -> None:
    """What a user does whose first run was stopped for its memory."""
    work = tmp_path / "work"
    model = hf_compress.compress(AutoModelForCausalLM.from_pretrained(checkpoint), recipe(), working_directory=work)
    model.save_pretrained(tmp_path / "whole")
    (work / "stage-0" / "block-00003.safetensors").unlink()
    hf_compress.compress_checkpoint(checkpoint, tmp_path / "out", recipe(), working_directory=work, device="cpu")
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_a_block_that_is_offloaded_in_part(checkpoint: Path, tmp_path: Path) -> None:
    parts = {f"model.layers.{index}": "cpu" for index in range(1, 4)}
    parts |= {f"model.layers.0.{name}": "cpu" for name in ("self_attn", "input_layernorm", "post_attention_layernorm")}
    device_map = {**ON_DISK, **parts, "model.layers.0.mlp": "disk"}
    del device_map["model.layers"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=device_map)
    whole = hf_compress.compress(AutoModelForCausalLM.from_pretrained(checkpoint), recipe(kinds=ALL_KINDS))
    hf_compress.compress(model, recipe(kinds=ALL_KINDS), working_directory=tmp_path / "work")
    assert torch.equal(logits(model), logits(whole))


def test_a_whole_model_that_is_offloaded(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    cpu_offload(model, torch.device("cpu"))
    hf_compress.compress(model, recipe(), working_directory=tmp_path / "work")
    assert torch.equal(logits(model), logits(hf_compress.compress(make_model("llama"), recipe())))
    with pytest.raises(CompressionError, match="load it whole"):
        model.dequantize()
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    cpu_offload(other, torch.device("cpu"))
    with pytest.raises(ConfigurationError, match="has to be on a device"):
        hf_compress.compress(other, CodebookConfig(bits={"mlp": 3, "embedding": 4}, learning="none"))


def test_where_the_result_goes(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """An empty folder, a link to one, and the folder that the user is in."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    hf_compress.compress_checkpoint(checkpoint, tmp_path / "link", recipe(), device="cpu")
    assert (tmp_path / "real" / "config.json").exists() and (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hf_compress.compress_checkpoint(checkpoint, ".", recipe(), device="cpu")
    assert (tmp_path / "here" / "config.json").exists()
    with pytest.raises(ConfigurationError, match="lies in"):
        hf_compress.compress_checkpoint(
            checkpoint, tmp_path / "out", recipe(), working_directory=tmp_path / "out" / "work"
        )
    with pytest.raises(ConfigurationError, match="name one"):
        hf_compress.compress_checkpoint(checkpoint, tmp_path / "out", recipe(), keep_activations=True)


def test_a_finished_result_is_never_lost(tmp_path: Path, monkeypatch: Any) -> None:
    """The last move fails: the folder stays, and the message says where. A mount point is filled instead."""

    def refuse(*_: Any) -> None:
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(CompressionError, match=r"\.out\.writing"), whole_folder(tmp_path / "out") as scratch:
            (scratch / "config.json").write_text("{}")
    assert (tmp_path / ".out.writing" / "config.json").exists()
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(Path, "rmdir", lambda self: refuse() if self.name == "mount" else os.rmdir(self))
    with whole_folder(tmp_path / "mount") as scratch:
        (scratch / "config.json").write_text("{}")
    assert (tmp_path / "mount" / "config.json").exists() and not (tmp_path / ".mount.writing").exists()


def test_a_plan_advises_streaming_only_where_it_works() -> None:
    model = make_model("llama")
    # So few data that there are no fewer.
    streams = hf_compress.plan(model, recipe(calibration=calibration(num_samples=4, batch_size=1)))
    assert streams.streamed_memory_at_least is not None
    assert streams.streamed_memory_at_least <= (streams.streamed_memory or 0) < streams.peak_memory
    with pytest.raises(ConfigurationError, match="--max-memory"):
        streams.require_memory(streams.streamed_memory_at_least)
    shared = hf_compress.plan(model, LayerSharingConfig(unique_layers=2))
    assert shared.streamed_memory is None
    with pytest.raises(ConfigurationError, match="larger machine"):
        shared.require_memory(2**20)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("name", ["modular", "codebook, tables", "wanda", "stack"])
def test_a_model_offloaded_to_disk_is_compressed_in_place(
    name: str, offload_buffers: bool, checkpoint: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=ON_DISK, offload_buffers=offload_buffers)
    hf_compress.compress(model, RECIPES[name]())
    whole = hf_compress.compress(AutoModelForCausalLM.from_pretrained(checkpoint), RECIPES[name]())
    assert all(parameter.is_meta for parameter in model.model.layers.parameters()), "it is offloaded still"
    assert torch.equal(logits(model), logits(whole))
    assert torch.equal(logits(model), logits(whole)), "the second call fetches the blocks again"
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.generate(ids, max_new_tokens=5), whole.generate(ids, max_new_tokens=5))
    model.save_pretrained(tmp_path / "out")
    whole.save_pretrained(tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_replaced_modules_do_not_stay_in_memory(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    dense: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = modular_method.compress_block

    def watched(anatomy: Any, config: Any, block: int, *args: Any) -> Any:
        alive.append(sum(reference() is not None for reference in dense))
        matrices = [anatomy.model.get_submodule(path) for path, _ in anatomy.block_matrices(block)]
        dense.extend(weakref.ref(matrix) for matrix in matrices)
        return real(anatomy, config, block, *args)

    monkeypatch.setattr(modular_method, "compress_block", watched)
    config = recipe(kinds=ALL_KINDS, allocation="uniform")
    model = make_model("llama")
    gc.disable()  # weights that wait for Python to look for cycles take memory
    try:
        hf_compress.compress_checkpoint(checkpoint, tmp_path / "out", config, device="cpu")
        dense.clear()
        hf_compress.compress(model, config)
    finally:
        gc.enable()
    assert alive == [0] * 8


def test_compression_while_loading_an_offloaded_model(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, compression_config=recipe(), device_map=ON_DISK)
    assert torch.equal(logits(model), logits(hf_compress.compress(make_model("llama"), recipe())))


def test_the_folder_of_an_offloaded_result_goes_with_the_model(checkpoint: Path, monkeypatch: Any) -> None:
    made: list[Path] = []
    folder = residency_module.Residency.folder
    monkeypatch.setattr(residency_module.Residency, "folder", lambda self: made.append(folder(self)) or made[-1])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=ON_DISK)
    hf_compress.compress(model, recipe())
    assert made[0].is_dir()
    del model
    gc.collect()
    assert not made[0].exists()


def test_bad_input(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for config, message in (
        (PruningConfig(sparsity=0.5, criterion="magnitude"), "scores of all blocks"),
        (LayerSharingConfig(unique_layers=2), "several blocks"),
        (CodebookConfig(bits="auto", average_bits=3, calibration=calibration()), "gradients through all blocks"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            hf_compress.compress_checkpoint(checkpoint, out, config)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=ON_DISK)
        with pytest.raises(ConfigurationError, match=message):
            hf_compress.compress(model, config)
    with pytest.raises(ConfigurationError, match="GB even with the hidden states in files"):
        hf_compress.compress_checkpoint(checkpoint, out, recipe(), max_memory="1MB")
    with pytest.raises(ConfigurationError, match="no size such as"):
        hf_compress.compress_checkpoint(checkpoint, out, recipe(), max_memory="much")
    with pytest.raises(ConfigurationError, match="not empty"):
        hf_compress.compress_checkpoint(checkpoint, checkpoint, recipe())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(make_model("llama").config)
    with pytest.raises(UnsupportedModelError, match="has no weights"):
        hf_compress.compress(skeleton, recipe())
    assert not out.exists()


def test_a_damaged_checkpoint_leaves_the_resume_point(checkpoint: Path, tmp_path: Path) -> None:
    """A shard that is cut after the run has begun: the finished blocks stay, and a whole shard lets the run go on."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    shard = checkpoint / index["model.layers.3.mlp.down_proj.weight"]
    whole, calls = shard.read_bytes(), []
    real = modular_method.compress_block

    def cutting(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            shard.write_bytes(whole[:100])
        return real(*args)

    config = recipe(allocation="uniform", kinds=ALL_KINDS)
    options: dict[str, Any] = {"working_directory": tmp_path / "work", "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modular_method, "compress_block", cutting)
        with pytest.raises(CheckpointError, match="cannot be read"):
            hf_compress.compress_checkpoint(checkpoint, tmp_path / "out", config, **options)
    assert not (tmp_path / "out").exists()
    finished = sorted(file.name for file in (tmp_path / "work" / "stage-0").glob("block-*"))
    assert finished == ["block-00000.safetensors", "block-00001.safetensors", "block-00002.safetensors"]
    shard.write_bytes(whole)
    hf_compress.compress_checkpoint(checkpoint, tmp_path / "out", config, **options)
    assert_same(in_memory(checkpoint, config, tmp_path / "whole"), tmp_path / "out")


def test_weights_of_another_format_leave_no_copy(tmp_path: Path) -> None:
    """Accelerate writes what is not in safetensors into files of its own."""
    model = make_model("llama")
    model.config.save_pretrained(tmp_path / "dense")
    torch.save(model.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    options: dict[str, Any] = {"working_directory": tmp_path / "work", "device": "cpu"}
    hf_compress.compress_checkpoint(tmp_path / "dense", tmp_path / "out", recipe(), **options)
    assert (tmp_path / "out" / "config.json").exists()
    assert sorted(folder.name for folder in (tmp_path / "work").iterdir()) == ["stage-0"]


def test_another_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"working_directory": tmp_path / "work", "device": "cpu"}
    hf_compress.compress_checkpoint(checkpoint, tmp_path / "out", recipe(), **options)
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ResumeError, match="model"):
        hf_compress.compress_checkpoint(tmp_path / "other", tmp_path / "second", recipe(), **options)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(NumericalError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        hf_compress.compress_checkpoint(tmp_path / "dense", tmp_path / "out", recipe(), device="cpu")


STORIES = Path(__file__).parent / "data" / "stories260k"


def test_from_the_shell(tmp_path: Path) -> None:
    """The command with and without --max-memory writes the same files, tokenizer included."""
    (tmp_path / "text.txt").write_text("Once upon a time there was a little dog. It liked to play in the park. " * 200)
    options = ["--reduction", "0.2", "--kinds", "mlp", "--dataset", str(tmp_path / "text.txt")]
    options += ["--num-samples", "8", "--sequence-length", "64"]
    runner = CliRunner()
    whole = runner.invoke(app, ["run", str(STORIES), str(tmp_path / "whole"), *options])
    assert whole.exit_code == 0, whole.output
    more = ["--max-memory", "16GB", "--working-directory", str(tmp_path / "work"), "--keep-activations"]
    streamed = runner.invoke(app, ["run", str(STORIES), str(tmp_path / "streamed"), *options, *more])
    assert streamed.exit_code == 0, streamed.output
    assert_same(tmp_path / "whole", tmp_path / "streamed")
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names == {file.name for file in (tmp_path / "streamed").iterdir()} and "tokenizer.json" in names
    refused = runner.invoke(app, ["run", str(STORIES), str(tmp_path / "no"), *options, "--max-memory", "20MB"])
    assert refused.exit_code != 0 and "with the hidden states in files" in refused.output.replace("\n", " ")
    assert not (tmp_path / "no").exists()
