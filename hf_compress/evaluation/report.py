"""A comparison as one HTML page that needs nothing else: tables, figures, light and dark."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from ..engine.report import CompressionReport, ModuleReport
from ..errors import ConfigurationError
from .compare import Comparison
from .figures import Point, bars, hatch_patterns, human_bytes, human_count, letter, scatter
from .measurement import Measurement, Row


def write_report(comparison: Comparison, path: str | os.PathLike[str], *, title: str = "Compression report") -> None:
    """Write the page to the file `path`, over a file that is there.

    It holds a table of all figures; size against quality with the Pareto front, for every measure of quality; bars of
    speed, memory and size; what compression did to every block of every compressed model, as a heat map and as a
    table; and how everything was measured. It asks nothing of the network and runs no script.

    Raises:
        ConfigurationError: where the file cannot be written, or the comparison is empty.
    """
    check_report_path(path)
    page = render_report(comparison, title=title)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"the report cannot be written: {error}.") from error


def check_report_path(path: str | os.PathLike[str]) -> None:
    """Raise `ConfigurationError` for a file whose folder is not there, or a folder."""
    if Path(path).is_dir():
        raise ConfigurationError(f"{str(path)!r} is a folder; the report is a file, such as report.html.")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigurationError(f"no folder {str(Path(path).parent)!r} for the report.")


def render_report(comparison: Comparison, *, title: str = "Compression report") -> str:
    """The page itself."""
    measurements = comparison.measurements
    if not measurements:
        raise ConfigurationError("a report needs at least one measured model.")
    style = (files(__package__) / "report.css").read_text(encoding="utf-8")
    labels = _labels(measurements)
    sections = [
        _summary(comparison),
        _section("Size against quality", _quality_figures(comparison, labels), note=_FRONT),
        _section("Speed, memory and size", _cost_figures(comparison, labels)),
        _layers(measurements),
        *_compressions(measurements),
        _section("How it was measured", "".join(f"<li>{escape(note)}</li>" for note in comparison.notes), "ul"),
    ]
    # The policy forbids every request and every script, should a browser ever find one here.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{hatch_patterns()}\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(section for section in sections if section) + "\n"
        f"<footer>hf_compress {escape(version('hf_compress'))}</footer>\n</body>\n</html>\n"
    )


def _labels(measurements: Sequence[Measurement]) -> list[str]:
    """The last parts of paths and Hub ids where these tell the models apart, else the whole names."""
    short = [measurement.name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] for measurement in measurements]
    return short if len(set(short)) == len(short) and all(short) else [one.name for one in measurements]


_FRONT = (
    "Filled and joined by a line: the Pareto front. Hollow: another model is as small and as good, and better in one."
)


def _section(title: str, content: str, tag: str = "div", note: str = "") -> str:
    if not content:
        return ""
    kind = ' class="figures"' if tag == "div" else ""
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}<{tag}{kind}>{content}</{tag}></section>"


def _summary(comparison: Comparison) -> str:
    first, rows = comparison.measurements[0], []
    for row in comparison.rows:
        cells = []
        for own in comparison.measurements:
            value, _, change = row.cell(own, first).partition(" (")
            cells.append(f"<td>{value}" + (f' <span class="change">({change}</span>' if change else "") + "</td>")
        rows.append(f'<tr><th scope="row">{escape(row.title)}</th>{"".join(cells)}</tr>')
    head = "".join(
        f'<th scope="col"><span class="letter">{letter(index)}</span>{escape(one.name)}</th>'
        for index, one in enumerate(comparison.measurements)
    )
    against = f"In brackets: compared with A, {first.name}." if len(comparison.measurements) > 1 else ""
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{escape(against)}</caption><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _points(x: Row, y: Row | None, comparison: Comparison, labels: list[str]) -> list[Point]:
    points = []
    for index, (own, label) in enumerate(zip(comparison.measurements, labels, strict=True)):
        across = x.value(own)
        up = 0.0 if y is None else y.value(own)
        if across is None or up is None or not (math.isfinite(across) and math.isfinite(up)):
            continue
        text = _plain(x, across) if y is None else f"{_plain(x, across)}, {format(up, y.form)}"
        points.append(Point(index, label, across, up, text))
    return points


def _plain(row: Row, value: float) -> str:
    """Bytes and counts as people say them; the table has every digit."""
    if "bytes" in row.title:
        return human_bytes(value)
    return human_count(value) if row.title == "parameters" else format(value, row.form)


def _quality_figures(comparison: Comparison, labels: list[str]) -> str:
    sizes = {row.title: row for row in comparison.rows if row.role == "size"}
    everyone = len(comparison.measurements)
    parameters, stored = sizes["parameters"], sizes.get("bytes on disk (weights)")
    # Bytes are what counts, where they are known of all; for codes and zeros parameters would say nothing.
    size = stored if stored and len(_points(stored, None, comparison, labels)) == everyone else parameters
    figures = []
    for row in comparison.rows:
        points = _points(size, row, comparison, labels) if row.role == "quality" else []
        if len(points) > 1:
            figures.append(
                scatter(
                    points,
                    x_title="size on disk" if size is stored else "parameters",
                    y_title=row.title,
                    higher_is_better=row.higher_is_better,
                    x_label=human_bytes if size is stored else human_count,
                )
            )
    return "".join(figures)


def _cost_figures(comparison: Comparison, labels: list[str]) -> str:
    drawn = [(row, _points(row, None, comparison, labels)) for row in comparison.rows if row.role != "quality"]
    return "".join(
        bars(points, title=row.title, higher_is_better=row.higher_is_better) for row, points in drawn if points
    )


def _heads(titles: Sequence[str], texts: Sequence[str]) -> str:
    """The heads of columns of numbers, and of those in `texts`."""
    kinds = {title: ' class="text"' if title in texts else "" for title in titles}
    return "".join(f'<th scope="col"{kind}>{title}</th>' for title, kind in kinds.items())


def _layers(measurements: Sequence[Measurement]) -> str:
    rows = "".join(
        f'<tr><td class="text">{escape(own.name)}</td><td class="text">{escape(layer.path)}</td><td>{layer.count}</td>'
        f'<td class="text">{escape(layer.description)}</td><td>{layer.dense_milliseconds:.3f}</td>'
        f"<td>{layer.milliseconds:.3f}</td><td>{layer.speedup:.2f}x</td></tr>"
        for own in measurements
        for layer in own.layers
    )
    if not rows:
        return ""
    heads = _heads(
        ["model", "first of its kind", "layers", "format", "dense (ms)", "compressed (ms)", "speed-up"],
        texts=("model", "first of its kind", "format"),
    )
    return (
        "<section><h2>Layers beside dense ones of their size</h2>"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</section>"
    )


def _compressions(measurements: Sequence[Measurement]) -> list[str]:
    parts = [
        f'<h3><span class="letter">{letter(index)}</span>{escape(own.name)}</h3>{_compression(own.compression)}'
        for index, own in enumerate(measurements)
        if own.compression is not None
    ]
    return [f"<section><h2>What compression did to every block</h2>{''.join(parts)}</section>"] if parts else []


def _compression(report: CompressionReport) -> str:
    totals = "; ".join(
        f"{name} {before:,} → {after:,} ({after / max(1, before) - 1:+.1%})"
        for name, before, after in (
            ("block matrices", report.block_linear_before, report.block_linear_after),
            ("all parameters", report.parameters_before, report.parameters_after),
            ("bytes in memory", report.bytes_before, report.bytes_after),
        )
    )
    notes = [f"{name}: {value}" for name, value in sorted(report.notes.items())]
    notes += [f"left alone: {reason}" for reason in report.left_alone]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f"<p>{escape(totals)}</p>"
        + (_heat_map(report.modules) if report.modules else "")
        + (_modules(report.modules) if report.modules else "")
        + (f"<details><summary>Notes ({len(notes)})</summary><ul>{listed}</ul></details>" if notes else "")
    )


def kept_share(rows: Sequence[ModuleReport]) -> float:
    """What is left of the parts in `rows`: of their bytes where they are coded, of their parameters where they shrank;
    of both, one after the other, where they were shrunk and then coded."""
    share = 1.0
    for coded in (False, True):
        some = [row for row in rows if (row.bytes_before > 0) is coded]
        before = sum(row.bytes_before if coded else row.parameters_before for row in some)
        after = sum(row.bytes_after if coded else row.parameters_after for row in some)
        share *= after / before if before else 1.0
    return share


def _heat_map(modules: Sequence[ModuleReport]) -> str:
    """A table, so that its numbers can be read, copied and spoken; the shade only repeats them."""
    kinds = list(dict.fromkeys(row.kind for row in modules))
    cells: dict[tuple[int, str], list[ModuleReport]] = {}
    for row in modules:
        cells.setdefault((row.block, row.kind), []).append(row)
    blocks = list(range(max(row.block for row in modules) + 1))
    if any(row.block < 0 for row in modules):
        blocks.append(-1)
    errors = {key: max(row.error for row in rows) for key, rows in cells.items()}
    largest = max((error for error in errors.values() if math.isfinite(error)), default=0.0) or 1.0
    lines = []
    for block in blocks:
        shares = [
            _shade(kept_share(cells[block, kind]), "share") if (block, kind) in cells else _EMPTY for kind in kinds
        ]
        lost = [_shade(errors[block, kind], "error", largest) if (block, kind) in cells else _EMPTY for kind in kinds]
        name = str(block) if block >= 0 else "outside"
        gap = '<td class="gap"></td>'
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(shares)}{gap}{"".join(lost)}</tr>')
    heads = "".join(f'<th scope="col">{escape(kind)}</th>' for kind in kinds)
    caption = (
        "Left: what is kept of each kind of matrices. Right: relative squared error, the largest of the kind in the "
        "block. Darker in the light theme, bluer in the dark one: less kept, larger error. A dot: left as it was."
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="heat"><caption>{caption}</caption><thead>'
        f'<tr><td></td><th colspan="{len(kinds)}" scope="colgroup">kept</th><td class="gap"></td>'
        f'<th colspan="{len(kinds)}" scope="colgroup">error</th></tr>'
        f'<tr><th scope="col">block</th>{heads}<td class="gap"></td>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


_EMPTY = "<td>·</td>"


def _shade(value: float, what: str, largest: float = 1.0) -> str:
    if not math.isfinite(value):
        return f"<td>{value}</td>"
    # The square root tells small errors apart; the text stays readable on 70 % of the darkest colour.
    level = 1 - value if what == "share" else math.sqrt(max(0.0, value) / largest)
    text = f"{value:.1%}" if what == "share" else f"{value:.4f}"
    return f'<td style="--level:{0.7 * min(1.0, max(0.0, level)):.3f}">{text}</td>'


def _modules(modules: Sequence[ModuleReport]) -> str:
    lines = "".join(
        f'<tr><td>{row.block if row.block >= 0 else "outside"}</td><td class="text">{escape(row.path)}</td>'
        f'<td class="text">{escape(row.kind)}</td><td>{row.size_before:g} → {row.size_after:g}</td>'
        f"<td>{row.parameters_before:,} → {row.parameters_after:,}</td>"
        f"<td>{f'{row.bytes_before:,} → {row.bytes_after:,}' if row.bytes_before else '·'}</td>"
        f"<td>{row.error:.4g}</td></tr>"
        for row in modules
    )
    heads = _heads(["block", "module", "kind", "size", "parameters", "bytes", "error"], texts=("module", "kind"))
    return (
        f'<details><summary>All {len(modules)} modules</summary><div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )
