"""The card of a compressed model: metadata, and one marked section that is ours in a text that is the user's."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..checked import plain_text
from ..configuration import method_config_from_dict
from ..errors import ConfigurationError
from .facts import Facts, needs_training
from .measured import missing_figures
from .merge import merge

RECIPE_FILE = "recipe.yaml"
FIGURE_FILE = "compression.svg"
_PLACEHOLDER = "path/to/this/model"
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "[": "\\[", "]": "\\]"}


def render_card(
    facts: Facts,
    *,
    repo_id: str | None = None,
    existing: str | None = None,
    training: str | None = None,
    figure: bool = True,
    pushed: bool = False,
) -> str:
    """The whole card as Markdown with its metadata.

    Args:
        facts: what is known of the model.
        repo_id: where it is going to be loaded from.
        existing: the card that is there; of it only the marked section changes.
        training: what a Trainer's card says, kept in a section of its own.
        figure: whether the figure lies beside the card.
        pushed: whether the card goes to a repository now.

    Raises:
        ConfigurationError: metadata that the Hub would refuse.
    """
    data = card_data(facts, repo_id)
    check_metadata(data)
    section = render_section(facts, repo_id=repo_id, figure=figure)
    title = _as_text(_title(facts, repo_id))
    return merge(existing, section, data, title=title, base=facts.base, training=training, pushed=pushed)


def render_section(facts: Facts, *, repo_id: str | None = None, figure: bool = True) -> str:
    """What stands between the marks."""
    environment = _environment()
    stages = [_stage(environment, stage) for stage in facts.stages]
    cited = list(dict.fromkeys(str(method.citation(stage)).strip() for stage, method in stages))
    recorded = facts.provenance.get("versions") or {}
    pins = " ".join(f"{name}=={version.split('+')[0]}" for name, version in recorded.items())
    command, irreproducible = _command(facts)
    report, evaluation = facts.report, facts.evaluation
    calibration = list(facts.provenance.get("calibration") or [])
    text = environment.get_template("base.md.jinja").render(
        facts=facts,
        repo_id=repo_id or _PLACEHOLDER,
        stages=stages,
        # No fence and no mark of ours ends within it.
        recipe=_yaml(recipe_file(facts)).replace("`", "'").replace("<!--", "&lt;!--") if facts.recipe else None,
        left_alone=[] if report is None else report.left_alone,
        rows=_rows(facts),
        notes=[*_notes(facts), *([] if evaluation is None else evaluation.notes())],
        missing=missing_figures(evaluation, language=facts.auto_class == "AutoModelForCausalLM"),
        figure=FIGURE_FILE if figure and report is not None and report.modules else None,
        versions=[f"{name} {version}" for name, version in recorded.items()],
        pins=pins,
        command=command,
        irreproducible=irreproducible,
        calibration=[_describe(source) for source in calibration],
        no_calibration=_without_calibration(facts),
        evaluated=evaluation is not None,
        license_known=bool(facts.base_card.get("license")),
        citations=[citation for citation in cited if citation],
    )
    return text.strip()


def card_data(facts: Facts, repo_id: str | None = None) -> ModelCardData:
    """The metadata: what the base's card knows, and what was done and measured here."""
    inherited = {name: facts.base_card.get(name) for name in ("license", "license_name", "license_link", "language")}
    on_hub = facts.base if facts.base_commit else None
    methods = list(dict.fromkeys(str(stage.get("method")) for stage in facts.stages))
    datasets = list(dict.fromkeys(_hub_datasets(facts.provenance.get("calibration") or [])))
    results = [] if facts.evaluation is None else facts.evaluation.results(facts.pipeline_tag)
    return ModelCardData(
        **{name: value for name, value in inherited.items() if value},
        base_model=on_hub,
        base_model_relation=("finetune" if facts.trained else "quantized") if on_hub else None,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=list(dict.fromkeys(["hf_compress", *methods, *facts.tags])),
        datasets=datasets or None,
        model_name=_title(facts, repo_id) if results else None,
        eval_results=results or None,
    )


def _title(facts: Facts, repo_id: str | None) -> str:
    return repo_id.split("/")[-1] if repo_id else f"{facts.base.split('/')[-1] or 'Model'}, compressed"


def check_metadata(data: ModelCardData) -> None:
    """What the Hub checks when a card arrives, without asking it.

    Raises:
        ConfigurationError: an id that cannot be one, a missing license link, or a value of the wrong kind.
    """
    values = data.to_dict()
    ids = [("base_model", values.get("base_model")), *(("datasets", name) for name in values.get("datasets") or [])]
    for name, value in ids:
        try:
            if value is not None:
                validate_repo_id(value)
        except HFValidationError as error:
            raise ConfigurationError(f"the card's `{name}` {value!r} is no id of the Hub: {error}") from error
    for name in ("license", "pipeline_tag", "library_name", "base_model_relation"):
        if not isinstance(values.get(name, ""), str):
            raise ConfigurationError(f"the card's `{name}` must be a string, got {values[name]!r}.")
    if not all(isinstance(tag, str) and tag for tag in values.get("tags") or []):
        raise ConfigurationError(f"the card's `tags` must be strings, got {values['tags']!r}.")
    try:
        read = ModelCard(f"---\n{data.to_yaml()}\n---\n").data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"the card's metadata cannot be read back: {error}") from error
    if read != values:
        raise ConfigurationError("the card's metadata change when they are read back.")


def recipe_file(facts: Facts) -> dict[str, Any]:
    """What `hf-compress run --recipe` reads: the stages, and the calibration data where others can fetch them."""
    # In one order, whether it was read from a config, which is sorted, or from the live model.
    stages = [{"method": stage.get("method"), **dict(sorted(stage.items()))} for stage in facts.stages]
    content: dict[str, Any] = {"stages": stages}
    sources = list(facts.provenance.get("calibration") or [])
    fields = [_calibration_fields(source) for source in sources]
    # Stages that were calibrated on one and the same data; a file has room for one source.
    if fields and all(one is not None and one == fields[0] for one in fields):
        content["calibration"] = fields[0]
    return content


def recipe_text(facts: Facts) -> str:
    """The recipe's file."""
    return _yaml(recipe_file(facts)) + "\n"


def _yaml(content: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    return text.rstrip()


@functools.cache
def _environment() -> jinja2.Environment:
    folder = files(__package__) / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = _as_text
    return environment


def _stage(environment: jinja2.Environment, stage: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """A stage with the values that it leaves to the defaults, and the template that speaks of its method."""
    name = f"{stage.get('method')}.md.jinja"
    known = {entry.name for entry in (files(__package__) / "templates").iterdir()} - {"base.md.jinja"}
    try:
        stage = method_config_from_dict(stage).to_dict()
    except ConfigurationError:
        # Of another version, or of a method that is not registered here: only its name is sure.
        method = str(stage.get("method", "?")).replace("`", "'")
        stage, name = {**stage, "method": method}, "other.md.jinja"
    return stage, environment.get_template(name if name in known else "other.md.jinja").module


def _as_text(value: Any) -> str:
    """Names and reasons as text: no HTML, no table cells, no links and images, no mark of ours."""
    text = " ".join(plain_text(str(value)).split())
    for character, escaped in _ESCAPES.items():
        text = text.replace(character, escaped)
    return text


def _rows(facts: Facts) -> list[tuple[str, str, str, str]]:
    report, rows = facts.report, []
    if report is not None:
        for title, before, after in (
            ("weights of the blocks' matrices", report.block_linear_before, report.block_linear_after),
            ("parameters", report.parameters_before, report.parameters_after),
            ("bytes in memory", report.bytes_before, report.bytes_after),
        ):
            rows.append((title, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}" if before else ""))
    return rows + ([] if facts.evaluation is None else facts.evaluation.rows())


def _notes(facts: Facts) -> list[str]:
    if facts.report is None:
        return ["The report of the compression was not recorded."]
    if facts.report.bits_per_weight is None:
        return []
    return [
        f"Bits for a coded weight: {facts.report.bits_per_weight:.3f}; for a weight of the whole model: "
        f"{facts.report.model_bits_per_weight:.3f}."
    ]


def _command(facts: Facts) -> tuple[str | None, list[str]]:
    """The command that makes the same again, or why there is none."""
    if not facts.recipe:
        return None, ["The recipe was not recorded."]
    if needs_training(facts.recipe):
        return None, [f"It was made in a training with the recipe in {RECIPE_FILE}, which no single command repeats."]
    if facts.trained:
        return None, [f"A training was part of it; the recipe alone, in {RECIPE_FILE}, does not make the same again."]
    try:
        for stage in facts.stages:
            method_config_from_dict(stage)
    except ConfigurationError:
        return None, [f"The recipe, in {RECIPE_FILE}, has a stage that the hf_compress which wrote this card lacks."]
    base = facts.base if facts.base_commit else "BASE"
    revision = f" --revision {facts.base_commit}" if facts.base_commit else ""
    command = f"hf-compress run {base} OUT{revision} --recipe {RECIPE_FILE}"
    sources, lines = facts.provenance.get("calibration") or [], []
    if sources and "calibration" not in recipe_file(facts):
        command += " --dataset DATA"
        prints = ", ".join(f"`{source['fingerprint']}`" for source in sources if source.get("fingerprint"))
        lines.append(
            "DATA stands for calibration data that are not on the Hub, or that no recipe file can name. The "
            f"fingerprint (SHA-256 of the tensors) was {prints or 'not recorded'}."
        )
    if not facts.base_commit:
        lines.append(f"BASE stands for {facts.base or 'the base, whose name was not recorded'}.")
    return command, lines


def _calibration_fields(source: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a `CalibrationConfig` that reads the same data from the Hub; None for data that are elsewhere."""
    shared = ("num_samples", "num_held_out", "seed", "sequence_length")
    if "parts" in source:
        # How much a part weighs is not on record: the parts' own numbers are.
        return None
    if "split" not in source:
        return None
    kept = ("dataset", "name", "split", "revision", "text_column", *shared)
    return {name: source[name] for name in kept if source.get(name) is not None}


def _hub_datasets(sources: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    for source in sources:
        found += _hub_datasets(source["parts"]) if "parts" in source else []
        found += [source["dataset"]] if "split" in source else []
    return found


def _describe(source: dict[str, Any]) -> str:
    if "parts" in source:
        return "a mixture: " + "; ".join(_describe(part).rstrip(".") for part in source["parts"]) + "."
    details = [f"{name} {source[name]}" for name in ("name", "split", "revision") if source.get(name)]
    amount = f"{source.get('num_samples', 'an unknown number of')} samples"
    if source.get("sequence_length"):
        amount += f" of {source['sequence_length']} tokens"
    held = f", {source['num_held_out']} more held out for choices" if source.get("num_held_out") else ""
    origin = f"{source.get('dataset')}" + (f" ({', '.join(details)})" if details else "")
    return f"{origin}: {amount}{held}, drawn with seed {source.get('seed', 0)}."


def _without_calibration(facts: Facts) -> str:
    if not facts.recipe:
        return "What it was calibrated on was not recorded."
    return "No calibration data were used in the compression." + (" A training was." if facts.trained else "")
