"""What compression did to every block, as one SVG that needs no style sheet: the card's figure."""

from __future__ import annotations

import math
from html import escape

from ..engine.report import CompressionReport, ModuleReport
from ..evaluation.report import kept_share

_LEFT, _TOP, _CELL, _ROW, _GAP = 64, 46, 104, 20, 24


def layer_figure(report: CompressionReport) -> str:
    """A heat map of blocks by kinds of matrices: what is kept, and the error that it costs.

    Every value is written out; the shade only repeats it. The background is white in light and dark pages alike.
    """
    kinds = list(dict.fromkeys(row.kind for row in report.modules))
    cells: dict[tuple[int, str], list[ModuleReport]] = {}
    for row in report.modules:
        cells.setdefault((row.block, row.kind), []).append(row)
    blocks = sorted({row.block for row in report.modules if row.block >= 0})
    if any(row.block < 0 for row in report.modules):
        blocks.append(-1)
    errors = {key: max(row.error for row in rows) for key, rows in cells.items()}
    largest = max((error for error in errors.values() if math.isfinite(error)), default=0.0) or 1.0
    second = _LEFT + _CELL * len(kinds) + _GAP
    width, height = second + _CELL * len(kinds) + 12, _TOP + _ROW * len(blocks) + 10
    parts = [
        f'<text x="{_LEFT}" y="16" class="head">kept</text>',
        f'<text x="{second}" y="16" class="head">error</text>',
    ]
    for column, kind in enumerate(kinds):
        for start in (_LEFT, second):
            parts.append(f'<text x="{start + _CELL * (column + 0.5):g}" y="36" class="mid">{escape(kind)}</text>')
    for line, block in enumerate(blocks):
        top = _TOP + _ROW * line
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 14}" class="end">{block if block >= 0 else "outside"}</text>')
        for column, kind in enumerate(kinds):
            rows = cells.get((block, kind))
            share = None if rows is None else kept_share(rows)
            error = errors.get((block, kind))
            loss = None if error is None or not math.isfinite(error) else math.sqrt(max(0.0, error) / largest)
            parts.append(
                _cell(_LEFT + _CELL * column, top, "" if share is None else f"{share:.1%}", share and 1 - share)
            )
            parts.append(_cell(second + _CELL * column, top, "" if error is None else f"{error:.4f}", loss))
    style = (
        "text{font:12px sans-serif;fill:#16181d}.head{font-weight:bold}.mid{text-anchor:middle}.end{text-anchor:end}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(_summary(report))}"><style>{style}</style>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _summary(report: CompressionReport) -> str:
    return (
        f"Blocks by kinds of matrices: what is kept and the relative squared error. {len(report.modules)} parts, "
        f"block matrices {report.block_linear_before:,} to {report.block_linear_after:,}"
    )


def _cell(left: float, top: float, text: str, level: float | None) -> str:
    opacity = 0.0 if level is None else 0.75 * min(1.0, max(0.0, level))
    return (
        f'<rect x="{left}" y="{top}" width="{_CELL - 2}" height="{_ROW - 2}" fill="#4a8fd6" '
        f'fill-opacity="{opacity:.3f}"/>'
        f'<text x="{left + _CELL / 2 - 1:g}" y="{top + 14}" class="mid">{text or "·"}</text>'
    )
