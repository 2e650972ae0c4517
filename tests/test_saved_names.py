"""Resuming trainings of models that Transformers saves under other names than their modules have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

import hf_compress
from hf_compress import (
    CalibrationConfig,
    CodebookConfig,
    DistillationConfig,
    DistillationTrainer,
    LayerSharingConfig,
    ModularDecompositionConfig,
    PruningCallback,
    PruningConfig,
    RandomStepCallback,
)
from hf_compress.saved_names import accept_saved_names

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "num_labels": 3,
}


def vit() -> PreTrainedModel:
    set_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=64))


def dinov2() -> PreTrainedModel:
    set_seed(0)
    return Dinov2ForImageClassification(Dinov2Config(**SIZES))


MODELS = [vit, dinov2]


def arguments(directory: Path, **fields: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **fields,
    }


def rows() -> list[dict[str, Any]]:
    pixels = torch.randn(32, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(pixels)]


def pruning(model: PreTrainedModel, directory: Path, **fields: Any) -> Trainer:
    recipe = PruningConfig(
        sparsity=0.8, criterion="sensitivity", schedule="cubic", start_step=1, end_step=6, update_interval=1
    )
    args = TrainingArguments(**arguments(directory, **fields))
    return Trainer(model, args, train_dataset=rows(), eval_dataset=rows()[:4], callbacks=[PruningCallback(recipe)])


def distilling(model: PreTrainedModel, directory: Path, **fields: Any) -> Trainer:
    args = DistillationConfig(**arguments(directory, **fields))
    return DistillationTrainer(
        model, vit() if isinstance(model, ViTForImageClassification) else dinov2(), args, train_dataset=rows()
    )


def sharing(model: PreTrainedModel, directory: Path, **fields: Any) -> Trainer:
    hf_compress.compress(model, LayerSharingConfig(unique_layers=2))
    args = TrainingArguments(**arguments(directory, **fields))
    return Trainer(model, args, train_dataset=rows(), callbacks=[RandomStepCallback(2)])


def healing(model: PreTrainedModel, directory: Path, **fields: Any) -> Trainer:
    """A compressed model, part of which is dense, in a plain Trainer without a callback of ours."""
    data = Dataset.from_list(rows())
    source = CalibrationConfig(data, num_samples=24, num_held_out=4, data_collator=default_data_collator)
    hf_compress.compress(model, ModularDecompositionConfig(reduction=0.2, kinds=["mlp"], calibration=source))
    return Trainer(model, TrainingArguments(**arguments(directory, **fields)), train_dataset=rows())


def coded(model: PreTrainedModel, directory: Path, **fields: Any) -> Trainer:
    """The same, where every matrix of the blocks has another name in the file."""
    hf_compress.compress(model, CodebookConfig(bits=4, learning="none", trainable_codebooks=True))
    return Trainer(model, TrainingArguments(**arguments(directory, **fields)), train_dataset=rows())


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("train", [pruning, distilling, sharing, healing, coded])
def test_resuming_brings_back_everything(
    train: Callable[..., Trainer], make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    whole = train(make(), tmp_path / "whole")
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert not saved.keys() <= whole.model.state_dict().keys()
    resumed = train(make(), tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, one), (again, other) in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True
    ):
        assert name == again
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_the_best_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    fields = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # not the last one, which the model is already
        "max_steps": 16,
    }
    run = pruning(dinov2(), tmp_path, **fields)
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None and Path(best).name != "checkpoint-16"
    stored = Dinov2ForImageClassification.from_pretrained(best).state_dict()
    dense = run.model.dequantize().state_dict()
    assert any("attention" in name for name in dense)
    for name, tensor in dense.items():
        torch.testing.assert_close(tensor, stored[name], rtol=1e-2, atol=1e-3)  # values in half precision


def test_a_diverged_model_takes_back_a_good_state(tmp_path: Path) -> None:
    model = hf_compress.compress(vit(), PruningConfig(sparsity=0.5, criterion="magnitude"))
    model.save_pretrained(tmp_path)
    layer = next(module for module in model.modules() if hasattr(module, "kept_values"))
    with torch.no_grad():
        layer.values.fill_(float("nan"))
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.isfinite(layer.values).all()


def test_a_tied_embedding_keeps_its_name(tmp_path: Path) -> None:
    def make() -> PreTrainedModel:
        set_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
        return hf_compress.compress(model, PruningConfig(sparsity=0.5, criterion="magnitude"))

    model, other = make(), make()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(2)
    model.save_pretrained(tmp_path)
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False, assign=True)
    assert found.missing_keys == ["lm_head.weight"]
    other.tie_weights()
    assert torch.equal(other.transformer.wte.weight, model.transformer.wte.weight)


def test_a_matrix_of_which_nothing_is_left_keeps_its_name(tmp_path: Path) -> None:
    model = vit()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name:
                parameter.zero_()
    hf_compress.compress(model, PruningConfig(sparsity=0.9, criterion="magnitude"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert any(not tensor.numel() for tensor in state.values())
    model.load_state_dict(state)


def test_matrices_that_were_joined_for_the_file_are_cut_again(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model, other = (NomicBertModel(NomicBertConfig(vocab_size=64, **sizes)) for _ in range(2))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert any("Wqkv" in name for name in state) and not any("Wqkv" in name for name in model.state_dict())
    accept_saved_names(other)
    other.load_state_dict(state)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
