"""Block by block: run, collect, compress, replace, report, keep."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layout import connect
from .blocks import require_finite
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
    for block in session.progress(blocks, "compress"):
        outputs: list[Tensor] = []
        dense_outputs: list[Tensor] | None = None
        if block <= last_pending and dense is not None:
            dense_outputs = [dense.run(block, batch) for batch in range(len(dense))]
            dense.hidden = dense_outputs
        if resume.has(block):
            if block < last_pending and not method.sequential:
                outputs = [stream.run(block, batch) for batch in range(len(stream))]
            result = resume.load(block, anatomy.model)
            _install(session, result)
        else:
            with method.collect(block) as statistics:
                for batch in range(len(stream)):
                    output = stream.run(block, batch)
                    require_finite(output, f"output of {anatomy.block_paths[block]!r}")
                    if dense_outputs is not None:
                        with stream.text_positions(batch):
                            method.observe(statistics, output, dense_outputs[batch])
                    else:
                        outputs.append(output)
            result = method.compress_block(block, statistics)
            _install(session, result)
            if dense_outputs is not None:
                result = method.refine_block(block, result, stream, dense_outputs)
            resume.keep(block, result)
        rows.extend(result.rows)
        session.changed.extend(result.parameters)
        if block < last_pending:
            if method.sequential:
                stream.advance(block)
            else:
                stream.hidden = outputs
    return rows


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
