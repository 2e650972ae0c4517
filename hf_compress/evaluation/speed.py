"""Prompt and decoding speed of several models, paired: the machine's noise falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ConfigurationError, UnsupportedModelError
from .forward import accepts_logits_to_keep, check_length, evaluation_mode, input_device, vocabulary_size


@dataclass(frozen=True)
class SpeedResult:
    """Medians over the repeats.

    Attributes:
        prompt_tokens_per_second: tokens of the prompt read a second, the logits of its last position computed.
        generated_tokens_per_second: tokens generated a second after that, one by one, with the cache.
        prompt_ratio: median of this model's rate over the first model's in the same repeat.
        generated_ratio: the same for generated tokens.
        first_token_milliseconds: from the prompt to the first generated token, which the host then knows.
        first_token_ratio: this model's time over the first model's.
        prompt_length, new_tokens, batch_size, repeats: what was timed, and how often.
    """

    prompt_tokens_per_second: float
    generated_tokens_per_second: float
    prompt_ratio: float
    generated_ratio: float
    first_token_milliseconds: float
    first_token_ratio: float
    prompt_length: int
    new_tokens: int
    batch_size: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_length: int = 512,
    new_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 1,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, SpeedResult]:
    """Time causal language models side by side; the first is what the others are compared with.

    Every repeat times every model once, in an order that turns round each time, on one random prompt. Decoding is
    greedy and does not stop at an end token, so that all models do the same work.

    Args:
        models: names and models, all in memory. Their training mode is restored.
        prompt_length: tokens of the prompt.
        new_tokens: tokens generated after it.
        repeats: timed repeats.
        warmup: repeats before them that are not counted.
        batch_size: sequences that run together; rates count the tokens of all of them.
        seed: draws the prompt.

    Raises:
        ConfigurationError: for an empty mapping, counts below one, or more tokens than the positions of a model.
        UnsupportedModelError: for a model that returns no cache.
    """
    if not models or min(prompt_length, new_tokens, repeats, batch_size) < 1 or warmup < 0:
        raise ConfigurationError(
            f"measure_speed needs a model and counts of at least one; got {len(models)} models, prompt_length="
            f"{prompt_length}, new_tokens={new_tokens}, repeats={repeats}, batch_size={batch_size}, warmup={warmup}."
        )
    for model in models.values():
        check_length(model, prompt_length + new_tokens, "prompt_length + new_tokens")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(vocabulary_size(model) for model in models.values())
    prompt = torch.randint(vocabulary, (batch_size, prompt_length), generator=generator)
    prompts = {name: prompt.to(input_device(model)) for name, model in models.items()}
    names = list(models)
    seconds: dict[str, list[_Timing]] = {name: [] for name in names}
    with evaluation_mode(*models.values()), torch.inference_mode():
        for repeat in range(-warmup, repeats):
            for name in names if repeat % 2 == 0 else reversed(names):
                timing = _time_once(models[name], prompts[name], new_tokens)
                if repeat >= 0:
                    seconds[name].append(timing)
    first = seconds[names[0]]

    def times_faster(own: list[_Timing], part: int) -> float:
        return median(base[part] / timing[part] for base, timing in zip(first, own, strict=True))

    return {
        name: SpeedResult(
            prompt_tokens_per_second=batch_size * prompt_length / median(timing.prompt for timing in timings),
            generated_tokens_per_second=batch_size * new_tokens / median(timing.decode for timing in timings),
            prompt_ratio=times_faster(timings, 0),
            generated_ratio=times_faster(timings, 2),
            first_token_milliseconds=1000 * median(timing.first_token for timing in timings),
            first_token_ratio=1 / times_faster(timings, 1),
            prompt_length=prompt_length,
            new_tokens=new_tokens,
            batch_size=batch_size,
            repeats=repeats,
        )
        for name, timings in seconds.items()
    }


class _Timing(NamedTuple):
    """Seconds: for reading the prompt, for that and knowing the first token, for decoding the rest."""

    prompt: float
    first_token: float
    decode: float


def _time_once(model: PreTrainedModel, prompt: Int[Tensor, "batch tokens"], new_tokens: int) -> _Timing:
    options = {"logits_to_keep": 1} if accepts_logits_to_keep(model) else {}
    _synchronize(model)
    start = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, **options)
    _synchronize(model)
    read = time.perf_counter()
    if output.get("past_key_values") is None:
        raise UnsupportedModelError(f"{type(model).__name__} returns no cache: its decoding speed cannot be measured.")
    token = output.logits[:, -1:].argmax(-1)
    token.cpu()
    first = time.perf_counter()
    for _ in range(new_tokens):
        output = model(
            input_ids=token.to(prompt.device), past_key_values=output.past_key_values, use_cache=True, **options
        )
        token = output.logits[:, -1:].argmax(-1)
    _synchronize(model)
    return _Timing(read - start, first - start, time.perf_counter() - first)


def _synchronize(model: PreTrainedModel) -> None:
    """Wait for what was queued on the accelerators that hold the model or run its offloaded parts."""
    devices = {parameter.device for parameter in model.parameters()} | {input_device(model)}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
