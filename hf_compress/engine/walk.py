"""Block by block: run, collect, compress, replace, report, keep."""

from __future__ import annotations

from typing import Any

from ..layout import connect
from .activations import Activations
from .blocks import BlockStream, require_finite
from .report import ModuleReport
from .resume import ResumePoint
from .session import OUTSIDE, BlockResult, Method, Session


def walk(session: Session, method: Method[Any, Any], resume: ResumePoint) -> list[ModuleReport]:
    """Compress what lies outside the blocks, then all blocks in order, and return the report's rows.

    In dense order every block sees what the dense model would show it. In sequential order it sees the output of the
    blocks compressed before it, and a second, dense stream runs along so that a method may pull the residual stream
    back towards the dense one. Finished blocks of an interrupted run are loaded; the activations before the first
    unfinished one are recomputed.
    """
    anatomy = session.anatomy
    blocks = range(len(anatomy))
    pending = [block for block in blocks if not resume.has(block)] if method.collects else []
    last_pending = pending[-1] if pending else -1
    # Without data, or with every block finished, nothing runs.
    stream = session.stream(session.batches if pending else [])
    dense = stream.copy() if method.sequential else None
    rows = _compress_outside(session, method, resume)
    if rows and method.sequential:
        stream = session.stream(stream.batches)
    start = _take_up(resume, pending[0], stream, dense) if pending else 0
    for block in session.progress(blocks, "compress"):
        dense_outputs: Activations | None = None
        if start <= block <= last_pending and dense is not None:
            dense.advance(block, check=False)
            dense_outputs = dense.hidden
        if resume.has(block):
            if start <= block < last_pending and not method.sequential:
                stream.advance(block, check=False)
            result = resume.load(block, anatomy.model)
            _install(session, result)
            whole = {} if session.residency is None else session.residency.whole(block)
            if whole and resume.lacks(block, whole):
                resume.keep(block, result, whole)
            _moved(session, resume, block)
        else:
            with method.collect(block) as statistics:
                for batch in range(len(stream)):
                    output = stream.run(block, batch)
                    require_finite(output, f"output of {anatomy.block_paths[block]!r}")
                    if dense_outputs is not None:
                        with stream.text_positions(batch):
                            method.observe(statistics, output, dense_outputs[batch])
                    else:
                        stream.hidden[batch] = output  # the method sees what hooks saw, and needs the input no more
            result = method.compress_block(block, statistics)
            _install(session, result)
            if dense_outputs is not None:
                result = method.refine_block(block, result, stream, dense_outputs)
            del statistics  # a gigabyte on a 7B model, which the next block needs
            resume.keep(block, result, None if session.residency is None else session.residency.whole(block))
            _moved(session, resume, block)
        rows.extend(result.rows)
        session.changed.extend(result.parameters)
        if start <= block < last_pending and method.sequential:
            stream.advance(block)
        if start <= block < last_pending:
            resume.keep_activations(
                block + 1, {"stream": stream.hidden, **({} if dense is None else {"dense": dense.hidden})}
            )
    return rows


def _take_up(resume: ResumePoint, unfinished: int, stream: BlockStream, dense: BlockStream | None) -> int:
    """Move the streams to where an interrupted run had kept them; the block that they are at the entrance of then."""
    kept = resume.activations()
    if kept is None or kept[0] > unfinished:
        return 0
    for name, moved in (("stream", stream), ("dense", dense)):
        for batch in range(0 if moved is None else len(moved)):
            assert moved is not None
            moved.hidden[batch] = kept[1][f"{name}.{batch}"].to(moved.hidden[batch].device)
    return kept[0]


def _moved(session: Session, resume: ResumePoint, block: int) -> None:
    """From now on an offloaded block is the compressed one."""
    file = resume.path(block)
    if session.residency is not None and file is not None:
        session.residency.moved(block, file)


def _compress_outside(session: Session, method: Method[Any, Any], resume: ResumePoint) -> list[ModuleReport]:
    if resume.has(OUTSIDE):
        result: BlockResult | None = resume.load(OUTSIDE, session.anatomy.model)
    else:
        result = method.compress_outside(session)
        if result is not None:
            resume.keep(OUTSIDE, result)
    if result is None:
        return []
    _install(session, result)
    return list(result.rows)


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
    connect(model)
    for name, values in result.parameters.items():
        model.get_parameter(name).detach().copy_(values)
