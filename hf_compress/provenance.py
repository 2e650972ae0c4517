"""What a checkpoint says of its own making, made fit to be shown: anybody may have written it."""

from __future__ import annotations

import re
import warnings
from typing import Any

from .checked import is_integer, is_nested_deeper, is_number, plain_text
from .engine.report import CompressionReport, ModuleReport

# Larger counts than any model's, and small enough to be divided as floats.
_MOST = 1 << 63
_COMMIT, _FINGERPRINT = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
_PACKAGE, _VERSION = re.compile(r"[A-Za-z0-9][\w.-]{0,99}"), re.compile(r"[A-Za-z0-9][\w.+!-]{0,99}")
# Fields of a description of calibration data.
_TEXTS = ("dataset", "name", "split", "revision", "text_column", "fingerprint")
_COUNTS = ("num_samples", "num_held_out", "seed", "sequence_length", "num_tokens", "num_held_out_tokens")


def report_in(provenance: Any) -> CompressionReport | None:
    """The report in a checkpoint's provenance; `None`, with a warning, where there is none to be read.

    Its texts are shown as they are, by a terminal too, and its numbers can be printed and divided.
    """
    if not isinstance(provenance, dict) or is_nested_deeper(provenance):
        provenance = {}
    report = CompressionReport.from_provenance(cleaned(provenance))
    problem = None if report is None else _problem_of(report)
    if problem is None:
        return report
    warnings.warn(f"the checkpoint's compression report cannot be read ({problem}); left out.", stacklevel=2)
    return None


def cleaned(value: Any) -> Any:
    """JSON with every string as plain text; what is no JSON stays."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, dict):
        return {plain_text(str(name)): cleaned(inner) for name, inner in value.items()}
    return [cleaned(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def known_recipe(recipe: Any) -> dict[str, Any] | None:
    """A recipe as far as it can be one: its stages are objects. `None` where there is none."""
    if not isinstance(recipe, dict) or not recipe or is_nested_deeper(recipe):
        return None
    stages = recipe.get("stages")
    stages = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    known: dict[str, Any] = cleaned({**recipe, "stages": stages})
    return known


def known_provenance(provenance: Any) -> dict[str, Any]:
    """A provenance whose known parts are of the types that `hf_compress` writes; other known parts are left out."""
    if not isinstance(provenance, dict) or is_nested_deeper(provenance):
        return {}
    known: dict[str, Any] = cleaned(provenance)
    for name, form in (("base_model", None), ("base_commit", _COMMIT)):
        value = known.get(name)
        if value is not None and not (isinstance(value, str) and (form is None or form.fullmatch(value))):
            known.pop(name)
    for name, sound in (("versions", _versions), ("calibration", _sources)):
        if name in known:
            known[name] = sound(known[name])
    return known


def _versions(found: Any) -> dict[str, str]:
    """Packages and their versions, which a card writes into a command."""
    pairs = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, str) and _is_version(name, value)}


def _is_version(name: str, value: str) -> bool:
    return bool(_PACKAGE.fullmatch(name) and _VERSION.fullmatch(value))


def _sources(found: Any) -> list[dict[str, Any]]:
    """Descriptions of calibration data."""
    sources = [_source(source) for source in found if isinstance(source, dict)] if isinstance(found, list) else []
    return [source for source in sources if "parts" in source or "dataset" in source]


def _source(found: dict[str, Any]) -> dict[str, Any]:
    source: dict[str, Any] = {}
    for name, value in found.items():
        if name == "parts":
            source[name] = _sources(value)
        elif name in _TEXTS:
            source |= {name: value} if isinstance(value, str) or (name == "text_column" and _are_texts(value)) else {}
        elif name in _COUNTS:
            source |= {name: value} if is_integer(value, 0, _MOST) else {}
        else:
            source[name] = value
    if not _FINGERPRINT.fullmatch(source.get("fingerprint", "")):
        source.pop("fingerprint", None)
    return source


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _problem_of(report: CompressionReport) -> str | None:
    """What is wrong with a report's types and ranges."""
    totals = [name for name in vars(report) if name.endswith(("_before", "_after"))]
    for name in totals:
        least = 1 if name.endswith("_before") else 0
        if not is_integer(getattr(report, name), least, _MOST):
            return f"`{name}` is no count"
    if not isinstance(report.notes, dict) or not isinstance(report.left_alone, list):
        return "`notes` or `left_alone` is of another kind"
    if not all(isinstance(reason, str) for reason in report.left_alone):
        return "`left_alone` holds what is no text"
    return next((problem for row in report.modules if (problem := _problem_of_row(row)) is not None), None)


def _problem_of_row(row: ModuleReport) -> str | None:
    if not (isinstance(row.path, str) and isinstance(row.kind, str) and is_integer(row.block, -1, _MOST)):
        return "a row names no module"
    counts = (row.parameters_before, row.parameters_after, row.bytes_before, row.bytes_after)
    if not all(is_integer(count, 0, _MOST) for count in counts):
        return f"a count of {row.path!r} is none"
    # An error may be infinite, or no number at all.
    error = isinstance(row.error, float) or is_number(row.error)
    return (
        None
        if error and is_number(row.size_before) and is_number(row.size_after)
        else f"a size of {row.path!r} is none"
    )
