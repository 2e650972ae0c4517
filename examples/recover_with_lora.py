"""Win quality back with a LoRA adapter on a compressed model, keep both, and load them again.

    python examples/recover_with_lora.py --out three_bits --adapter adapter --text train.txt

The model's blocks are kept in three bits a weight; the adapter is trained towards the original for some steps and lies
in a folder of its own, a few MB that name the compressed checkpoint as their base. Codes take no adapter into
themselves, so it stays beside them. With `--reduction 0.2` the model is decomposed in place of that; its matrices are
dense and the adapter could be merged (`recover(..., merge=True)`, the default).

Prints the perplexity on the last tenth of the text: compressed, recovered, and loaded again from the two folders,
which is the same as recovered. Codes are what takes time: seven minutes for SmolLM2-135M on two quiet cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress import CalibrationConfig, CodebookConfig, ModularDecompositionConfig, recover
from hf_compress.evaluation import perplexity, size_on_disk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the original model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the compressed model")
    parser.add_argument("--adapter", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--text", type=Path, required=True, help="text file to calibrate and train on")
    parser.add_argument("--bits", type=int, default=3, help="of a weight in the blocks")
    parser.add_argument("--reduction", type=float, help="remove this share of the weights, in place of coding them")
    parser.add_argument("--num-samples", type=int, default=48, help="sequences to calibrate and train on")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text()
    cut = len(text) - len(text) // 10
    held_out = tokenizer(text[cut:], verbose=False)["input_ids"]
    data = CalibrationConfig(
        [text[:cut]],
        num_samples=arguments.num_samples,
        sequence_length=arguments.sequence_length,
        num_held_out=0,
    )

    if arguments.reduction is None:
        config = CodebookConfig(bits=arguments.bits, calibration=data)
    else:
        config = ModularDecompositionConfig(reduction=arguments.reduction, temperature=1.0, calibration=data)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, compression_config=config)
    # Save before the adapter is attached: it takes its base's name from here.
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    found = {"compressed": perplexity(model, held_out, context=arguments.sequence_length).perplexity}

    recovered = recover(
        model,
        arguments.model,
        data,
        method="lora",
        merge=False,
        processing_class=tokenizer,
        lora_rank=arguments.lora_rank,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        logging_steps=10,
    )
    recovered.save_pretrained(arguments.adapter)
    found["recovered"] = perplexity(recovered, held_out, context=arguments.sequence_length).perplexity

    # As anybody else loads it: the adapter goes on top of the compressed model.
    base = AutoModelForCausalLM.from_pretrained(arguments.out)
    again = PeftModel.from_pretrained(base, arguments.adapter)
    found["loaded again"] = perplexity(again, held_out, context=arguments.sequence_length).perplexity
    for name, value in found.items():
        print(f"{name}: perplexity {value:.2f}")
    print(
        f"{arguments.out}: {size_on_disk(arguments.out).weights:,} bytes of weights; "
        f"{arguments.adapter}: {size_on_disk(arguments.adapter).weights:,}"
    )


if __name__ == "__main__":
    main()
