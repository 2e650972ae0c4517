"""Block by block: run, collect, compress, replace, report, keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from ..errors import CompressionError
from ..layout import connect
from .activations import Activations
from .blocks import BlockStream, require_finite
from .distributed import Processes
from .freed import pages_of_files
from .report import ModuleReport
from .results import exchange, merged
from .resume import ResumePoint
from .session import OUTSIDE, BlockResult, Method, Session

Statistics = TypeVar("Statistics")


def walk(session: Session, method: Method[Any, Any], resume: ResumePoint) -> list[ModuleReport]:
    """Compress what lies outside the blocks, then all blocks in order, and return the report's rows.

    In dense order every block sees what the dense model would show it. In sequential order it sees the output of the
    blocks compressed before it, and a second, dense stream runs along so that a method may pull the residual stream
    back towards the dense one. Finished blocks of an interrupted run are loaded; the activations before the first
    unfinished one are recomputed.

    Several processes run a part of the calibration data each, where a method's statistics add up. In dense order one
    of them gets the sums of a block and solves it, while the others solve the blocks after it; in sequential order all
    get the sums, and each solves a part of the block. Of other methods the main process does all the work. Every
    process has every result in the end.
    """
    return _Walk(session, method, resume).run()


class _Walk:
    def __init__(self, session: Session, method: Method[Any, Any], resume: ResumePoint) -> None:
        self.session, self.method, self.resume = session, method, resume
        self.anatomy, self.processes = session.anatomy, session.processes
        places = (OUTSIDE, *range(len(self.anatomy)))
        self.finished = set(self.processes.once(lambda: [place for place in places if resume.has(place)]))
        self.shared = session.is_shared(method)
        self.works = self.shared or self.processes.is_main
        # How many blocks are solved at once.
        self.group = self.processes.size if self.shared and not method.sequential else 1
        self.rows: dict[int, list[ModuleReport]] = {}

    def run(self) -> list[ModuleReport]:
        session, method = self.session, self.method
        unfinished = [block for block in range(len(self.anatomy)) if block not in self.finished]
        pending = unfinished if method.collects and self.works else []
        last_pending = pending[-1] if pending else -1
        batches = session.own_batches() if self.shared else session.batches
        # Without data, or with every block finished, nothing runs.
        stream = session.stream(batches if pending else [])
        dense = stream.copy() if method.sequential else None
        if self._compress_outside() and method.sequential:
            stream = session.stream(stream.batches)
        start = _take_up(self.resume, pending[0], stream, dense) if pending else 0
        waiting: dict[int, Any] = {}
        for block in session.progress(range(len(self.anatomy)), "compress", together=True):
            dense_outputs: Activations | None = None
            if start <= block <= last_pending and dense is not None:
                dense.advance(block, check=False)
                dense_outputs = dense.hidden
            if block in self.finished:
                if start <= block < last_pending and not method.sequential:
                    stream.advance(block, check=False)
                self._load(block)
            elif self.shared:
                waiting[block] = self._summed(block, stream, dense_outputs, owner=len(waiting))
                if len(waiting) == self.group or block == unfinished[-1]:
                    self._compress_together(waiting)
                    waiting.clear()
            else:
                self._compress(block, stream, dense_outputs)
            if start <= block < last_pending and method.sequential:
                stream.advance(block)
            if start <= block < last_pending:
                self.resume.keep_activations(
                    block + 1, {"stream": stream.hidden, **({} if dense is None else {"dense": dense.hidden})}
                )
        return [row for place in sorted(self.rows) for row in self.rows[place]]

    def _compress(self, block: int, stream: BlockStream, dense_outputs: Activations | None) -> None:
        """On the main process: the whole work on a block. The others receive its result."""
        own: dict[int, BlockResult] = {}

        def work() -> None:
            statistics = self._collected(block, stream, dense_outputs)
            result = self.method.compress_block(block, statistics)
            del statistics  # a gigabyte on a 7B model
            _install(self.session, result)
            if dense_outputs is not None:
                result = self.method.refine_block(block, result, stream, dense_outputs)
            own[block] = result

        self.processes.once(work)
        made = exchange(self.processes, own, self.anatomy.model)[block]
        self._keep(block, made() if self.processes.size == 1 else self._received(made))

    def _received(self, made: Callable[[], BlockResult]) -> BlockResult:
        """A result of the main process, in place on the others as well."""

        def work() -> BlockResult:
            result = made()
            if not self.works:
                _install(self.session, result)
            return result

        return self.processes.together(work)

    def _collected(self, block: int, stream: BlockStream, dense_outputs: Activations | None) -> Any:
        """The statistics of a block over the data of this process."""
        with self.method.collect(block) as statistics:
            for batch in range(len(stream)):
                output = stream.run(block, batch)
                require_finite(output, f"output of {self.anatomy.block_paths[block]!r}")
                if dense_outputs is not None:
                    with stream.text_positions(batch):
                        self.method.observe(statistics, output, dense_outputs[batch])
                else:
                    stream.hidden[batch] = output  # the method sees what hooks saw, and needs the input no more
        return statistics

    def _summed(self, block: int, stream: BlockStream, dense_outputs: Activations | None, owner: int) -> Any:
        """The statistics of a block over the data of all processes; `None` on one that will not solve it."""
        everyone = self.method.sequential
        statistics = added_up(
            self.processes,
            lambda: self._collected(block, stream, dense_outputs),
            self.method.sums,
            None if everyone else owner,
        )
        return statistics if everyone or owner == self.processes.rank else None

    def _compress_together(self, waiting: dict[int, Any]) -> None:
        """On all processes: solve the blocks that wait, and put the results in place."""
        own: dict[tuple[int, int], BlockResult] = {}

        def work() -> None:
            rank, size = self.processes.rank, self.processes.size
            for block, statistics in waiting.items():
                if statistics is not None:
                    with self.session.resident(block):
                        tasks = list(enumerate(self.method.tasks(block, statistics)))
                        for number, task in tasks[rank::size] if self.method.sequential else tasks:
                            own[block, number] = task()

        self.processes.each(work)
        for block in waiting:
            # One block after the other: nobody holds the results of all.
            pieces = exchange(
                self.processes, {key: own.pop(key) for key in list(own) if key[0] == block}, self.anatomy.model
            )
            with self.session.resident_on_all(block):
                self._keep(block, self._placed(lambda: merged(pieces[key]() for key in sorted(pieces))))  # noqa: B023

    def _placed(self, made: Callable[[], BlockResult]) -> BlockResult:
        """A result, in the place of what it replaces on every process."""

        def work() -> BlockResult:
            result = made()
            _install(self.session, result)
            return result

        return self.processes.together(work)

    def _load(self, block: int) -> None:
        """Put the result of an earlier run in place."""
        result = self._placed(self._kept(block))
        whole = {} if self.session.residency is None else self.session.residency.whole(block)

        def complete() -> None:
            if whole and self.resume.lacks(block, whole):
                self.resume.keep(block, result, whole)

        self.processes.once(complete)
        self._moved(block)
        self._report(block, result)

    def _kept(self, place: int) -> Callable[[], BlockResult]:
        own: dict[int, BlockResult] = {}
        self.processes.once(lambda: own.update({place: self.resume.load(place, self.anatomy.model)}))
        return exchange(self.processes, own, self.anatomy.model)[place]

    def _keep(self, block: int, result: BlockResult) -> None:
        residency = self.session.residency
        whole = None if residency is None else residency.whole(block)
        self.processes.once(lambda: self.resume.keep(block, result, whole))
        self._moved(block)
        self._report(block, result)

    def _moved(self, block: int) -> None:
        """From now on an offloaded block is the compressed one."""
        file = self.resume.path(block)
        if self.session.residency is not None and file is not None:
            self.session.residency.moved(block, file)

    def _report(self, place: int, result: BlockResult) -> None:
        self.rows[place] = list(result.rows)

    def _compress_outside(self) -> bool:
        """Whether there is anything outside the blocks that is compressed now."""
        if OUTSIDE in self.finished:
            made: Callable[[], BlockResult] | None = self._kept(OUTSIDE)
        else:
            made = self._made_outside()
        if made is None:
            return False
        result = self._placed(made)
        self._report(OUTSIDE, result)
        return bool(result.rows)

    def _made_outside(self) -> Callable[[], BlockResult] | None:
        own: dict[int, BlockResult] = {}

        def work() -> None:
            result = self.method.compress_outside(self.session)
            if result is not None:
                own[OUTSIDE] = result
                self.resume.keep(OUTSIDE, result)

        self.processes.once(work)
        return exchange(self.processes, own, self.anatomy.model).get(OUTSIDE)


def added_up(
    processes: Processes,
    collect: Callable[[], Statistics],
    sums: Callable[[Statistics], dict[str, Tensor]],
    owner: int | None,
) -> Statistics:
    """Collect on every process and add up what `sums` names, for the owner or, if that is `None`, for all.

    Raises:
        CompressionError: processes that have collected different things.
    """
    found: list[Statistics] = []

    def work() -> list[tuple[str, tuple[int, ...], str]]:
        found.append(collect())
        return [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in sorted(sums(found[0]).items())]

    shapes = processes.each(work)
    if any(other != shapes[0] for other in shapes):
        raise CompressionError(
            f"the processes have measured different things of the same block: {shapes}. Give every process the same "
            "model, and calibration data of one kind."
        )
    for _, tensor in sorted(sums(found[0]).items()):
        processes.add_up(tensor, owner)
    return found[0]


def _take_up(resume: ResumePoint, unfinished: int, stream: BlockStream, dense: BlockStream | None) -> int:
    """Move the streams to where an interrupted run had kept them; the block that they are at the entrance of then."""
    kept = resume.activations()
    # Where there are several stacks, what the earlier ones put out is needed too: they run again.
    if kept is None or kept[0] > unfinished or len(stream.anatomy.stacks) > 1:
        return 0
    for name, moved in (("stream", stream), ("dense", dense)):
        for batch in range(0 if moved is None else len(moved)):
            assert moved is not None
            moved.hidden[batch] = kept[1][f"{name}.{batch}"].to(moved.hidden[batch].device)
    return kept[0]


def _install(session: Session, result: BlockResult) -> None:
    model = session.anatomy.model
    for path, module in result.modules.items():
        old = model.get_submodule(path)
        reference = next(old.parameters())
        module.to(reference.device)
        module.train(old.training)
        for parameter in module.parameters():
            parameter.requires_grad_(reference.requires_grad and parameter.is_floating_point())
        model.set_submodule(path, module)
        session.replaced_pages += pages_of_files(parameter.detach() for parameter in old.parameters())
    connect(model)
    for name, values in result.parameters.items():
        model.get_parameter(name).detach().copy_(values)
