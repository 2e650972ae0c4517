"""Make a finished card: compress, measure with `hf-compress eval`, write the card, copy it here.

    python model_cards/make.py modular-20 --model SMOLLM2 --calibration valid.tokens.txt --evaluation test.txt
    python model_cards/make.py codebook-3bit --model SMOLLM2 --calibration valid.tokens.txt --evaluation test.txt
    python model_cards/make.py pruned-90 --model MINILM --train train.tsv --evaluation dev.tsv
    python model_cards/make.py stories-4bit --model STORIES260K --calibration first.txt --evaluation last.txt

SMOLLM2 is the checkpoint that `hf-compress demo` makes, MINILM all-MiniLM-L6-v2; the texts are those of WikiText-2,
the tables SST-2's, and for the last two parts of Tiny Shakespeare. Every figure in a card is one of the very model
that the run has made. `--work` keeps that model and the evaluation, and a run with the same folder takes up what is
finished there. `--speed` and `--memory` measure these as well; leave the machine to them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
GGUF = (
    "The weights of this base were unpacked from a 4-bit GGUF file (Q4_1) to bfloat16, so they lie on a grid, and its "
    "perplexity is that of the 4-bit file: the figures before and after are of these weights, not of the original's."
)


@dataclass(frozen=True)
class Card:
    """A model that is made by one command.

    Args:
        name: of the card's file.
        base: what the base is called, whatever its folder's name.
        license: of the base, where its folder has no card.
        run: options of `hf-compress run`; none for a training.
        evaluation_data: the name of the text that the perplexity is measured on.
        num_samples, sequence_length: of the calibration.
        max_tokens, context: of the perplexity; all tokens where it is None.
        note: what the card says of the base outside of our section.
    """

    name: str
    base: str
    license: str | None = None
    run: tuple[str, ...] = ()
    evaluation_data: str = ""
    num_samples: int = 16
    sequence_length: int = 1024
    max_tokens: int | None = 12288
    context: int = 2048
    note: str = ""


_SMOLLM = {"base": "SmolLM2-135M-Instruct", "license": "apache-2.0", "note": GGUF}
_WIKITEXT = "WikiText-2 raw, test, the first 12,288 tokens"
CARDS = {
    "modular-20": Card(
        "SmolLM2-135M-Instruct-modular-20", run=("--reduction", "0.2"), evaluation_data=_WIKITEXT, **_SMOLLM
    ),
    "codebook-3bit": Card(
        "SmolLM2-135M-Instruct-codebook-3bit",
        run=("--method", "codebook", "--bits", "3"),
        evaluation_data=_WIKITEXT,
        **_SMOLLM,
    ),
    "pruned-90": Card("all-MiniLM-L6-v2-sst2-pruned-90", base="all-MiniLM-L6-v2"),
    "stories-4bit": Card(
        "stories260k-codebook-4bit",
        base="stories260k",
        license="mit",
        run=("--method", "codebook", "--bits", "4"),
        evaluation_data="Tiny Shakespeare, the last 60,000 characters",
        num_samples=32,
        sequence_length=256,
        max_tokens=None,
        context=256,
    ),
}


def run(*command: str | Path, output: Path | None = None) -> None:
    """A command as a user gives it; what it prints goes to the file `output`, whole or not at all."""
    words = [sys.executable, *map(str, command)]
    print("$", *words[1:], flush=True)
    if output is None:
        subprocess.run(words, check=True)
        return
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    output.write_text(done.stdout, encoding="utf-8")


def compress_and_measure(card: Card, base: Path, out: Path, arguments: argparse.Namespace) -> None:
    program = ("-m", "hf_compress")
    if not (out / "config.json").is_file():
        lengths = ("--num-samples", str(card.num_samples), "--sequence-length", str(card.sequence_length))
        run(*program, "run", base, out, *card.run, "--dataset", arguments.calibration, *lengths)
    evaluation = out.with_name(f"{out.name}.json")
    if not evaluation.is_file():
        text = ("--text", arguments.evaluation, "--context", str(card.context))
        limit = () if card.max_tokens is None else ("--max-tokens", str(card.max_tokens))
        extra = [f"--{name}" for name in ("speed", "memory") if getattr(arguments, name)]
        run(*program, "eval", base, out, *text, *limit, "--agreement", "--json", *extra, output=evaluation)
    measured = ("--evaluation", evaluation, "--evaluation-data", card.evaluation_data)
    known = ("--base", base) if (base / "README.md").is_file() else ("--license", str(card.license))
    run(*program, "card", out, "--write", *measured, *known)


def train_and_measure(base: Path, out: Path, arguments: argparse.Namespace) -> None:
    """The example writes the card itself, with what it has measured of both models."""
    if not (out / "evaluation.json").is_file():
        data = ("--train", arguments.train, "--evaluation", arguments.evaluation, "--data-name", "SST-2")
        lengths = ("--max-examples", str(arguments.max_examples), "--epochs", str(arguments.epochs))
        run(EXAMPLES / "train_with_pruning.py", "--model", base, "--out", out, *data, *lengths, "--compare")


def publish(card: Card, out: Path, here: Path) -> None:
    """Copy card and figure, the figure under the card's own name: all cards lie in one folder here."""
    text = (out / "README.md").read_text(encoding="utf-8")
    if card.note and card.note not in text:
        text = f"{text.rstrip()}\n\n## About the base\n\n{card.note}\n"
        # In the model's folder too: a push keeps it.
        (out / "README.md").write_text(text, encoding="utf-8")
    figure = f"{card.name}.svg"
    shutil.copyfile(out / "compression.svg", here / figure)
    text = re.sub(r"\(compression\.svg\)", f"({figure})", text)
    (here / f"{card.name}.md").write_text(text, encoding="utf-8")
    print(f"Wrote {card.name}.md and {figure}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", choices=list(CARDS))
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--calibration", type=Path, help="text file")
    parser.add_argument("--evaluation", type=Path, required=True, help="text file, or sentences and labels")
    parser.add_argument("--train", type=Path, help="sentences and labels, for a training")
    parser.add_argument("--max-examples", type=int, default=2000, help="of the training")
    parser.add_argument("--epochs", type=float, default=3, help="of the training")
    parser.add_argument("--work", type=Path, help="folder to keep the model in; a temporary one if not given")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the card; this one if not given")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    card = CARDS[arguments.card]
    if (arguments.calibration if card.run else arguments.train) is None:
        parser.error(f"{arguments.card} needs {'--calibration' if card.run else '--train'}")
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        # The base's name in the card is its folder's.
        base = Path(scratch) / card.base
        base.symlink_to(arguments.model.resolve(), target_is_directory=True)
        if card.run:
            compress_and_measure(card, base, work / card.name, arguments)
        else:
            train_and_measure(base, work / card.name, arguments)
        publish(card, work / card.name, arguments.out)


if __name__ == "__main__":
    main()
