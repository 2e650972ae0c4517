"""What a card may say: only what was recorded when the model was compressed, or measured afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..checked import plain_text
from ..configuration import QUANT_METHOD, method_config_from_dict
from ..engine.report import CompressionReport
from ..errors import CheckpointError, ConfigurationError
from ..evaluation.size import count_parameters
from ..layout import layout_of
from ..provenance import known_provenance, known_recipe, report_in
from .measured import EVALUATION_FILE, Evaluation
from .merge import inherited_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD_FILE = "README.md"
REPORT_FILE = "compression_report.json"
# What a Trainer leaves beside the weights that it has trained.
_TRAINER_FILE = "training_args.bin"
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

    def __post_init__(self) -> None:
        # A checkpoint may say anything; from here on it is of the types that the card is made of.
        object.__setattr__(self, "recipe", known_recipe(self.recipe))
        object.__setattr__(self, "provenance", known_provenance(self.provenance))

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
        """The base's, else what the architecture is for; a training may have made another model of it."""
        inherited, own = self.base_card.get("pipeline_tag"), self._by_architecture[1]
        return (own or inherited) if self.trained else (inherited or own)

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
        trained = trained or needs_training(stored.recipe)
        return Facts(stored.recipe, provenance, known, True, architecture, trained=trained)
    if not layout and stored is None and isinstance(report, CompressionReport):
        # Nothing was removed, or `dequantize` has put it back.
        if report.parameters_before in (report.parameters_after, count_parameters(model)):
            return None
        # A portable model, whose config has no place for a recipe.
        record = getattr(model, "compression_record", None) or {}
        provenance = dict(record.get("provenance") or {})
        return Facts(record.get("recipe"), provenance, report, False, architecture, trained=trained)
    return None


def needs_training(recipe: dict[str, Any] | None) -> bool:
    """Whether a recipe has a stage that only a training can carry out."""
    for stage in (known_recipe(recipe) or {}).get("stages", []):
        try:
            config = method_config_from_dict(stage)
        except ConfigurationError:
            continue  # a method that is not known here
        try:
            config.check_in_one_call()
        except ConfigurationError:
            return True
    return False


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
    named = config.get("architectures")
    architecture = plain_text(str(named[0])) if isinstance(named, list) and named else ""
    evaluation = Evaluation.load(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).is_file() else None
    if isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD:
        provenance = known_provenance(stored.get("provenance"))
        report = report_in(stored.get("provenance"))
        provenance.pop("report", None)
        recipe = known_recipe(stored.get("recipe"))
        trained = needs_training(recipe) or (folder / _TRAINER_FILE).is_file()
        return Facts(recipe, provenance, report, True, architecture, evaluation=evaluation, trained=trained)
    if (folder / REPORT_FILE).is_file():
        kept = _read(folder / REPORT_FILE)
        report = report_in(kept) if kept.get("report") else None
        provenance = known_provenance(kept.get("provenance"))
        trained = (folder / _TRAINER_FILE).is_file()
        return Facts(
            kept.get("recipe"), provenance, report, False, architecture, evaluation=evaluation, trained=trained
        )
    raise ConfigurationError(
        f"{folder.name!r} holds no model that hf_compress has compressed: its config.json has no "
        f"quantization_config of ours, and there is no {REPORT_FILE}."
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file.name}: expected an object, found a {type(data).__name__}.")
    return data


def base_card_of(
    facts: Facts, *, token: str | bool | None = None, folders: Iterable[str | os.PathLike[str] | None] = ()
) -> dict[str, Any]:
    """What the compressed model inherits from the card of its base: license, task and language.

    The card is the one on the Hub at the commit that was compressed, else one that lies in `folders`, where the model
    may have been loaded from. Without a card that can be had nothing is inherited: the new card then says so.
    """
    if facts.base and facts.base_commit is not None:
        try:
            path = hf_hub_download(facts.base, CARD_FILE, revision=facts.base_commit, token=token)
            return inherited_from(Path(path).read_text(encoding="utf-8"), facts.base)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError):
            return {}
    for folder in folders:
        card = None if folder is None else Path(folder) / CARD_FILE
        found = {}
        if card is not None and card.is_file():
            found = inherited_from(card.read_text(encoding="utf-8", errors="replace"), facts.base)
        if found:
            return found
    return {}
