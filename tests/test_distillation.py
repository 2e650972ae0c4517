"""Distillation, random steps, recovery."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import calibration, compress_with, compressed, logits, make_model, token_ids
from test_pruning import classifier
from test_sharing import albert, shared
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import hf_compress
from hf_compress import DistillationConfig, DistillationTrainer, RandomStepCallback, recover
from hf_compress.layout import layout_of
from hf_compress.methods.sharing.stepping import running_blocks
from hf_compress.training.divergence import divergence, log_probabilities, top_classes, with_the_rest

ROWS = [{"input_ids": row, "labels": row} for row in token_ids(16, 16)]


def arguments(directory: Path, **fields: Any) -> DistillationConfig:
    return DistillationConfig(
        **{
            "output_dir": str(directory),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            **fields,
        }
    )


def trainer(student: Any, teacher: Any, directory: Path, **fields: Any) -> DistillationTrainer:
    options = {name: fields.pop(name) for name in ("peft_config", "callbacks") if name in fields}
    rows = fields.pop("rows", ROWS)
    return DistillationTrainer(
        student, teacher, arguments(directory, **fields), train_dataset=rows, eval_dataset=rows[:8], **options
    )


def random_log_probabilities(seed: int, classes: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return log_probabilities(3 * torch.randn(5, classes, generator=generator), 1.0)


def test_divergences_against_torch_and_by_hand() -> None:
    student, teacher = random_log_probabilities(0), random_log_probabilities(1)
    kl = torch.nn.functional.kl_div
    forward = kl(student, teacher, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(student, teacher, "forward_kl"), forward)
    reverse = kl(teacher, student, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(student, teacher, "reverse_kl"), reverse)
    mean = 0.5 * (student.exp() + teacher.exp())
    jensen = 0.5 * sum((p.exp() * (p - mean.log())).sum(-1) for p in (student, teacher))
    torch.testing.assert_close(divergence(student, teacher, "jensen_shannon"), jensen)
    certain = torch.tensor([[0.0, -torch.inf]])
    half = torch.tensor([[math.log(0.5)] * 2])
    assert divergence(half, certain, "forward_kl").item() == pytest.approx(math.log(2))
    for kind in ("forward_kl", "reverse_kl", "jensen_shannon"):
        torch.testing.assert_close(divergence(student, student, kind), torch.zeros(5), atol=1e-6, rtol=0)


def test_the_likeliest_classes_and_the_rest() -> None:
    teacher = random_log_probabilities(1)
    classes, values = top_classes(teacher, 3)
    whole = with_the_rest(values)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(5))
    student = with_the_rest(random_log_probabilities(0).gather(-1, classes))
    # Grouping classes can only lose divergence.
    assert (
        divergence(student, whole, "forward_kl")
        <= divergence(random_log_probabilities(0), teacher, "forward_kl") + 1e-6
    ).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_the_loss_is_the_sum_of_its_terms(kind: str, tmp_path: Path) -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama")
    run = trainer(student, teacher, tmp_path, divergence=kind, temperature=3.0, kl_weight=0.7, hidden_state_weight=0.4)
    ids = token_ids(3, 12)
    labels = ids.clone()
    labels[0, :6] = -100
    student.train()
    found = run.compute_loss(student, {"input_ids": ids, "labels": labels})
    own = student(ids, labels=labels, output_hidden_states=True)
    theirs = teacher(ids, output_hidden_states=True)
    wanted = labels[:, 1:] != -100
    first = torch.log_softmax(own.logits[:, :-1][wanted] / 3, -1)
    second = torch.log_softmax(theirs.logits[:, :-1][wanted] / 3, -1)
    expected = 0.7 * 9 * divergence(first, second, kind).mean() + 0.3 * own.loss
    states = [
        ((a - b).square().mean(-1) / b.square().mean(-1)).mean()
        for a, b in zip(own.hidden_states, theirs.hidden_states, strict=True)
    ]
    torch.testing.assert_close(found, expected + 0.4 * torch.stack(states).mean())


@pytest.mark.parametrize("method", ["modular", "pruning", "sharing"])
def test_any_compressed_student_comes_nearer(method: str, tmp_path: Path) -> None:
    student = compress_with(method, "llama")
    teacher = make_model("llama")
    run = trainer(student, teacher, tmp_path, max_steps=60, kl_weight=1.0, temperature=1.0, learning_rate=2e-3)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_divergence"] < 0.8 * before["eval_divergence"]
    assert after["eval_teacher_loss"] == pytest.approx(before["eval_teacher_loss"])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    student.save_pretrained(tmp_path / "out")
    again = type(student).from_pretrained(tmp_path / "out")
    # Sparse values are saved in float16.
    torch.testing.assert_close(logits(again), logits(student.eval()), rtol=1e-2, atol=1e-2)


def test_an_adapter_on_codes(tmp_path: Path) -> None:
    student = compress_with("codebook", "llama")
    student.save_pretrained(tmp_path / "coded")
    run = trainer(
        student,
        make_model("llama"),
        tmp_path,
        max_steps=40,
        kl_weight=1.0,
        peft_config=peft.LoraConfig(target_modules="all-linear", r=4),
    )
    before = run.evaluate()["eval_divergence"]
    run.train()
    assert run.evaluate()["eval_divergence"] < 0.9 * before


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        student = make_model("llama", seed=1)
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        trainer(student, make_model("llama"), tmp_path, max_steps=2, **fields).train()
        found.append(torch.cat([parameter.detach().flatten() for parameter in student.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_teacher_by_name_and_left_padding(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "teacher")
    student = make_model("llama", seed=1)
    ids = token_ids(4, 12)
    mask = torch.ones_like(ids)
    mask[:2, :5] = 0
    run = trainer(student, str(tmp_path / "teacher"), tmp_path)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:2, 5] = -100  # the first token of a text is judged at the place of the padding before it
    padded = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    other = {**padded, "input_ids": ids.masked_fill(mask == 0, 3)}
    student.train()
    torch.testing.assert_close(run.compute_loss(student, padded), run.compute_loss(student, other))


@pytest.mark.parametrize("kind", ["language", "classes"])
def test_the_cache_lets_the_teacher_run_once(kind: str, tmp_path: Path) -> None:
    if kind == "language":
        teacher, student, rows = make_model("llama"), make_model("llama", seed=1), ROWS
    else:
        teacher = classifier()
        student = copy.deepcopy(teacher)
        with torch.no_grad():
            student.classifier.weight.mul_(0.1)
        images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        rows = [{"pixel_values": image, "labels": index % 10} for index, image in enumerate(images)]
    calls: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    fields = {"teacher_top_k": 5, "rows": rows, "num_train_epochs": 1, "max_steps": -1}
    first, second, plain = (copy.deepcopy(student) for _ in range(3))
    trainer(first, teacher, tmp_path, teacher_cache=str(tmp_path / "cache"), **fields).train()
    assert len(calls) == 4
    trainer(second, teacher, tmp_path, teacher_cache=str(tmp_path / "cache"), **fields).train()
    assert len(calls) == 4
    trainer(plain, teacher, tmp_path, **fields).train()
    for own, other, direct in zip(first.parameters(), second.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other)
        torch.testing.assert_close(own, direct)
    with pytest.raises(hf_compress.ConfigurationError, match="other settings: temperature"):
        trainer(first, teacher, tmp_path, teacher_cache=str(tmp_path / "cache"), temperature=1.0, **fields)


def test_texts_of_unequal_length_are_padded_with_their_labels(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": ids[: 5 + index], "labels": ids[: 5 + index]} for index, ids in enumerate(token_ids(8, 16))]
    rows = [{name: ids.tolist() for name, ids in row.items()} for row in rows]
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.eos_token or padding.convert_ids_to_tokens(0)
    run = DistillationTrainer(
        make_model("llama", seed=1),
        make_model("llama"),
        arguments(tmp_path, max_steps=2),
        train_dataset=rows,
        processing_class=padding,
    )
    assert math.isfinite(run.train().training_loss)


def test_no_place_outweighs_all_others(tmp_path: Path) -> None:
    """A language model's first token has states a thousand times as long; elsewhere there may be none."""
    run = trainer(make_model("llama", seed=1), make_model("llama"), tmp_path, hidden_state_weight=1.0)
    theirs = [torch.ones(2, 8, 32) for _ in run.layer_pairs]
    for state in theirs:
        state[0, 0] = 1000
    wrong = [state.clone() for state in theirs]
    for state in wrong:
        state[1, 3] = 3
    torch.testing.assert_close(run._hidden_states(wrong, theirs, None), torch.tensor(4 / 16))
    for state in theirs:
        state[1, 3] = 0
    torch.testing.assert_close(run._hidden_states(wrong, theirs, None), torch.tensor(9 * 100 / 16))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_hidden_states_of_fewer_iterations_are_compared_by_time(who: str, tmp_path: Path) -> None:
    few = shared(inference_iterations=2)
    student, teacher = (few, make_model("llama")) if who == "student" else (make_model("llama", seed=1), few)
    callbacks = [RandomStepCallback(2)] if who == "student" else []
    run = trainer(student, teacher, tmp_path, hidden_state_weight=0.5, callbacks=callbacks)
    student.train()
    found = run.compute_loss(student, {"input_ids": token_ids(2, 8), "labels": token_ids(2, 8)})
    assert torch.isfinite(found)
    run.train()


def test_left_padding_from_the_cache_is_as_without(tmp_path: Path) -> None:
    ids, mask = token_ids(4, 12), torch.ones(4, 12, dtype=torch.long)
    mask[:2, :5] = 0
    rows = [
        {"input_ids": row, "attention_mask": own, "labels": row.masked_fill(own == 0, -100)}
        for row, own in zip(ids, mask, strict=True)
    ]
    student, teacher = make_model("llama", seed=1), make_model("llama")
    fields = {"rows": rows, "teacher_top_k": 5, "teacher_cache": str(tmp_path / "cache")}
    run = trainer(student, teacher, tmp_path, **fields)
    first, second = run.evaluate(), run.evaluate()
    assert second["eval_divergence"] == pytest.approx(first["eval_divergence"], rel=1e-5)
    assert second["eval_teacher_loss"] == pytest.approx(first["eval_teacher_loss"])
    with pytest.raises(hf_compress.ConfigurationError, match="other settings: weights"):
        trainer(student, make_model("llama", seed=2), tmp_path, **fields)


def test_evaluation_without_labels_and_with_a_last_batch_that_is_smaller(tmp_path: Path) -> None:
    student, teacher = make_model("llama", seed=1), make_model("llama")
    run = trainer(student, teacher, tmp_path, per_device_eval_batch_size=4)
    whole = trainer(student, teacher, tmp_path, per_device_eval_batch_size=7).evaluate(ROWS[:7])
    parts = run.evaluate(ROWS[:7])
    for name in ("eval_teacher_loss", "eval_divergence"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)
    bare = [{"input_ids": row["input_ids"]} for row in ROWS[:8]]
    unlabelled = run.evaluate(bare)
    assert unlabelled["eval_loss"] == pytest.approx(unlabelled["eval_divergence"], rel=1e-5)
    nothing = {"input_ids": token_ids(2, 8), "labels": torch.full((2, 8), -100)}
    assert run._divergence(nothing, student(nothing["input_ids"]).logits, torch.zeros(16, dtype=torch.bool))[0] == 0


def narrow_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, max_position_embeddings=128, **sizes))


def test_projections_between_widths_train_and_resume(tmp_path: Path) -> None:
    fields = {"hidden_state_weight": 1.0, "kl_weight": 0.0, "save_strategy": "steps", "save_steps": 2}
    student = narrow_llama()
    run = trainer(student, make_model("llama"), tmp_path, **fields)
    assert run.layer_pairs == [(0, 0), (1, 2), (2, 4)]
    before = copy.deepcopy(run.projections.state_dict())
    run.train()
    assert all(not torch.equal(before[name], tensor) for name, tensor in run.projections.state_dict().items())
    resumed = trainer(narrow_llama(), make_model("llama"), tmp_path, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in run.projections.state_dict().items():
        torch.testing.assert_close(resumed.projections.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    run.save_model(str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*projections*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"kl_weight": 1.5}, "kl_weight"),
        ({"hidden_state_weight": -1.0}, "hidden_state_weight"),
        ({"divergence": "kl"}, "divergence"),
        ({"teacher_cache": "x"}, "teacher_top_k"),
        ({"teacher_cache": "x", "teacher_top_k": 5, "hidden_state_weight": 1.0}, "no hidden states"),
    ],
)
def test_arguments_that_make_no_sense(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=message):
        arguments(tmp_path, **fields)


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    other = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(hf_compress.ConfigurationError, match="different vocabularies: 96 and 50"):
        trainer(make_model("llama"), other, tmp_path)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(hf_compress.ConfigurationError, match="different vocabularies"):
        trainer(make_model("llama"), str(tmp_path / "other"), tmp_path)
    same = make_model("llama")
    for student, teacher, fields, message in (
        (same, same, {}, "one model"),
        (same, make_model("llama"), {"teacher_top_k": 96}, "teacher_top_k"),
        (same, make_model("llama"), {"teacher_top_k": 0}, "teacher_top_k"),
        (same, make_model("llama"), {"label_smoothing_factor": 0.1}, "label_smoothing"),
        (same, make_model("llama").model, {}, "same task"),
        (None, same, {}, "model_init"),
    ):
        with pytest.raises(hf_compress.ConfigurationError, match=message):
            trainer(student, teacher, tmp_path, **fields)
    with pytest.raises(hf_compress.ConfigurationError, match="`teacher_model` is missing"):
        trainer(make_model("llama"), None, tmp_path)
    with pytest.raises(hf_compress.ConfigurationError, match="names the pair"):
        trainer(make_model("llama"), make_model("llama"), tmp_path, hidden_state_weight=1.0, layer_mapping=[[0, 9]])
    with pytest.raises(hf_compress.ConfigurationError, match="expected a DistillationConfig"):
        DistillationTrainer(make_model("llama"), make_model("llama"), TrainingArguments(output_dir=str(tmp_path)))


@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_random_steps_in_training_and_all_loops_in_evaluation(per_micro_batch: bool, tmp_path: Path) -> None:
    student, seen, evaluated = shared(), [], []

    class Watch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(running_blocks(kwargs["model"]).iterations)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(running_blocks(kwargs["model"]).iterations)

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            evaluated.append(running_blocks(kwargs["model"]).iterations)

    fields = {
        "max_steps": 12,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "callbacks": [Watch(), RandomStepCallback(2, per_micro_batch=per_micro_batch)],
    }
    trainer(student, make_model("llama"), tmp_path, **fields).train()
    first = list(seen)
    assert set(first) == {2, 3, 4}
    assert set(evaluated) == {4}
    assert running_blocks(student).iterations == 4
    pairs = list(zip(first[::2], first[1::2], strict=True))
    assert all(a == b for a, b in pairs) is not per_micro_batch
    seen.clear()
    trainer(shared(), make_model("llama"), tmp_path, **fields).train()
    assert seen == first


def test_draws_follow_weights_and_grow_from_coarse_to_fine() -> None:
    callback = RandomStepCallback(1, weights={2: 3.0, 4: 1.0})
    callback.on_train_begin(None, None, None, model=shared())
    drawn = [callback.draw(step, 2000, 0, 0) for step in range(2000)]
    assert drawn.count(2) / len(drawn) == pytest.approx(0.75, abs=0.04)
    assert set(drawn) == {2, 4}
    growing = RandomStepCallback(1, coarse_to_fine=1.0)
    growing.on_train_begin(None, None, None, model=shared())
    drawn = [growing.draw(step, 300, 0, 0) for step in range(300)]
    assert set(drawn[:50]) == {1}
    assert max(drawn[:199]) < 4
    assert 4 in drawn[250:] or growing.draw(300, 300, 0, 1) <= 4


def test_random_steps_need_shared_layers(tmp_path: Path) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match="no shared layers"):
        trainer(make_model("llama"), make_model("llama"), tmp_path, callbacks=[RandomStepCallback(2)]).train()
    with pytest.raises(hf_compress.ConfigurationError, match="expected 1 to 4"):
        trainer(shared(), make_model("llama"), tmp_path, callbacks=[RandomStepCallback(5)]).train()
    with pytest.raises(hf_compress.ConfigurationError, match="coarse_to_fine"):
        RandomStepCallback(2, coarse_to_fine=2.0)
    run = trainer(
        shared(unique_layers=2), make_model("llama"), tmp_path, callbacks=[RandomStepCallback(2, weights={3: 1.0})]
    )
    with pytest.raises(hf_compress.ConfigurationError, match="multiple of 2"):
        run.train()
    assert albert() is not None


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recover(method: str, tmp_path: Path) -> None:
    student, teacher = compressed("llama"), make_model("llama")
    before = (logits(student) - logits(teacher)).square().mean()
    source = calibration(num_samples=16, num_held_out=0)
    rate = 3e-3 if method == "lora" else 2e-4
    options = {"max_steps": 40, "use_cpu": True, "disable_tqdm": True, "learning_rate": rate, "kl_weight": 1.0}
    result = recover(student, teacher, source, method=method, lora_rank=4, **options)
    assert result is student
    assert layout_of(result)
    assert (logits(result) - logits(teacher)).square().mean() < 0.9 * before
    result.save_pretrained(tmp_path)
    assert torch.equal(logits(type(result).from_pretrained(tmp_path)), logits(result))


def test_recovering_codes_keeps_the_adapter() -> None:
    student = compress_with("codebook", "llama")
    options = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True}
    result = recover(student, make_model("llama"), ROWS, lora_rank=4, **options)
    assert isinstance(result, peft.PeftModel)
    with pytest.raises(hf_compress.ConfigurationError, match='"lora" or "full"'):
        recover(student, make_model("llama"), ROWS, method="fast")  # type: ignore[arg-type]


def test_the_trainer_is_imported_only_where_it_is_used() -> None:
    code = "import sys, hf_compress; assert 'transformers.trainer' not in sys.modules; hf_compress.recover"
    subprocess.run([sys.executable, "-c", code], check=True)
