"""Put beside a saved model what a repository holds besides the weights: card, report, figure, recipe, shim."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import write_text
from .card import FIGURE_FILE, RECIPE_FILE, recipe_text, render_card
from .facts import CARD_FILE, REPORT_FILE, Facts, base_card_of, facts_of_folder, facts_of_model
from .figure import layer_figure
from .measured import EVALUATION_FILE, Evaluation
from .merge import choose, inherited_from, training_text
from .shim import SHIM_FILE, write_shim

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluation import Comparison

EXTRAS = (CARD_FILE, REPORT_FILE, FIGURE_FILE, RECIPE_FILE, EVALUATION_FILE, SHIM_FILE)


@dataclass(frozen=True)
class Options:
    """What goes along with the model.

    Args:
        report: the report as JSON.
        figures: the figure of every block.
        evaluation: what was measured; a `Comparison` of base and compressed model, its JSON, or a file with it.
        evaluation_data: the name of the text that it was measured on, such as a dataset's id.
        license: of the base, as the Hub calls it, such as `apache-2.0`; otherwise the base's card says it.
        base: folder of the base, for its card, where the base is not on the Hub.
        tags: more of the card's tags.
    """

    report: bool = True
    figures: bool = True
    evaluation: Comparison | dict[str, Any] | str | Path | None = None
    evaluation_data: str | None = None
    license: str | None = None
    base: str | Path | None = None
    tags: tuple[str, ...] = ()

    def measured(self, facts: Facts) -> Facts:
        """The facts with the figures that are given here."""
        if self.evaluation is None:
            return facts
        return replace(facts, evaluation=Evaluation.load(self.evaluation, self.evaluation_data))

    def inherited(
        self,
        facts: Facts,
        existing: str | None,
        *,
        token: str | bool | None = None,
        sources: tuple[str, ...] = (),
    ) -> Facts:
        """The facts with what the base's card says. The license may be given too, or stand in the card that exists."""
        found = base_card_of(facts, token=token, folders=(self.base, *sources))
        if self.license is not None:
            found = {name: value for name, value in found.items() if not name.startswith("license")}
            found["license"] = self.license
        elif "license" not in found:
            found = {**inherited_from(existing, facts.base), **found}
        return replace(facts, base_card=found)


def prepare(
    folder: Path,
    facts: Facts,
    *,
    repo_id: str | None = None,
    remote_card: str | None = None,
    trainer_card: str | None = None,
    options: Options | None = None,
    token: str | bool | None = None,
    sources: tuple[str, ...] = (),
    pushed: bool = True,
) -> list[str]:
    """Write the card and what belongs to it into a saved model's folder; the names of the files.

    Args:
        folder: of a saved model; a card that lies there is kept but for its marked section.
        facts: of the model.
        repo_id: where it will be loaded from, if that is known.
        remote_card: the card that is in the repository already.
        trainer_card: a Trainer's own card, of which a section is made.
        options: what to leave out, and what was measured.
        token: for the card of a base that is not public.
        sources: folders or ids that the model may have been loaded from.
        pushed: whether the folder goes to a repository now.
    """
    options = options or Options()
    facts = options.measured(facts)
    if facts.evaluation is None and (folder / EVALUATION_FILE).is_file():
        facts = replace(facts, evaluation=Evaluation.load(folder / EVALUATION_FILE))
    existing = choose(read_card(folder), remote_card)
    facts = replace(options.inherited(facts, existing, token=token, sources=sources), tags=options.tags)
    written = [CARD_FILE]
    figure = options.figures and facts.report is not None and bool(facts.report.modules)
    if options.report:
        write_text(folder / REPORT_FILE, json.dumps(facts.to_dict(), indent=2) + "\n")
        written.append(REPORT_FILE)
    if figure and facts.report is not None:
        write_text(folder / FIGURE_FILE, layer_figure(facts.report))
        written.append(FIGURE_FILE)
    if facts.recipe:
        write_text(folder / RECIPE_FILE, recipe_text(facts))
        written.append(RECIPE_FILE)
    if facts.evaluation is not None:
        write_text(folder / EVALUATION_FILE, json.dumps(facts.evaluation.to_dict(), indent=2) + "\n")
        written.append(EVALUATION_FILE)
    if facts.needs_package:
        write_shim(folder)
        written.append(SHIM_FILE)
    training = None if trainer_card is None else training_text(trainer_card)
    card = render_card(facts, repo_id=repo_id, existing=existing, training=training, figure=figure, pushed=pushed)
    write_text(folder / CARD_FILE, card)
    return written


def folder_card(folder: str | os.PathLike[str], *, repo_id: str | None = None, options: Options | None = None) -> str:
    """The card of a saved model as Markdown, with what somebody has written into the card that lies there.

    Raises:
        ConfigurationError: no compressed model in the folder.
    """
    root = Path(folder)
    options, existing = options or Options(), read_card(root)
    facts = options.inherited(options.measured(facts_of_folder(root)), existing)
    return render_card(facts, repo_id=repo_id, existing=existing)


def prepare_folder(
    folder: str | os.PathLike[str], *, repo_id: str | None = None, options: Options | None = None
) -> list[str]:
    """Write card, report, figure, recipe and shim into a saved model's folder without pushing it; their names.

    Raises:
        ConfigurationError: no compressed model in the folder.
    """
    root = Path(folder)
    return prepare(root, facts_of_folder(root), repo_id=repo_id, options=options, pushed=False)


def keep_report(model: PreTrainedModel, folder: str | os.PathLike[str]) -> bool:
    """Put the report, with the recipe, beside a portable model that was saved: none of its other files tells what was
    done to it. Returns whether there was one to keep."""
    facts = facts_of_model(model)
    if facts is None or facts.needs_package:
        return False
    write_text(Path(folder) / REPORT_FILE, json.dumps(facts.to_dict(), indent=2) + "\n")
    return True


def read_card(folder: Path) -> str | None:
    """The card in a folder, if there is one."""
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
