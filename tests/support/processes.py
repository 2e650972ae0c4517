"""Several processes over gloo on the CPU, and what they do in the tests."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def accelerate_launch(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `accelerate launch` makes of a script, or of `-m module`, in two processes on the CPU.

    `accelerate launch --cpu` starts several processes through mpirun alone, which few machines have; the launcher for
    several devices starts them through torchrun, told to leave devices alone.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += [
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--main_process_port={free_port()}",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


class Processes:
    """Starts them from one that has imported everything."""

    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["hf_compress", "transformers.models.llama.modeling_llama"])

    def run(self, size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work`, a function of a module, returns in each of them, or the text of its exception, by rank."""
        port = free_port()
        queue = self._context.Queue()
        started = [
            self._context.Process(target=_member, args=(rank, size, port, queue, work, arguments))
            for rank in range(size)
        ]
        for process in started:
            process.start()
        try:
            found = dict(queue.get(timeout=180) for _ in started)
        finally:
            for process in started:
                process.join(timeout=20)
                process.kill()
        return [found[rank] for rank in range(size)]


def _member(rank: int, size: int, port: int, queue: Any, work: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(size))
    import torch

    torch.set_num_threads(1)
    try:
        found = work(*arguments)
    except Exception as error:  # what a test looks at
        found = f"{type(error).__name__}: {error}"
        if "hf_compress" not in type(error).__module__:
            found += traceback.format_exc()
    queue.put((rank, found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def compress_models(tasks: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """`compress_model` on each: processes take longer to start than to do it."""
    return {name: compress_model(*arguments) for name, arguments in tasks.items()}


def compress_model(family: str, stages: list[dict[str, Any]], dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    """Compress a tiny model: its tensors as bytes, and what this process did for it."""
    import torch
    from conftest import calibration, make_model

    import hf_compress
    from hf_compress.engine.blocks import BlockStream

    model = make_model(family, getattr(torch, dtype))
    work = {"sequences": 0, "solved": 0}
    run = BlockStream.run

    def counted(stream: BlockStream, index: int, batch: int) -> torch.Tensor:
        hidden = run(stream, index, batch)
        work["sequences"] += len(hidden) * (index == 0)
        return hidden

    BlockStream.run = counted  # type: ignore[method-assign]
    for name in ("ModularDecomposition", "LearnedCodebooks"):
        method: Any = getattr(_methods(), name)
        method.tasks = _counting(method.tasks, work)
    config = hf_compress.CompressionConfig.wrap({"stages": stages})
    hf_compress.compress(model, config, calibration=calibration(**options))
    with torch.no_grad():
        logits = model(torch.arange(3, 35).reshape(2, 16)).logits
    report = model.compression_report
    return {
        "state": {name: bytes(_raw(tensor)) for name, tensor in model.state_dict().items()},
        "logits": logits.double().tolist(),
        "rows": [(row.path, row.error) for row in report.modules],
        "notes": report.notes,
        "left_alone": report.left_alone,
        **work,
    }


def compress_on_little(family: str, tokens: int) -> dict[str, Any]:
    """A model of `families.py`, where the survey looks at so few tokens that most processes have none of them."""
    import families
    import torch

    import hf_compress
    from hf_compress.methods.modular import method, trial

    trial.TRIAL_TOKENS = method.INFLUENCE_TOKENS = tokens
    model = families.make(family, torch.float64)
    source = families.calibration(family, 20).model_copy(update={"num_samples": 12, "num_held_out": 8})
    config = hf_compress.ModularDecompositionConfig(reduction=0.2, calibration=source)
    hf_compress.compress(model, config)
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return {"state": state, "notes": model.compression_report.notes}


def compress_encoder() -> dict[str, Any]:
    """Padded texts through an encoder, whose kinds are probed: its tensors, and what the survey found."""
    import torch
    from encoders import inputs, make_encoder

    import hf_compress

    rows = inputs("bert", 48)

    def collate(chosen: list[int]) -> dict[str, torch.Tensor]:
        return {name: tensor[torch.tensor(chosen)] for name, tensor in rows.items()}

    source = hf_compress.CalibrationConfig(
        list(range(48)), data_collator=collate, num_samples=39, num_held_out=9, batch_size=10
    )
    model = make_encoder("bert").double()
    hf_compress.compress(model, hf_compress.ModularDecompositionConfig(reduction=0.25, calibration=source))
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return {"state": state, "notes": model.compression_report.notes}


def _methods() -> Any:
    from types import SimpleNamespace

    from hf_compress.methods.codebook.method import LearnedCodebooks
    from hf_compress.methods.modular.method import ModularDecomposition

    return SimpleNamespace(ModularDecomposition=ModularDecomposition, LearnedCodebooks=LearnedCodebooks)


def _counting(tasks: Any, work: dict[str, int]) -> Any:
    def counted(self: Any, block: int, statistics: Any) -> list[Any]:
        def done(task: Any) -> Any:
            work["solved"] += 1
            return task()

        return [lambda task=task: done(task) for task in tasks(self, block, statistics)]

    return counted


def _raw(tensor: Any) -> Any:
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()


def compress_broken(rank_that_fails: int) -> str:
    """A sequence makes one process's activations overflow; the others have none of it."""
    import torch
    from conftest import calibration, make_model

    import hf_compress
    from hf_compress.engine import walk

    check = walk.require_finite

    def failing(hidden: torch.Tensor, what: str) -> torch.Tensor:
        if int(os.environ["RANK"]) == rank_that_fails and "layers.2" in what:
            hidden = hidden * torch.inf
        return check(hidden, what)

    walk.require_finite = failing
    config = hf_compress.ModularDecompositionConfig(reduction=0.25, kinds=["mlp"], calibration=calibration())
    hf_compress.compress(make_model("llama"), config)
    return "no error"


def compress_files(checkpoint: str, out: str, work: str | None, stages: list[dict[str, Any]], fail_at: int) -> str:
    """`compress_checkpoint`; with `fail_at` the power goes before that block is kept."""
    from conftest import calibration

    import hf_compress
    from hf_compress.engine.resume import ResumePoint

    keep = ResumePoint.keep

    def failing(self: Any, block: int, *arguments: Any) -> None:
        if block == fail_at:
            raise RuntimeError("power cut")
        keep(self, block, *arguments)

    ResumePoint.keep = failing  # type: ignore[method-assign]
    hf_compress.compress_checkpoint(
        checkpoint, out, {"stages": stages}, calibration=calibration(), working_directory=work, device="cpu"
    )
    return "done"


def compress_where_reading_fails(checkpoint: str, out: str, rank: int, time_it_fails: int) -> str:
    """`compress_checkpoint`, where one process cannot read a block for the n-th time that it has to."""
    from conftest import calibration

    import hf_compress
    from hf_compress.engine.residency import Residency

    fetch, seen = Residency._fetch, []

    def failing(self: Any, block: int) -> Any:
        if block == 1 and int(os.environ["RANK"]) == rank:
            seen.append(block)
            if len(seen) == time_it_fails:
                raise hf_compress.CheckpointError("the weight cannot be read")
        return fetch(self, block)

    Residency._fetch = failing  # type: ignore[method-assign]
    stages = [{"method": "modular_decomposition", "reduction": 0.25}]
    hf_compress.compress_checkpoint(checkpoint, out, {"stages": stages}, calibration=calibration(), device="cpu")
    return "no error"


def folder_names(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def compress_differently(what: str) -> str:
    """A call in which one process differs from the other."""
    from datetime import timedelta

    from conftest import calibration, make_model

    import hf_compress
    from hf_compress.engine import distributed

    distributed.MEETING = timedelta(seconds=8)
    distributed.process_state()  # as an Accelerator does
    main = os.environ["RANK"] == "0"
    model = make_model("llama", seed=int(what == "weights" and main))
    if what == "damaged" and not main:
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    reduction = 0.35 if what == "recipe" and main else 0.25
    if what == "main alone" and not main:
        time.sleep(12)  # it is there, and busy with something else
        return "not called"
    config = hf_compress.ModularDecompositionConfig(reduction=reduction, kinds=["mlp"], calibration=calibration())
    hf_compress.compress(model, config)
    return "no error"


def stream_where_memory_differs(checkpoint: str, out: str) -> str:
    """`compress_checkpoint` with a limit that one process alone would keep with hidden states in memory."""
    from conftest import calibration, recipe

    import hf_compress
    from hf_compress.engine import compress, streaming

    def must_spill(planned: Any, limit: int, taken: int) -> bool:
        spilled.append(taken)
        return taken >= 2**40

    spilled: list[int] = []
    streaming._must_spill = must_spill
    memory = 2**40 if os.environ["RANK"] == "1" else 2**20
    streaming.psutil = _Fake(Process=lambda: _Fake(memory_info=lambda: _Fake(rss=memory)))  # type: ignore[assignment]
    folder, opened = compress.folder_of_activations, []

    def counted(*arguments: Any) -> Any:
        opened.append(1)
        return folder(*arguments)

    compress.folder_of_activations = counted
    options: dict[str, Any] = {"max_memory": "100GB", "device": "cpu", "calibration": calibration()}
    hf_compress.compress_checkpoint(checkpoint, out, recipe(kinds=["mlp"]), **options)
    return f"{spilled == [2**40]} {len(opened)}"


class _Fake:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)
