"""Pre-train a model of one shared block on text, and see how few steps it can be run in.

    python examples/pretrain_shared.py --text train.txt --held-out test.txt --out runs/random --random-steps
    python examples/pretrain_shared.py --text train.txt --held-out test.txt --out runs/fixed
    python examples/pretrain_shared.py --text train.txt --held-out test.txt --out runs/native-6 --layers 6

The first two make the same model of 12 loops, with random step sizes in training (from 6 to 12 iterations; another
least number may follow the option) and without; the third is a model of 6 layers that shares its block as well, for
comparison. Bytes are tokens, so that the head costs little. Text may come from several files. An interrupted run goes
on where it stopped. At the end a JSON line for every number of iterations: loss on held-out text in nats a byte,
scaled steps beside plain truncation, the Adams-Bashforth solver and steps that grow or shrink to the double, and
milliseconds of a forward pass.

`--architecture encoder` (ALBERT) does not get beyond the bytes' own frequencies, 3.25 nats, in 500 steps at the
default learning rate of 1e-3; at 3e-4 it begins to. It has not been trained to the end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hf_compress
from hf_compress import LayerSharingConfig, RandomStepCallback
from hf_compress.methods.sharing.stepping import Schedule, running_blocks

MASK = 256  # the token after the bytes
MASKED_SHARE = 0.15
HELD_OUT_ROWS = 256


def make_model(architecture: str, layers: int, width: int, length: int) -> Any:
    """One shared block, run `layers` times."""
    if architecture == "encoder":
        config = AlbertConfig(
            vocab_size=MASK + 1,
            embedding_size=128,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            max_position_embeddings=length,
        )
        # All loops at first: the number of iterations changes later.
        return hf_compress.compress(AlbertForMaskedLM(config), LayerSharingConfig(inference_iterations=layers))
    config = LlamaConfig(
        vocab_size=MASK + 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        intermediate_size=3 * width,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    return hf_compress.compress(LlamaForCausalLM(config), LayerSharingConfig(unique_layers=1, share_norms=True))


def rows_of(paths: list[Path], length: int) -> torch.Tensor:
    """The bytes of some files in rows: (rows, length)."""
    data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()
    return data[: len(data) // length * length].view(-1, length)


def collator(architecture: str) -> Any:
    """Every byte is to be told from those before it, or the masked ones from the others."""

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.stack(rows)
        if architecture == "decoder":
            return {"input_ids": ids, "labels": ids}
        chosen = torch.rand(ids.shape) < MASKED_SHARE
        return {"input_ids": ids.masked_fill(chosen, MASK), "labels": ids.masked_fill(~chosen, -100)}

    return collate


@torch.no_grad()
def held_out_loss(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


@torch.inference_mode()
def milliseconds(model: Any, ids: torch.Tensor, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        model(input_ids=ids)
        times.append(1000 * (time.perf_counter() - began))
    return median(times[1:])


def evaluate(model: Any, rows: torch.Tensor, architecture: str) -> None:
    set_seed(0)
    collate = collator(architecture)
    # From all over the files.
    rows = rows[:: max(len(rows) // HELD_OUT_ROWS, 1)][:HELD_OUT_ROWS]
    batches = [collate(list(part)) for part in rows.split(16)]
    running = running_blocks(model)
    depth = running.depth
    for share in (1.0, 0.75, 2 / 3, 0.5, 1 / 3, 0.25):
        count = round(share * depth)
        model.set_iterations(count)
        line = {"iterations": count, "of": depth, "milliseconds": round(milliseconds(model, rows[:4]), 2)}
        line["scaled"] = round(held_out_loss(model, batches), 4)
        schedule = running.schedule
        running.set_schedule(Schedule(schedule.loops, (1.0,) * count), "euler")
        line["unscaled"] = round(held_out_loss(model, batches), 4)
        if architecture == "decoder":
            running.set_schedule(schedule, "adams_bashforth")
            line["adams_bashforth"] = round(held_out_loss(model, batches), 4)
        running.set_schedule(schedule, "euler")
        for name, sizes in (("growing", torch.linspace(1, 2, count)), ("shrinking", torch.linspace(2, 1, count))):
            model.set_iterations(steps=(sizes.double() * depth / sizes.sum().double()).tolist())
            line[name] = round(held_out_loss(model, batches), 4)
        print(json.dumps(line), flush=True)
    model.set_iterations()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", choices=["decoder", "encoder"], default="decoder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--random-steps", type=int, nargs="?", const=0, metavar="LEAST")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    set_seed(0)
    model = make_model(arguments.architecture, arguments.layers, arguments.width, arguments.length)
    least = arguments.random_steps or arguments.layers // 2
    callbacks = [] if arguments.random_steps is None else [RandomStepCallback(least)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            bf16=arguments.bf16,
            use_cpu=not torch.accelerator.is_available(),
            save_steps=200,
            save_total_limit=1,
            logging_steps=100,
            report_to=[],
            remove_unused_columns=False,
        ),
        train_dataset=list(rows_of(arguments.text, arguments.length)),
        data_collator=collator(arguments.architecture),
        callbacks=callbacks,
    )
    last = get_last_checkpoint(str(arguments.out)) if arguments.out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(arguments.out))
    rows = rows_of(arguments.held_out, arguments.length).to(model.device)
    evaluate(model.eval(), rows, arguments.architecture)


if __name__ == "__main__":
    main()
