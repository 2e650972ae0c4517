"""Compressions that are killed at random moments and started again, as after a power cut."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

# What a run is given beside its folders: the stages as JSON, token ids, and whether hidden states are kept.
Task = tuple[list[dict[str, Any]], list[list[int]], bool]


def compress_in_files(checkpoint: str, out: str, work: str, task: Task) -> None:
    """What is killed. Runs in a process of its own."""
    import torch

    import hf_compress

    torch.set_num_threads(1)
    stages, ids, keep_activations = task
    hf_compress.compress_checkpoint(
        checkpoint,
        out,
        {"stages": stages},
        calibration=hf_compress.CalibrationConfig(torch.tensor(ids), num_samples=20, num_held_out=4, batch_size=8),
        working_directory=work,
        keep_activations=keep_activations,
        device="cpu",
    )


class Killer:
    """Starts runs from a process that has imported everything, and kills them."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["hf_compress", "transformers.models.llama.modeling_llama"])

    def whole(self, *arguments: Any) -> float:
        """An undisturbed run; the seconds that it took."""
        begun = time.monotonic()
        process = self._start(arguments)
        process.join()
        assert process.exitcode == 0, "the run fails"
        return time.monotonic() - begun

    def killed(self, seconds: float, kills: int, *arguments: Any) -> int:
        """A run that is killed up to so many times, each at a random moment of so many seconds, and comes to its end
        then. How often it was killed before it had ended."""
        for done in range(kills):
            process = self._start(arguments)
            process.join(self._random.uniform(0, seconds))
            if process.exitcode is not None:
                assert process.exitcode == 0, "a run that goes on fails"
                return done
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            out = Path(arguments[1])
            assert not out.exists() or (out / "config.json").exists(), "a folder that is not whole under its name"
        self.whole(*arguments)
        return kills

    def _start(self, arguments: tuple[Any, ...]) -> Any:
        process = self._context.Process(target=compress_in_files, args=arguments)
        process.start()
        return process
