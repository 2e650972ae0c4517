"""Compress a language model, measure it beside the original, and push it with a card that has the figures.

    python examples/compress_and_push.py --out small
    python examples/compress_and_push.py --out small --push me/SmolLM2-135M-modular-20 --private

The first command writes a checkpoint, its tokenizer and its card into the folder `small` and prints a table:
parameters, bytes, perplexity, agreement with the original, speed. A fifth of the weights of SmolLM2-135M's blocks
goes; its perplexity on WikiText-2 rises from 22 to about 30. Compressing it took two minutes on two quiet cores, and
measuring takes as long. The second command also sends the folder to the Hub, in one commit; log in with
`hf auth login` before.

`--model`, `--calibration` and `--evaluation` take local files and folders in place of ids of the Hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rich
from datasets import load_dataset
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress import CalibrationConfig, ModularDecompositionConfig
from hf_compress.evaluation import compare
from hf_compress.hub import Options, prepare_folder, push_folder

WIKITEXT, SUBSET = "Salesforce/wikitext", "wikitext-2-raw-v1"


def read_text(source: str) -> tuple[str, str]:
    """A text to measure on, and its name for the card."""
    if Path(source).is_file():
        return Path(source).read_text(), Path(source).name
    return "\n\n".join(load_dataset(source, SUBSET, split="test")["text"]), f"{source} {SUBSET} test"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, required=True, help="folder for the compressed model")
    parser.add_argument("--reduction", type=float, default=0.2, help="share of the blocks' weights to remove")
    parser.add_argument("--calibration", default=WIKITEXT, help="dataset of the Hub, or a text file")
    parser.add_argument("--num-samples", type=int, default=64, help="sequences to calibrate on")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--evaluation", default=WIKITEXT, help="dataset of the Hub, or a text file")
    parser.add_argument("--max-tokens", type=int, default=12288, help="tokens to measure the perplexity on")
    parser.add_argument("--context", type=int, default=2048, help="tokens in a window of the perplexity")
    parser.add_argument("--license", help="of the original, for the card, where its own card is not at hand")
    parser.add_argument("--push", metavar="REPO", help="repository of the Hub, such as me/model")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    arguments = parser.parse_args()

    # Compress. The calibration text should look like what the model will be used for.
    calibration = CalibrationConfig(
        arguments.calibration,
        name=SUBSET if arguments.calibration == WIKITEXT else None,
        num_samples=arguments.num_samples,
        sequence_length=arguments.sequence_length,
    )
    config = ModularDecompositionConfig(reduction=arguments.reduction, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, compression_config=config)
    print(model.compression_report)

    # Save. The tokenizer has not changed.
    model.save_pretrained(arguments.out)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.save_pretrained(arguments.out)

    # Measure before and after, on text that was not calibrated on, as everybody else will load it.
    text, name = read_text(arguments.evaluation)
    token_ids = tokenizer(text, verbose=False)["input_ids"][: arguments.max_tokens]
    local = Path(arguments.model).is_dir()
    paths = {
        "original": arguments.model if local else snapshot_download(arguments.model, local_files_only=True),
        "compressed": arguments.out,
    }
    models = {label: AutoModelForCausalLM.from_pretrained(path) for label, path in paths.items()}
    comparison = compare(
        models,
        token_ids,
        context=arguments.context,
        paths=paths,
        agreement=True,
        prompt_length=min(512, arguments.context // 2),
        repeats=3,
    )
    rich.print(comparison.table())

    # The card says what was done and measured. Read it, and write around its marked section, before others do.
    options = Options(
        evaluation=comparison,
        evaluation_data=name,
        license=arguments.license,
        base=arguments.model if local else None,
    )
    prepare_folder(arguments.out, repo_id=arguments.push, options=options)
    print(f"The card is {arguments.out / 'README.md'}")
    if arguments.push:
        commit = push_folder(arguments.out, arguments.push, private=arguments.private or None)
        print(f"Pushed: {commit.commit_url}")


if __name__ == "__main__":
    main()
