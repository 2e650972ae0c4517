"""Compressed models are trained like any others: Trainer, PEFT, torch.compile."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compressed, make_model, recipe, token_ids
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

IDS = token_ids(2, 16, seed=7)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trainer(model: Any, directory: Path, steps: int, **arguments: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in token_ids(16, 16)]
    options = {
        "output_dir": str(directory),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows)


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    model = compressed("llama")
    before = logits(model)
    trainer(model, tmp_path, 4).train()
    assert not torch.equal(logits(model.eval()), before)
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits(checkpoint), logits(model))

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    trainer(fresh, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(fresh.eval()), logits(model), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    model = compressed("llama")
    result = trainer(model, tmp_path, 2, gradient_checkpointing=True).train()
    assert torch.isfinite(torch.tensor(result.training_loss))


@pytest.fixture
def saved(tmp_path: Path) -> PreTrainedModel:
    compressed("llama").save_pretrained(tmp_path / "compressed")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")


def test_lora_on_all_linear(saved: PreTrainedModel, tmp_path: Path) -> None:
    base = logits(saved)
    path = saved.name_or_path
    tuned = get_peft_model(saved, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    adapted = {name.rsplit(".", 3)[-2] for name, _ in tuned.named_modules() if name.endswith("lora_A.default")}
    names = {name.rsplit(".", 2)[-2] for name, _ in tuned.named_parameters() if "lora_A" in name}
    assert adapted or names
    layers = [name for name, module in tuned.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == 4 * 7, "all seven projections of every block, resized or inside a decomposed attention"
    trainer(tuned, tmp_path / "run", 2).train()
    tuned.eval()
    expected = logits(tuned)
    assert not torch.allclose(expected, base, atol=1e-3)
    tuned.save_pretrained(tmp_path / "adapter")
    assert tuned.peft_config["default"].base_model_name_or_path == path

    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    on_top = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    merged = on_top.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)

    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded), logits(merged))


def get_peft(model: Any, **options: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=2), **options)


ATTACH: dict[str, Callable[[Any], Any]] = {
    "get_peft_model": get_peft,
    "mixed": lambda model: get_peft(model, mixed=True),
    "prompt tuning": lambda model: get_peft_model(
        model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    ),
    "add_adapter": lambda model: model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2)),
}


@pytest.mark.parametrize("attach", list(ATTACH))
@pytest.mark.parametrize("fields", [{}, {"portable": True, "kinds": "auto"}], ids=["decomposed", "portable"])
def test_an_adapter_warns_until_the_model_is_saved(attach: str, fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"has not been saved.*model\.save_pretrained"):
        ATTACH[attach](compressed("llama", **fields))
    saved = compressed("llama", **fields)
    saved.save_pretrained(tmp_path)
    for model in (saved, AutoModelForCausalLM.from_pretrained(tmp_path), make_model("llama")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            ATTACH[attach](model)


def test_a_trained_adapter_is_loaded_without_a_warning(saved: PreTrainedModel, tmp_path: Path) -> None:
    get_peft(saved).save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(compressed("llama"), tmp_path / "adapter")


def test_an_adapter_on_an_unsaved_model_does_not_name_the_dense_base(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, compression_config=recipe())
    with pytest.warns(UserWarning, match="has not been saved"):
        tuned = get_peft(model)
    assert not tuned.peft_config["default"].base_model_name_or_path


def test_peft_is_wrapped_when_the_user_imports_it_and_not_before() -> None:
    code = (
        "import sys, hf_compress\n"
        "assert 'peft' not in sys.modules, 'imported for a user who may not need it'\n"
        "import peft\n"
        "assert hasattr(peft.PeftModel.__init__, '_hf_compress_original')\n"
        "hf_compress.integration.uninstall()\n"
        "assert not hasattr(peft.PeftModel.__init__, '_hf_compress_original')\n"
        "assert not any('hf_compress' in type(finder).__module__ for finder in sys.meta_path)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_compile_gives_the_same(family: str) -> None:
    model = compressed(family)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)
