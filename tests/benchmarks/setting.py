"""What the perplexity benchmarks share: one model, calibration rows, evaluation texts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compress import CalibrationConfig
from hf_compress.evaluation import perplexity

EVALUATION_TOKENS = 6 * 2048


def parser_for(description: str | None) -> argparse.ArgumentParser:
    """The options of every perplexity benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="text file; its first tokens are used")
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True, help="text files, never calibrated on")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    return parser


class Setting:
    """Loads the model afresh and measures it on the texts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.dtype = arguments.model, getattr(torch, arguments.dtype)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)

        def ids(path: Path) -> torch.Tensor:
            tokens: torch.Tensor = tokenizer(path.read_text(), verbose=False, return_tensors="pt")["input_ids"][0]
            return tokens

        samples, held_out = arguments.num_samples, arguments.held_out
        rows = ids(arguments.calibration)[: (samples + held_out) * arguments.sequence_length]
        rows = rows.view(-1, arguments.sequence_length)
        self.rows = rows[:samples]
        self.source = CalibrationConfig(rows, num_samples=samples, num_held_out=held_out)
        self.texts = {path.name: ids(path)[:EVALUATION_TOKENS] for path in arguments.evaluation}

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype)

    def evaluate(self, model: Any) -> dict[str, float]:
        return {name: round(perplexity(model, text, context=2048).perplexity, 3) for name, text in self.texts.items()}

    @torch.no_grad()
    def forward_seconds(self, model: Any) -> float:
        """Wall time of a plain forward pass over the calibration tokens, measured on an eighth of them."""
        part = self.rows[: max(len(self.rows) // 8, 1)]
        model(part[:1])
        began = time.perf_counter()
        for row in part:
            model(row[None])
        return (time.perf_counter() - began) * len(self.rows) / len(part)
