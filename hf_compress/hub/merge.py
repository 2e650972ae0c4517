"""Put a marked section into a card that belongs to somebody else, and tell whether somebody has edited it."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_SECTION = re.compile(r"<!-- hf_compress: begin (\{.*?\}) -->\n.*?<!-- hf_compress: end -->", re.DOTALL)
_TRAINING = re.compile(r"<!-- hf_compress: training begin -->\n.*?<!-- hf_compress: training end -->", re.DOTALL)
_MARK = re.compile(r"<!-- hf_compress: (?:training )?(?:begin|end)")
_NOTE = "<!-- What stands between these marks is written by hf_compress; edit the text outside of them. -->"
# What Transformers says in the cards that it makes up: nobody's work is lost with them.
_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
_TRAINER = "This model card has been generated automatically according to the information the Trainer had access to."
_LICENSE = ("license", "license_name", "license_link")
_INHERITED = (*_LICENSE, "pipeline_tag", "language")
_SCALARS = (
    "base_model",
    "base_model_relation",
    "library_name",
    "license",
    "license_name",
    "license_link",
    "pipeline_tag",
)


@dataclass(frozen=True)
class _Parts:
    """A card taken apart: metadata, the text outside our marks, and what we noted when we wrote it."""

    data: dict[str, Any]
    text: str
    noted: dict[str, Any] | None

    @property
    def own_metadata(self) -> dict[str, Any]:
        """Values that we have set."""
        return dict((self.noted or {}).get("metadata") or {})

    @property
    def ancestor(self) -> str | None:
        """Of the text as it was made or last pushed."""
        return (self.noted or {}).get("outside")

    @property
    def edited(self) -> bool:
        """Whether somebody has ever changed the text, or it is somebody's altogether."""
        return self.noted is None or bool(self.noted.get("edited")) or self.ancestor != _fingerprint(self.text)


def merge(
    existing: str | None,
    section: str,
    data: ModelCardData,
    *,
    title: str,
    base: str = "",
    training: str | None = None,
    pushed: bool = False,
) -> str:
    """The card with a new section of ours and everything else as it is.

    Of the metadata, values that somebody has set stay, ours are brought up to date, and lists are joined. A card that
    Transformers has made up is replaced. A card whose marks or metadata are damaged comes back as it is, with a
    warning.

    Args:
        existing: the card that is there.
        section, data, title: ours; the title is for a card that is new.
        base: the name of the model's base, for `inherited_from`.
        training: what a Trainer says of its training, kept in a section of its own.
        pushed: the result goes to a repository, so that later edits on both sides start from it.
    """
    if existing is not None and not existing.strip():
        existing = None
    ours, outside = data.to_dict(), None
    if existing is None or is_generic(existing):
        text, merged = f"\n# {title}\n\n\0\n", ours
        edited, outside = False, _fingerprint(text)
    else:
        parts = _parse(existing)
        if parts is None:
            return existing
        merged, text, outside = _merged_metadata(parts.data, ours, parts.own_metadata), parts.text, parts.ancestor
        edited = parts.edited
        if parts.noted is None:
            text = f"{text.rstrip()}\n\n\0\n"
        if pushed:
            outside = _fingerprint(text)
    if training is not None:
        text = _with_training(text, training)
    noted = {
        "base": _fingerprint(base),
        "edited": edited,
        "metadata": {name: ours[name] for name in _SCALARS if name in ours},
        "outside": outside,
    }
    # No two dashes within a comment of HTML.
    mark = json.dumps(noted, sort_keys=True).replace("--", "\\u002d\\u002d")
    marked = f"<!-- hf_compress: begin {mark} -->\n{_NOTE}\n\n{section}\n\n<!-- hf_compress: end -->"
    return _header(merged) + text.replace("\0", marked)


def is_generic(card: str) -> bool:
    """Whether Transformers has made a card up, so that it says nothing of anybody."""
    if _MARK.search(card):
        return False
    if _DESCRIPTION not in card:
        # Who has filled in a Trainer's card is asked to remove the sentence.
        return _TRAINER in " ".join(card.split())
    blank = ModelCard.from_template(ModelCardData(), model_description=_DESCRIPTION)
    return bool(ModelCard(card, ignore_metadata_errors=True).text.split() == blank.text.split())


def inherited_from(card: str | None, base: str) -> dict[str, Any]:
    """What a model inherits from a card: license, task and language.

    Of a card that we have written the license alone, and only where somebody has set it or it is of the same base.

    Args:
        card: of the base, or one that lies where ours will be written.
        base: the name of the model's base.
    """
    parts = None if card is None or is_generic(card) else _parse(card, quietly=True)
    if parts is None:
        return {}
    names: tuple[str, ...] = _INHERITED
    if parts.noted is not None:
        is_ours = parts.own_metadata.get("license") == parts.data.get("license")
        names = () if is_ours and parts.noted.get("base") != _fingerprint(base) else _LICENSE
    found = {name: parts.data[name] for name in names if parts.data.get(name)}
    # Several languages are a list; several licenses the Hub would refuse.
    return {name: value for name, value in found.items() if name == "language" or isinstance(value, str)}


def choose(local: str | None, remote: str | None) -> str | None:
    """Which of two cards to go on with, so that no edit is lost: the folder's where only that was edited since the two
    were one, else the repository's."""
    if local is None or remote is None or local == remote:
        return remote if local is None else local
    if is_generic(local) or is_generic(remote):
        return remote if is_generic(local) else local
    ours, theirs = _parse(local, quietly=True), _parse(remote, quietly=True)
    if ours is None or theirs is None:
        return remote
    if ours.noted is not None and ours.ancestor == _fingerprint(ours.text):
        return remote
    if not theirs.edited or ours.ancestor == _fingerprint(theirs.text):
        return _header(_adopted(ours, theirs)) + ModelCard(local, ignore_metadata_errors=True).text
    if _fingerprint(ours.text) != _fingerprint(theirs.text):
        warnings.warn(
            "README.md was edited here and in the repository: the repository's text stays. Copy what is missing there "
            "over by hand.",
            stacklevel=2,
        )
    return remote


def _adopted(ours: _Parts, theirs: _Parts) -> dict[str, Any]:
    """Our folder's metadata, with what somebody has set in the repository and nobody here."""
    merged = dict(ours.data)
    for name, value in theirs.data.items():
        if value != theirs.own_metadata.get(name) and merged.get(name) == ours.own_metadata.get(name):
            merged[name] = value
    return merged


def _parse(card: str, *, quietly: bool = False) -> _Parts | None:
    """None, with a warning, where the marks or the metadata are damaged."""
    card = card.replace("\r\n", "\n").replace("\0", "")
    problem = None
    try:
        read = ModelCard(card, ignore_metadata_errors=True)
        data, text = read.data.to_dict(), read.text
    except Exception as error:  # PyYAML and huggingface_hub have many kinds for a text that is no YAML
        data, text, problem = {}, "", f"its metadata cannot be read ({type(error).__name__})"
    # Marks are counted first: with many of them the patterns would go over the text as often.
    single = all(text.count(f"<!-- hf_compress: {mark}") <= 1 for mark in ("begin", "training begin"))
    found = list(_SECTION.finditer(text)) if single else []
    noted: dict[str, Any] | None = None
    if len(found) == 1:
        try:
            noted = json.loads(found[0].group(1))
            if not isinstance(noted, dict) or not isinstance(noted.get("metadata") or {}, dict):
                raise ValueError(noted)
        except (ValueError, RecursionError):
            noted = None
            problem = "the mark of our section is damaged"
        text = text[: found[0].start()] + "\0" + text[found[0].end() :]
    if problem is None and (not single or len(found) > 1 or _MARK.search(_TRAINING.sub("", text))):
        problem = "the marks of our section are damaged"
    if problem is not None:
        if not quietly:
            warnings.warn(f"README.md stays as it is: {problem}. Mend or delete it, and write it again.", stacklevel=3)
        return None
    return _Parts(data, text, noted)


def _merged_metadata(theirs: dict[str, Any], ours: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    merged = dict(theirs)
    for name in _SCALARS:
        untouched = name not in theirs or (name in before and theirs[name] == before[name])
        if untouched and name in ours:
            merged[name] = ours[name]
        elif untouched and name in before:
            merged.pop(name, None)
    for name in ("tags", "datasets"):
        known = theirs.get(name) or []
        joined = [known] if isinstance(known, str) else list(known)
        joined += [value for value in ours.get(name) or [] if value not in joined]
        if joined:
            merged[name] = joined
    if "language" in ours:
        merged.setdefault("language", ours["language"])
    if "model-index" in ours:
        merged["model-index"] = _merged_results(theirs.get("model-index"), ours["model-index"])
    return merged


def _merged_results(theirs: Any, ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of others stay; of the same measure on the same data ours are the newer."""
    if not isinstance(theirs, list) or not theirs or not isinstance(theirs[0], dict):
        return ours

    def key(result: dict[str, Any], metric: dict[str, Any]) -> tuple[Any, ...]:
        return (result.get("dataset", {}).get("type"), metric.get("type"), metric.get("name"))

    new = {key(result, metric) for result in ours[0]["results"] for metric in result["metrics"]}
    kept = []
    for result in theirs[0].get("results") or []:
        metrics = [metric for metric in result.get("metrics") or [] if key(result, metric) not in new]
        if metrics:
            kept.append({**result, "metrics": metrics})
    return [{"name": theirs[0].get("name") or ours[0]["name"], "results": [*kept, *ours[0]["results"]]}]


def _with_training(text: str, training: str) -> str:
    marked = (
        "<!-- hf_compress: training begin -->\n## Training\n\n"
        f"{training.strip()}\n\n<!-- hf_compress: training end -->"
    )
    if _TRAINING.search(text):
        return _TRAINING.sub(lambda _: marked, text, count=1)
    return f"{text.rstrip()}\n\n{marked}\n"


def _header(data: dict[str, Any]) -> str:
    return f"---\n{ModelCardData(**data, ignore_metadata_errors=True).to_yaml(line_break=chr(10))}\n---\n"


def _fingerprint(text: str) -> str:
    """Of the words outside our marks; a Trainer's section is none of anybody's edits."""
    kept = re.sub(r"\s+", " ", _TRAINING.sub("", text)).strip()
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


def training_text(card: str) -> str:
    """What a Trainer's card says of the training, without the sections that it leaves to be filled in."""
    body = ModelCard(card, ignore_metadata_errors=True).text
    sections = re.split(r"\n(?=## )", body)
    results = [line for line in re.split(r"\n\n", sections[0]) if "results on the evaluation set" in line]
    told = [section for section in sections[1:] if "More information needed" not in section]
    return "\n\n".join(
        part.strip().replace("\n### ", "\n#### ").replace("## ", "### ", 1) for part in [*results, *told]
    )
