"""What a card may say: only what was recorded when the model was compressed, or measured afterwards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..configuration import QUANT_METHOD
from ..engine.report import CompressionReport
from ..errors import CheckpointError, ConfigurationError
from ..layout import layout_of
from .measured import EVALUATION_FILE, Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT_FILE = "compression_report.json"
# What a base's card knows that a compressed model inherits.
_INHERITED = ("license", "license_name", "license_link", "pipeline_tag", "language")
# By the end of an architecture's name: the class that loads it, and the task that the Hub knows it for.
_ARCHITECTURES = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}


@dataclass(frozen=True)
class Facts:
    """What is known of one compressed model.

    Args:
        recipe: the stages as JSON; None where it was not recorded.
        provenance: base, commit, versions and calibration data, without the report.
        report: what was done to every module; None where it cannot be read.
        needs_package: whether the checkpoint holds modules of ours; a portable model holds none.
        architecture: the model's class.
        base_card: license, task and language as the base's own card has them.
        evaluation: figures that were measured, if any.
        trained: whether the weights were trained after or while they were compressed.
        tags: that somebody has asked for.
    """

    recipe: dict[str, Any] | None
    provenance: dict[str, Any]
    report: CompressionReport | None
    needs_package: bool
    architecture: str
    base_card: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    trained: bool = False
    tags: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """What the base is called; empty where it had no name."""
        return str(self.provenance.get("base_model") or "")

    @property
    def base_commit(self) -> str | None:
        """The commit of the base, where it came from the Hub."""
        commit = self.provenance.get("base_commit")
        return str(commit) if commit else None

    @property
    def auto_class(self) -> str:
        """The class that a stranger loads it with."""
        return self._by_architecture[0]

    @property
    def pipeline_tag(self) -> str | None:
        """The base's, else what the architecture is for."""
        return self.base_card.get("pipeline_tag") or self._by_architecture[1]

    @property
    def _by_architecture(self) -> tuple[str, str | None]:
        return next(
            (found for end, found in _ARCHITECTURES.items() if self.architecture.endswith(end)), ("AutoModel", None)
        )

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The recipe's stages."""
        return list((self.recipe or {}).get("stages", []))

    def to_dict(self) -> dict[str, Any]:
        """What the report's file holds, plain JSON."""
        return {
            "recipe": self.recipe,
            "provenance": self.provenance,
            "report": self.report and self.report.to_dict(),
        }


def facts_of_model(model: PreTrainedModel, *, trained: bool = False) -> Facts | None:
    """The facts of a live model; None for one that was not compressed here."""
    layout = layout_of(model)
    stored: Any = getattr(model.config, "quantization_config", None)
    report = getattr(model, "compression_report", None)
    architecture = type(model).__name__
    if layout and getattr(stored, "quant_method", None) == QUANT_METHOD:
        provenance = {name: value for name, value in stored.provenance.items() if name != "report"}
        known = report if isinstance(report, CompressionReport) else None
        return Facts(stored.recipe, provenance, known, True, architecture, trained=trained)
    if not layout and stored is None and isinstance(report, CompressionReport):
        if report.parameters_after == report.parameters_before:
            return None
        # A portable model: Transformers keeps no recipe for it.
        return Facts(None, {}, report, False, architecture, trained=trained)
    return None


def facts_of_folder(folder: Path) -> Facts:
    """The facts of a saved model.

    Raises:
        ConfigurationError: no such folder, or a model that was not compressed by this package.
        CheckpointError: a file that cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"no compressed model in {folder.name!r}: the folder holds no config.json.")
    config = _read(folder / "config.json")
    stored = config.get("quantization_config")
    architecture = str(next(iter(config.get("architectures") or []), ""))
    evaluation = Evaluation.load(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).is_file() else None
    if isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD:
        provenance = dict(stored.get("provenance") or {})
        report = CompressionReport.from_provenance(provenance)
        provenance.pop("report", None)
        return Facts(stored.get("recipe"), provenance, report, True, architecture, evaluation=evaluation)
    if (folder / REPORT_FILE).is_file():
        kept = _read(folder / REPORT_FILE)
        report = CompressionReport.from_provenance(kept) if kept.get("report") else None
        provenance = dict(kept.get("provenance") or {})
        return Facts(kept.get("recipe"), provenance, report, False, architecture, evaluation=evaluation)
    raise ConfigurationError(
        f"{folder.name!r} holds no model that hf_compress has compressed: its config.json has no "
        f"quantization_config of ours, and there is no {REPORT_FILE}."
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file.name}: expected an object, found a {type(data).__name__}.")
    return data


def base_card_of(facts: Facts, *, token: str | bool | None = None) -> dict[str, Any]:
    """What the compressed model inherits from the card of its base, at the commit that was compressed.

    A base that is not on the Hub, or whose card cannot be had, gives nothing: the card then says that it is not known.
    """
    if not facts.base or facts.base_commit is None:
        return {}
    try:
        path = hf_hub_download(facts.base, "README.md", revision=facts.base_commit, token=token)
        data = ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError):
        return {}
    return {name: data[name] for name in _INHERITED if data.get(name)}
