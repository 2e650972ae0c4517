"""Perplexity of a compressed SmolLM2 before and after a distillation from the dense model, by what and how long.

    python tests/benchmarks/recovery.py --model MODEL --calibration valid.tokens.txt --evaluation test.joined.txt \
        --training train.txt --recipe modular --method full --minutes 30

The texts of `--training` must not be those of `--evaluation`; of a .jsonl file the fields `text` are read. `--recipe`:
modular (30 % removed), codebook (2 bits, an adapter beside), sharing (15 of 30 layers, corrections of rank 64) or
dropped (the 15 layers of least influence left out). One JSON line before, one after. Processes of `torchrun` share
the work; `--batch-size` is then that of one.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from setting import Setting, parser_for
from transformers import AutoTokenizer, TrainerCallback

import hf_compress
from hf_compress import CalibrationConfig, CodebookConfig, LayerSharingConfig, ModularDecompositionConfig
from hf_compress.evaluation.examples import read_records


def text_of(path: Path) -> str:
    """What a file says; passages of JSON lines follow one another."""
    if path.suffix != ".jsonl":
        return path.read_text()
    return "\n\n".join(record["text"] for record in read_records(path, ("text",)))


def block_influence(model: Any, rows: torch.Tensor) -> list[float]:
    """One minus the mean cosine of a block's input and output (ShortGPT, arXiv 2403.03853)."""
    found: list[float] = []
    with torch.no_grad():
        states = model(rows, output_hidden_states=True).hidden_states
    for before, after in itertools.pairwise(states):
        found.append(1 - float(torch.cosine_similarity(before.float(), after.float(), dim=-1).mean()))
    return found


def drop_layers(model: Any, rows: torch.Tensor, kept: int) -> Any:
    influence = block_influence(model, rows)
    chosen = sorted(sorted(range(len(influence)), key=lambda index: -influence[index])[:kept])
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in chosen)
    for slot, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = slot
    model.config.num_hidden_layers = kept
    return model


def compressed(recipe: str, setting: Setting) -> Any:
    model = setting.load()
    if recipe == "dropped":
        return drop_layers(model, setting.rows[:8], len(model.model.layers) // 2)
    configs: dict[str, Any] = {
        "modular": ModularDecompositionConfig(reduction=0.3, calibration=setting.source),
        "codebook": CodebookConfig(bits=2, calibration=setting.source),
        "sharing": LayerSharingConfig(
            group_sizes=(1, 1, 3, 3, 3, *[2] * 9, 1),
            initialization="activation_aware",
            lora_rank=64,
            calibration=setting.source,
        ),
    }
    return hf_compress.compress(model, configs[recipe])


class StopAfter(TrainerCallback):
    """Ends a training whose steps were counted for a machine of another speed."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # One process's clock may be a step ahead of another's.
        control.should_training_stop |= any(gather_object([time.monotonic() > self.end]))


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--training", type=Path, nargs="+", required=True)
    parser.add_argument("--recipe", default="modular", choices=["modular", "codebook", "sharing", "dropped"])
    parser.add_argument("--method", default="full", choices=["full", "lora"])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--kl-weight", type=float, default=1.0, help="the text's own tokens have the rest")
    parser.add_argument("--hidden-state-weight", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300, help="of the learning rate's schedule")
    arguments = parser.parse_args()
    setting, processes = Setting(arguments), PartialState(cpu=not torch.accelerator.is_available())
    teacher = setting.load()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    student = compressed(arguments.recipe, setting)
    line = {"recipe": arguments.recipe, "parameters": sum(p.numel() for p in student.parameters())}
    processes.print(json.dumps({**line, "healed": False, **setting.evaluate(student)}), flush=True)
    # Adam's steps are smaller than bfloat16's digits.
    student = student.float().train()
    source = CalibrationConfig(
        [text_of(path) for path in arguments.training],
        num_samples=arguments.steps * arguments.batch_size * processes.num_processes,
        sequence_length=arguments.length,
        num_held_out=0,
    )
    given = {} if arguments.learning_rate is None else {"learning_rate": arguments.learning_rate}
    began = time.monotonic()
    stop = StopAfter(60 * arguments.minutes)
    steps: list[int] = []

    class Count(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    result = hf_compress.recover(
        student,
        teacher,
        source,
        method=arguments.method,
        processing_class=tokenizer,
        callbacks=[stop, Count()],
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        bf16=True,
        kl_weight=arguments.kl_weight,
        temperature=1.0,
        hidden_state_weight=arguments.hidden_state_weight,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        logging_steps=20,
        **given,
    )
    minutes = round((time.monotonic() - began) / 60, 1)
    line = {**line, "method": arguments.method, "steps": steps[-1], "minutes": minutes}
    line |= {"processes": processes.num_processes, "healed": True}
    processes.print(json.dumps({**line, **setting.evaluate(result.to(setting.dtype))}), flush=True)


if __name__ == "__main__":
    main()
