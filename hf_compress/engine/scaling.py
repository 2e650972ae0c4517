"""What a compression would take on several accelerators: time, memory and network traffic, on paper.

Two kinds of numbers go in, and they are kept apart. *Counts* are arithmetic on the shapes of the model and follow the
code: operations of the blocks, of their statistics and of the factorisations, bytes of the statistics and of the new
modules (`StageCosts`). *Rates* are assumptions: what a device does in a second (`Hardware`), from a data sheet with a
share that is reached, or measured on this machine. Times are counts divided by rates, one after the other: nothing is
taken to overlap, and starting kernels, allocating and writing files are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from ..errors import ConfigurationError
from ..sizes import parse_bytes

if TYPE_CHECKING:
    from .costs import StageCosts
    from .memory import Workload

    Peak = Callable[[Workload], int]


@dataclass(frozen=True)
class Hardware:
    """What one device does in a second: every number here is an assumption, which `assumptions` prints.

    Args:
        name: as it is printed.
        forward_flops: peak FLOP/s of dense matrix products in the model's dtype.
        gram_flops: the same in float32, in which statistics are multiplied.
        solve_flops: the same in float64, in which factorisations run.
        forward_share, gram_share, solve_share: what is reached of these peaks, in (0, 1].
        memory: bytes of a device.
        bandwidth: bytes/s that a device sends, and at the same time receives, to others of its node.
        node: devices of a node.
        node_bandwidth: `bandwidth` to devices of other nodes.
        storage: bytes/s at which each process reads the checkpoint, all at the same time.
        source: where the numbers come from.

    Raises:
        ConfigurationError: a number that is not above 0, or a share above 1.
    """

    name: str
    forward_flops: float
    gram_flops: float
    solve_flops: float
    forward_share: float
    gram_share: float
    solve_share: float
    memory: int
    bandwidth: float
    node: int
    node_bandwidth: float
    storage: float
    source: str

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str):
                continue
            share = item.name.endswith("_share")
            if not (math.isfinite(value) and value > 0) or (share and value > 1):
                expected = "a share in (0, 1]" if share else "a finite number above 0"
                raise ConfigurationError(f"hardware: {item.name} is {value!r}; expected {expected}.")

    @classmethod
    def named(cls, name: str) -> Hardware:
        """One of `HARDWARE`, or `"this"` for this machine's CPU, measured. Raises `ConfigurationError`."""
        if name == "this":
            return this_machine()
        if name not in HARDWARE:
            raise ConfigurationError(f"unknown hardware {name!r}; known: {', '.join((*HARDWARE, 'this'))}.")
        return HARDWARE[name]

    def assuming(self, changes: Sequence[str]) -> Hardware:
        """The same with some numbers replaced, each written `"field=number"`, sizes also with a unit: `"memory=40GB"`.

        Raises:
            ConfigurationError: no such field, or no number.
        """
        numbers: dict[str, Any] = {item.name: item.type for item in fields(self) if item.type in ("int", "float")}
        found: dict[str, Any] = {}
        for change in changes:
            name, _, value = change.partition("=")
            if name not in numbers:
                raise ConfigurationError(f"assume: {change!r} is none of {', '.join(f'{n}=…' for n in numbers)}.")
            try:
                sized = name in ("memory", "bandwidth", "node_bandwidth", "storage")
                found[name] = parse_bytes(value) if sized else float(value)
            except ValueError as error:
                raise ConfigurationError(f"assume: {change!r}: {error}.") from error
            if numbers[name] == "int" and math.isfinite(found[name]) and found[name] >= 1:
                found[name] = int(found[name])
        return replace(self, **found, source=f"{self.source}; changed: {', '.join(changes)}") if found else self

    def assumptions(self) -> list[str]:
        """A line for every assumption."""

        def rate(flops: float, share: float) -> str:
            return f"{flops / 1e12:,.3g} TFLOP/s, of which {share:.0%} are reached"

        return [
            f"device: {self.name} ({self.source})",
            f"forward in the model's dtype: {rate(self.forward_flops, self.forward_share)}",
            f"statistics in float32: {rate(self.gram_flops, self.gram_share)}",
            f"factorisations in float64: {rate(self.solve_flops, self.solve_share)}",
            f"memory of a device: {self.memory / 1e9:,.4g} GB",
            f"network: {self.bandwidth / 1e9:,.3g} GB/s a device and direction within a node of {self.node}, "
            f"{self.node_bandwidth / 1e9:,.3g} GB/s beyond",
            f"checkpoint: {self.storage / 1e9:,.3g} GB/s for each process, all reading at once, nothing cached",
        ]


# Peaks without sparsity from NVIDIA's data sheets of the A100 80 GB SXM, H100 SXM and H200 SXM: bf16 tensor cores,
# float32 outside of them (TF32 would round the inputs), float64 tensor cores, and half of what NVLink carries in both
# directions; nodes are linked by 200 and 400 Gbit/s a device, as in a DGX. Guesses are the shares
# (large products of a model reach about half the peak, a factorisation has a sequential part) and storage (the disks
# of a node among eight processes).
_GUESSES: dict[str, Any] = {
    "forward_share": 0.5,
    "gram_share": 0.6,
    "solve_share": 0.3,
    "node": 8,
    "storage": 1e9,
    "source": "peaks and links of the data sheet; shares and storage are guesses",
}
_GB = 10**9
HARDWARE: dict[str, Hardware] = {
    name: Hardware(
        f"{name.upper()} SXM",
        *flops,
        memory=memory * _GB,
        bandwidth=bandwidth * _GB,
        node_bandwidth=between * _GB,
        **_GUESSES,
    )
    for name, flops, memory, bandwidth, between in (
        ("a100", (312e12, 19.5e12, 19.5e12), 80, 300, 25),
        ("h100", (989e12, 67e12, 67e12), 80, 450, 50),
        ("h200", (989e12, 67e12, 67e12), 141, 450, 50),
    )
}


def this_machine(dtype: torch.dtype = torch.float32, size: int = 1024) -> Hardware:
    """The rates of this machine's CPU with the threads that torch uses now, measured in about a second.

    Network and storage are not measured: 1 GB/s each, as between processes of one machine and from its disk.

    Args:
        dtype: of the model's products.
        size: side of the matrices; larger ones measure longer.
    """
    from ..calibration.statistics import gram

    wide = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    rows, square = wide.to(dtype), wide[:size].to(dtype)
    summed = gram(wide) + size * torch.eye(size, dtype=torch.float64)
    rates = (
        2 * len(rows) * size**2 / _seconds(lambda: rows @ square),
        gram_flops(len(wide), size) / _seconds(lambda: gram(wide)),
        size**3 / 3 / _seconds(lambda: torch.linalg.cholesky_ex(summed)),
    )
    memory = int(psutil.virtual_memory().total)
    name = f"this CPU, {torch.get_num_threads()} threads"
    source = "rates measured with products of that size; network and storage are guesses"
    return Hardware(name, *rates, 1.0, 1.0, 1.0, memory, 1e9, 1, 1e9, 1e9, source)


def _seconds(work: Callable[[], Any], tries: int = 5) -> float:
    work()
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def gram_flops(tokens: int, size: int) -> int:
    """Operations of `gram`: its strips leave out most of the lower half."""
    from ..calibration.statistics import strip_width

    width = strip_width(size)
    return sum(2 * tokens * min(width, size - start) * (size - start) for start in range(0, size, width))


@dataclass(frozen=True)
class PaperRow:
    """A compression on a number of devices, one process each.

    Args:
        devices: how many.
        survey: seconds of what is done before the first block.
        forward, statistics, factorisation: seconds of running the blocks, summing statistics, and solving.
        network, reading: seconds of the collectives, and of reading the checkpoint.
        memory: bytes at the highest point of a device.
        streamed: whether a device holds one block at a time, as `compress_checkpoint` does, since the whole model
            does not fit.
        fits: whether `memory` is within that of the device.
        traffic: bytes that a device sends, and about as many that it receives.
    """

    devices: int
    survey: float
    forward: float
    statistics: float
    factorisation: float
    network: float
    reading: float
    memory: int
    streamed: bool
    fits: bool
    traffic: int

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
        parts = (self.survey, self.forward, self.statistics, self.factorisation, self.network, self.reading)
        return sum(parts)


@dataclass(frozen=True)
class PaperPlan:
    """Rows by number of devices, and what they assume. `print` shows both."""

    rows: tuple[PaperRow, ...]
    hardware: Hardware
    workload: Workload

    def assumptions(self) -> list[str]:
        """A line for every assumption, of the hardware and of the way that processes work together."""
        data = self.workload
        return [
            *self.hardware.assumptions(),
            f"data: {data.num_samples} sequences of {data.sequence_length} tokens, dealt out over the processes",
            "one process a device; collectives send what ring algorithms send",
            "operations and bytes are counted as the code does them, times are these divided by the rates above, one "
            "after the other; starting kernels, copies, norms and writing files are left out",
        ]

    def table(self) -> Table:
        """One row a number of devices."""
        table = Table()
        titles = ("survey", "forward", "statistics", "solving", "network", "reading", "time", "memory", "", "traffic")
        for title in ("devices", *titles):
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            parts = (row.survey, row.forward, row.statistics, row.factorisation, row.network, row.reading)
            held = ("a block" if row.streamed else "whole") if row.fits else "too much"
            sizes = (f"{row.memory / 1e9:.1f} GB", held, f"{row.traffic / 1e9:.2f} GB")
            table.add_row(f"{row.devices}", *(readable(part) for part in (*parts, row.seconds)), *sizes)
        return table

    def __str__(self) -> str:
        console = Console(width=130, no_color=True)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get() + "\n".join(f"- {line}" for line in self.assumptions())


def readable(seconds: float) -> str:
    """Seconds in a unit that leaves two or three digits."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / 3600:.1f} h"


def on_paper(
    stages: Sequence[StageCosts],
    workload: Workload,
    hardware: Hardware,
    devices: Sequence[int],
    whole: Peak,
    by_block: Peak | None,
) -> PaperPlan:
    """A row for every number of devices.

    Args:
        whole, by_block: bytes for a workload with the model whole, and with a block of it (`None` where a recipe needs
            all blocks at once).

    Raises:
        ConfigurationError: no number of devices, or one below 1.
    """
    if not devices or min(devices) < 1:
        raise ConfigurationError(f"devices is {list(devices)!r}; expected numbers of 1 or more.")
    rows = tuple(_row(stages, workload, hardware, count, whole, by_block) for count in devices)
    return PaperPlan(rows, hardware, workload)


def _row(
    stages: Sequence[StageCosts],
    workload: Workload,
    hardware: Hardware,
    devices: int,
    whole: Peak,
    by_block: Peak | None,
) -> PaperRow:
    own = workload.shared_by(devices)
    sharing, memory, streamed = own.processes, whole(own), False
    if memory > hardware.memory and by_block is not None:
        memory, streamed = by_block(own), True
    rates = {
        "forward_flops": hardware.forward_flops * hardware.forward_share,
        "statistics_flops": hardware.gram_flops * hardware.gram_share,
        "solve_flops": hardware.solve_flops * hardware.solve_share,
    }
    survey = sum(
        stage.survey.seconds + sum(count / rates[name] for name, count in stage.survey.flops(sharing).items())
        for stage in stages
    )
    read = stages[0].model_bytes
    if streamed:
        read += sum(stage.block_bytes * stage.readings(sharing) for stage in stages) - stages[0].block_bytes
    traffic = sum(stage.traffic(sharing) if sharing > 1 else stage.result_bytes for stage in stages)
    traffic = 0 if devices == 1 else traffic
    return PaperRow(
        devices=devices,
        survey=survey,
        forward=own.tokens * sum(stage.forward_flops for stage in stages) / rates["forward_flops"],
        statistics=own.tokens * sum(stage.statistics_flops for stage in stages) / rates["statistics_flops"],
        factorisation=sum(stage.solved_in_turn(sharing) for stage in stages) / rates["solve_flops"],
        network=traffic / (hardware.bandwidth if devices <= hardware.node else hardware.node_bandwidth),
        reading=read / hardware.storage,
        memory=memory,
        streamed=streamed,
        fits=memory <= hardware.memory,
        traffic=traffic,
    )
