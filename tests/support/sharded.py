"""What processes do in the tests of FSDP2: each holds a part of a compressed model and trains it with the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

STEPS, SEQUENCES = 3, 4
EPSILON = 1e-3
RATE = 1e-2
# Scales are so small that larger steps turn rounding into other losses.
RATES = {"trainable_codebooks": 1e-5}
# The rank of the LoRA adapter, for the models that train one.
ADAPTED = {"codebook_lora": 4}


def token_batches() -> torch.Tensor:
    """The same in every process: (steps, sequences, tokens)."""
    return torch.randint(3, 90, (STEPS, SEQUENCES, 12), generator=torch.Generator().manual_seed(1))


def load(folder: Path, name: str) -> Any:
    """A compressed model that is ready to be trained."""
    from transformers import AutoModelForCausalLM

    # So that every process makes the same adapter.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    if name in ADAPTED:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=ADAPTED[name], lora_alpha=32))
    return model.train()


def optimizer_of(model: nn.Module, rate: float = RATE) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Adam's own epsilon would make steps of gradients that are nothing but rounding.
    return torch.optim.AdamW(trained, lr=rate, eps=EPSILON)


def fit(model: Any, optimizer: torch.optim.Optimizer, rank: int = 0, size: int = 1) -> list[float]:
    """The loss of the whole batch before every step, of which this process computes its share."""
    losses = []
    for batch in token_batches():
        ids = batch[rank::size]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if size > 1:
            torch.distributed.all_reduce(whole)
        losses.append(whole.item() / size)
    return losses


def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=token_batches()[0]).logits
    return found


def allow_fsdp_without_devices() -> None:
    """Let Accelerate use FSDP on the CPU: it chooses plain data parallelism where there are no devices."""
    import torch.distributed
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    AcceleratorState._reset_state(reset_partial_state=True)


def make_accelerator(policy: str = "transformer_based_wrap", efficient: bool = False) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    allow_fsdp_without_devices()
    return Accelerator(
        cpu=True,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy=policy,
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=efficient,
        ),
    )


def said(work: Callable[[], Any]) -> str:
    """The type and text of what `work` raises."""
    try:
        work()
    except Exception as error:  # what a test looks at
        return f"{type(error).__name__}: {error}"
    return "nothing"


def train(folder: Path, names: list[str]) -> dict[str, Any]:
    """Train, save and compute logits of every model."""
    found: dict[str, Any] = {}
    for name in names:
        accelerator = make_accelerator("NO_WRAP" if name == "sharing" else "transformer_based_wrap")
        model = load(folder, name)
        model, optimizer = accelerator.prepare(model, optimizer_of(model, RATES.get(name, RATE)))
        parts = {type(parameter).__name__ for parameter in model.parameters()}
        losses = fit(model, optimizer, accelerator.process_index, accelerator.num_processes)
        state = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(
            folder / f"{name}-trained", is_main_process=accelerator.is_main_process, state_dict=state
        )
        logits = logits_of(model)
        found[name] = {"losses": losses, "parts": parts, "logits": logits.tolist()}
    return found


def train_with_trainer(folder: Path, name: str) -> dict[str, Any]:
    """The Trainer's own way: FSDP2 is its default, and a checkpoint is written and taken up on the way."""
    from transformers import Trainer, TrainingArguments

    allow_fsdp_without_devices()
    # The Trainer gives process `r` of `n` the items r, r + n, ... of a batch.
    data = [{"input_ids": ids, "labels": ids} for ids in token_batches().flatten(0, 1)]

    def trainer(steps: int) -> Any:
        arguments = TrainingArguments(
            output_dir=str(folder / "runs"),
            use_cpu=True,
            fsdp=True,
            fsdp_config={"state_dict_type": "FULL_STATE_DICT"},
            per_device_train_batch_size=SEQUENCES // 2,
            max_steps=steps,
            save_steps=2,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.01,
            adam_epsilon=EPSILON,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        return _InOrder(model=load(folder, name), args=arguments, train_dataset=data)

    class _InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    first = trainer(2)
    first.train()
    second = trainer(STEPS)
    second.train(resume_from_checkpoint=str(folder / "runs" / "checkpoint-2"))
    second.save_model(str(folder / f"{name}-by-trainer"))
    losses = [entry["loss"] for entry in second.state.log_history if "loss" in entry]
    return {"losses": losses, "logits": logits_of(second.model).tolist()}


def train_replicated(folder: Path, name: str) -> list[float]:
    """Plain data parallelism."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(load(folder, name))
    return fit(model, optimizer_of(model), torch.distributed.get_rank(), 2)


def load_divided(folder: Path, name: str, **sizes: Any) -> dict[str, Any]:
    """Transformers' own FSDP2, which divides a model while it loads."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(**sizes)).train()
    losses = fit(model, optimizer_of(model), torch.distributed.get_rank(), 2)
    model.save_pretrained(folder / f"{name}-divided")
    return {"losses": losses, "logits": logits_of(model).tolist()}


def refusals(folder: Path) -> dict[str, str]:
    """What is said where something cannot work."""
    from transformers import AutoModelForCausalLM

    import hf_compress

    accelerator = make_accelerator()

    def prepared(name: str) -> Any:
        # Accelerate wants the optimizer together with the model.
        model = load(folder, name)
        return accelerator.prepare(model, optimizer_of(model))[0]

    model, sharing = prepared("modular"), prepared("sharing")
    parameters = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    recipe = hf_compress.CodebookConfig(bits=3, learning="none")
    found = {
        "no state dict": said(lambda: model.save_pretrained(folder / "refused")),
        "sharded state dict": said(lambda: model.save_pretrained(folder / "refused", state_dict=model.state_dict())),
        "parameters alone": said(lambda: model.save_pretrained(folder / "refused", state_dict=parameters)),
        "sharing": said(lambda: sharing(input_ids=token_batches()[0])),
        "tensor parallel": said(lambda: load_divided(folder, "modular", tp_plan="auto")),
        "sparse, divided": said(lambda: load_divided(folder, "sparse", fsdp_size=2)),
        "compress, tensor parallel": said(
            lambda: AutoModelForCausalLM.from_pretrained(folder / "dense", compression_config=recipe, tp_plan="auto")
        ),
        "compress, prepared": said(lambda: _require_whole(prepared("dense"))),
    }
    accelerator = make_accelerator(efficient=True)
    found["efficient loading"] = said(lambda: load(folder, "modular"))
    found["efficient loading without buffers"] = said(
        lambda: torch.testing.assert_close(logits_of(prepared("plain")), logits_of(load(folder, "plain")))
    )
    found["efficient loading, compress"] = said(
        lambda: AutoModelForCausalLM.from_pretrained(folder / "dense", compression_config=recipe)
    )
    return found


def everything(folder: Path, trained: list[str], divided: list[str]) -> dict[str, Any]:
    """All of the above in one set of processes, whose start takes longest; what cannot work comes last."""
    return {
        "trained": train(folder, trained),
        "by trainer": train_with_trainer(folder, "modular"),
        "replicated": train_replicated(folder, "codebook_lora"),
        "divided": {name: load_divided(folder, name, fsdp_size=2) for name in divided},
        "refusals": refusals(folder),
    }


def _require_whole(model: nn.Module) -> None:
    from hf_compress.engine.placement import require_whole

    require_whole(model)
