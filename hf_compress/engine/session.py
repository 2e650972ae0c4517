"""What one stage of a compression works with, and the contract between the engine and a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..anatomy import ModelAnatomy
from ..configuration import MethodConfig
from .blocks import Batch, BlockStream, every_nth
from .distributed import Processes
from .freed import return_freed_memory
from .report import ModuleReport
from .residency import Residency

ConfigType = TypeVar("ConfigType", bound=MethodConfig)
StatisticsType = TypeVar("StatisticsType")


@dataclass
class Session:
    """One stage on one model.

    Args:
        anatomy: the model and where its parts are.
        batches: calibration batches.
        held_out: batches of the same source that are never calibrated on, for choices such as temperatures.
        residency: brings blocks that are offloaded into memory; `None` where all are there.
        activations: folder where hidden states are kept; `None` for memory.
        processes: those that work on the stage together; each holds all of `batches`.
        notes: choices that were made from data, for the report.
        left_alone: what the method did not compress and why.
        replaced_pages: where weights that were replaced are mapped from files.
    """

    anatomy: ModelAnatomy
    batches: list[Batch]
    held_out: list[Batch]
    residency: Residency | None = None
    activations: Path | None = None
    processes: Processes = field(default_factory=Processes)
    notes: dict[str, Any] = field(default_factory=dict)
    left_alone: list[str] = field(default_factory=list)
    replaced_pages: list[tuple[int, int]] = field(default_factory=list)

    def progress(self, items: range, description: str, *, together: bool = False) -> Iterator[int]:
        """The blocks in turn, each in memory as long as it is the turn, with a progress bar on the first process. What
        a block has freed goes back to the system.

        Args:
            together: whether all processes go through the blocks side by side: then a block that one of them cannot
                read is an error on all.
        """
        hidden = None if self.processes.is_main else True
        for item in tqdm(items, desc=description, unit="block", leave=False, disable=hidden):
            with self.resident_on_all(item) if together else self.resident(item):
                yield item
            return_freed_memory()

    def resident(self, block: int) -> AbstractContextManager[None]:
        """Within the context a block is in memory, though it may be offloaded."""
        return nullcontext() if self.residency is None else self.residency.resident(block)

    @contextmanager
    def resident_on_all(self, block: int) -> Iterator[None]:
        """`resident`, entered by all processes or by none."""
        with ExitStack() as stack:
            if self.residency is not None:
                self.processes.each(lambda: stack.enter_context(self.resident(block)))
            yield

    def own_batches(self) -> list[Batch]:
        """This process's part of the calibration data: every sequence in its turn."""
        return every_nth(self.batches, self.processes.rank, self.processes.size)

    def is_shared(self, method: Method[Any, Any]) -> bool:
        """Whether all processes work on a method's blocks; with less than a sequence for each, one does it alone."""
        sequences = sum(max(len(tensor) for tensor in batch.values()) for batch in self.batches)
        return method.spreads and method.collects and 1 < self.processes.size <= sequences

    def whole_model(self) -> AbstractContextManager[None]:
        """Within the context all of the model can run, though blocks may be offloaded."""
        return nullcontext() if self.residency is None else self.residency.reachable()

    def stream(self, batches: list[Batch]) -> BlockStream:
        return BlockStream(self.anatomy, batches, self.activations, self.resident)


@dataclass(frozen=True)
class Expectation:
    """What a method will do, known before it sees data.

    Args:
        layout: entries as `layout_of` will give them. Where data decides on sizes, of the same total.
        largest_gram: side of the largest matrix of statistics; fewer calibration tokens leave it singular.
        statistics_bytes: of one block at a time, with the solver's copies.
        sums_bytes: of what processes add up for one block.
        growth_bytes: what the new modules take in memory beyond the layout's tensors.
        gradient_tokens: tokens of a pass through the whole model that keeps its activations for gradients.
        judges: whether the loss of held-out sequences is measured.
        slack_bytes: how much more the data may make of the layout's tensors; 0 where the recipe alone decides.
    """

    layout: list[dict[str, Any]] = field(default_factory=list)
    largest_gram: int = 0
    statistics_bytes: int = 0
    sums_bytes: int = 0
    growth_bytes: int = 0
    gradient_tokens: int = 0
    judges: bool = False
    slack_bytes: int = 0


# In place of a block's index: what lies outside the blocks.
OUTSIDE = -1


@dataclass(frozen=True)
class BlockResult:
    """What a method makes of one block.

    Args:
        modules: new modules by path.
        rows: their rows in the report.
        parameters: new values of parameters that stay, such as norms, by name.
    """

    modules: dict[str, nn.Module]
    rows: list[ModuleReport]
    parameters: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC, Generic[ConfigType, StatisticsType]):
    """A compression method. It decides and computes; the engine runs the model, replaces, saves and reports."""

    config_class: ClassVar[type[MethodConfig]]
    #: Whether the method looks at data at all; without, `compress` needs no calibration.
    needs_calibration: bool = True
    #: Types of modules in the layout of a model that this method goes on with, after `reopen`.
    continues: ClassVar[tuple[str, ...]] = ()
    #: Types of modules that this method leaves in the layout.
    leaves: ClassVar[tuple[str, ...]] = ()
    #: Whether a block's inputs come from the blocks compressed before it rather than from the dense model.
    sequential: bool = False
    #: Why the weights of all blocks have to be in memory at once; `None` where one block at a time is enough.
    needs_whole_model: str | None = None
    #: Whether the statistics of a block are sums over calibration data, which several processes may add up: then each
    #: runs a part of the data and solves a part of the modules. Otherwise one process does all of it for the others.
    spreads: bool = False
    #: Whether the processes that share the work survey together; otherwise one does it for the others.
    surveys_together: ClassVar[bool] = False
    #: Whether the survey's loops over blocks run all calibration data rather than a part of a fixed size.
    survey_reads_all: ClassVar[bool] = False
    #: Whether experts in parameters of three dimensions are compressed as well.
    reaches_experts: ClassVar[bool] = False
    #: Whether matrices whose dtype the family's class looks at are compressed as well: what replaces them has one.
    reaches_left_dense: ClassVar[bool] = False
    #: Weights of a block up to which two of them can be compressed in a few seconds, to see how long it takes.
    quick_weights: ClassVar[int] = 2**23

    def __init__(self, config: ConfigType, anatomy: ModelAnatomy) -> None:
        """Check the recipe against the model, before any data is read. Raises `ConfigurationError`."""
        self.config = config
        self.anatomy = anatomy

    @classmethod
    def continues_with(cls, config: Any) -> tuple[str, ...]:
        """`continues`, where that depends on the configuration."""
        return cls.continues

    @staticmethod
    def reopen(model: PreTrainedModel, config: Any) -> None:
        """Make the modules of `continues` that a configuration is for dense again, without forgetting what they must
        keep."""

    @property
    def collects(self) -> bool:
        """Whether the blocks have to run for their statistics."""
        return self.needs_calibration

    @abstractmethod
    def expect(self) -> Expectation:
        """The layout that the recipe leads to, without data: the model may be on the meta device."""

    def survey(self, session: Session) -> None:
        """One cheap pass for what must be known of all blocks before the first is touched; then allocate. The
        session's processes are those that call it, and all must decide the same."""

    @abstractmethod
    def decisions(self) -> dict[str, Any] | None:
        """What the survey decided, as plain JSON: kept with the resume point. `None`: survey again."""

    @abstractmethod
    def restore(self, decisions: dict[str, Any]) -> None:
        """Take up the decisions of an interrupted run instead of surveying again."""

    def compress_outside(self, session: Session) -> BlockResult | None:
        """New modules for what lies outside the blocks, before the walk; `None` where nothing is to be done."""
        return None

    @abstractmethod
    def collect(self, block: int) -> AbstractContextManager[StatisticsType]:
        """Gather the statistics of a block while the engine runs it within the context."""

    def observe(self, statistics: StatisticsType, output: Tensor, dense_output: Tensor) -> None:
        """In sequential order, see a batch's output of the block beside what the dense model has at this place."""

    def sums(self, statistics: StatisticsType) -> dict[str, Tensor]:
        """Where a method spreads: the tensors of a block's statistics that add up over processes, by name. What is
        written into them in place is in the statistics."""
        raise NotImplementedError

    @abstractmethod
    def compress_block(self, block: int, statistics: StatisticsType) -> BlockResult:
        """The new modules of a block. The dense ones are still in place. Raises `NumericalError`."""

    def tasks(self, block: int, statistics: StatisticsType) -> list[Callable[[], BlockResult]]:
        """The work of `compress_block` in pieces that do not depend on each other."""
        return [partial(self.compress_block, block, statistics)]

    def refine_block(
        self, block: int, result: BlockResult, stream: BlockStream, targets: Sequence[Tensor]
    ) -> BlockResult:
        """In sequential order, tune the new modules where they stand. `stream` is before the block, `targets` are the
        dense model's outputs of it, a batch each."""
        return result

    def finish(self) -> None:
        """What is left for the whole model after the last block of the last stage; runs on every process."""


@contextmanager
def placed(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    """Put modules in place for the time of the context."""
    before = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)


def weights_of(module: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias without gradients."""
    return module.weight.detach(), None if module.bias is None else module.bias.detach()
