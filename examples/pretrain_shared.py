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

`--architecture encoder --length 32 --batch-size 64` makes an ALBERT, which learns masked bytes. Run 12 times, one
post-norm block easily makes all places alike and then learns no more than the bytes' own frequencies, 3.25 nats: see
`prepare_encoder` and `collator` for what keeps it from that. Rows are short because a place finds its neighbours late
among many.
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
HELD_OUT_BYTES = {"decoder": 1 << 16, "encoder": 1 << 17}  # one byte in seven is masked


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
            initializer_range=width**-0.5,
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
    text = bytearray(b"".join(path.read_bytes() for path in paths))
    if len(text) < length:
        raise SystemExit(f"{' '.join(map(str, paths))}: {len(text)} bytes, and a row has {length}.")
    data = torch.frombuffer(text, dtype=torch.uint8).long()
    return data[: len(data) // length * length].view(-1, length)


@torch.no_grad()
def prepare_encoder(model: Any, rows: torch.Tensor) -> None:
    """Start an ALBERT so that its block, run many times, leaves different places different."""
    layers = model.config.num_hidden_layers
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    # As in GPT-2: many additions to one stream.
    for projection in (layer.attention.dense, layer.ffn_output):
        projection.weight *= (2 * layers) ** -0.5
    # Neighbours are found sooner where places are told apart by more than chance.
    places = model.albert.embeddings.position_embeddings.weight
    count, width = places.shape
    angles = torch.arange(count)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    places.copy_(0.2 * (waves - waves.mean(dim=0)))
    # The frequencies of bytes need not be learned by making all outputs alike.
    frequencies = torch.bincount(rows.flatten(), minlength=MASK + 1).double() + 1
    model.predictions.bias.copy_(frequencies.log() - frequencies.log().mean())


def collator(architecture: str, training: bool = True) -> Any:
    """Every byte is to be told from those before it, or the masked ones from the others.

    In training an encoder is also asked for bytes that it sees, so that it goes on to tell them apart, and for some
    that were exchanged.
    """

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.stack(rows)
        if architecture == "decoder":
            return {"input_ids": ids, "labels": ids}
        lot = torch.rand(ids.shape)
        masked, asked = lot < MASKED_SHARE, lot < (2 * MASKED_SHARE if training else MASKED_SHARE)
        exchanged = asked & ~masked & (lot < 1.2 * MASKED_SHARE)
        inputs = torch.where(exchanged, torch.randint_like(ids, MASK), ids).masked_fill(masked, MASK)
        return {"input_ids": inputs, "labels": ids.masked_fill(~asked, -100)}

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
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return median(times[1:])


def evaluate(model: Any, rows: torch.Tensor, architecture: str) -> None:
    set_seed(0)
    collate = collator(architecture, training=False)
    length = rows.shape[1]
    wanted = HELD_OUT_BYTES[architecture] // length
    # From all over the files.
    rows = rows[:: max(len(rows) // wanted, 1)][:wanted]
    batches = [
        {name: tensor.to(model.device) for name, tensor in collate(list(part)).items()}
        for part in rows.split(max(4096 // length, 1))
    ]
    ids = rows[: max(1024 // length, 1)].to(model.device)
    running = running_blocks(model)
    depth = running.depth
    for share in (1.0, 0.75, 2 / 3, 0.5, 1 / 3, 0.25):
        count = round(share * depth)
        model.set_iterations(count)
        line = {"iterations": count, "of": depth, "milliseconds": round(milliseconds(model, ids), 2)}
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
    rows, held_out = (rows_of(paths, arguments.length) for paths in (arguments.text, arguments.held_out))
    model = make_model(arguments.architecture, arguments.layers, arguments.width, arguments.length)
    if arguments.architecture == "encoder":
        prepare_encoder(model, rows)
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
        train_dataset=list(rows),
        data_collator=collator(arguments.architecture),
        callbacks=callbacks,
    )
    last = get_last_checkpoint(str(arguments.out)) if arguments.out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(arguments.out))
    evaluate(model.eval(), held_out, arguments.architecture)


if __name__ == "__main__":
    main()
