"""What happens at each of Transformers' ways to the Hub, for models that were compressed here.

`integration` puts these functions in the places of Transformers' own, which they get as their first argument.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.hub import hf_api

from ..integration import SOURCE
from ..output import write_text
from .facts import CARD_FILE, Facts, facts_of_model
from .publish import EXTRAS, Options, prepare, read_card
from .push import add_processing, explained, remote_card_of, upload

_OPTIONS = {"include_report": "report", "include_figures": "figures"} | {
    name: name for name in ("evaluation", "evaluation_data", "license")
}
# In the order of the arguments of save_pretrained.
_POSITIONS = ("is_main_process", "state_dict", "push_to_hub", "max_shard_size", "variant", "token")
_SAVING = ("is_main_process", "state_dict", "max_shard_size", "variant", "save_peft_format", "save_original_format")


@dataclass(frozen=True)
class _Push:
    """What a call of `push_to_hub` wants that Transformers' own steps do not hand on."""

    options: Options
    sources: tuple[str, ...]


_CURRENT: ContextVar[_Push | None] = ContextVar("current_push", default=None)


def known(model: Any, *, trained: bool = False) -> Facts | None:
    """The facts of a model that was compressed here; None for any other, and for one whose adapter alone is saved."""
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        return None
    return facts_of_model(model, trained=trained)


def push_to_hub(original: Callable[..., Any], model: PreTrainedModel, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """`model.push_to_hub`: Transformers makes the repository and saves; `upload_modified_files` does the rest."""
    if known(model) is None:
        return original(model, repo_id, *args, **kwargs)
    options = _taken_options(kwargs)
    name = model.name_or_path
    tags = kwargs.get("tags") or []
    tags = [*(getattr(model, "model_tags", None) or []), *([tags] if isinstance(tags, str) else tags)]
    push = _Push(replace(options, tags=tuple(dict.fromkeys(tags))), _sources(model))
    token = _CURRENT.set(push)
    try:
        with explained(repo_id, "The model in memory is as it was", "the same call"):
            result = original(model, repo_id, *args, **kwargs)
    except BaseException:
        model.name_or_path = model.config.name_or_path = name
        raise
    finally:
        _CURRENT.reset(token)
    # The upload saved to a temporary folder; the model's name is the repository's.
    model.name_or_path = model.config.name_or_path = repo_id
    return result


def upload_modified_files(
    original: Callable[..., Any],
    owner: Any,
    working_dir: str | os.PathLike[str],
    repo_id: str,
    files_timestamps: dict[str, float],
    commit_message: str | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """The last step of every upload of a model: with our card in place of the generic one, in one commit."""
    facts, push = known(owner), _CURRENT.get()
    if facts is None:
        hub = {"commit_message": commit_message, "token": token, "create_pr": create_pr, "revision": revision}
        return original(owner, working_dir, repo_id, files_timestamps, commit_description=commit_description, **hub)
    folder = Path(working_dir)
    # Transformers has put its own card there: the repository's, or one that it has made up.
    (folder / CARD_FILE).unlink(missing_ok=True)
    return upload(
        folder,
        repo_id,
        facts,
        token=token,
        create_pr=create_pr,
        revision=revision,
        commit_message=commit_message,
        commit_description=commit_description,
        options=None if push is None else push.options,
        sources=_sources(owner) if push is None else push.sources,
    )


def save_and_push(
    save: Callable[..., Any], model: PreTrainedModel, directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> Any:
    """`save_pretrained(push_to_hub=True)`: first a whole folder, then its upload.

    Args:
        save: writes the folder, given the arguments that are not for the Hub.
    """
    kwargs = {**dict(zip(_POSITIONS, args, strict=False)), **kwargs}
    options, sources = _taken_options(kwargs), _sources(model)
    saving = {name: kwargs.pop(name) for name in _SAVING if name in kwargs}
    kwargs.pop("push_to_hub")
    result = save(directory, **saving)
    if not model.should_save_on_this_rank(saving.get("is_main_process", True)):
        return result
    root, facts = Path(directory), known(model)
    assert facts is not None
    token, repo_id = kwargs.pop("token", None), kwargs.pop("repo_id", None) or root.absolute().name
    names = ("commit_message", "commit_description", "create_pr", "revision")
    hub = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
    with explained(repo_id, f"The folder {root.name!r} is whole", f"hf-compress push {root.name} {repo_id}"):
        repo_id = hf_api().create_repo(repo_id, token=token, exist_ok=True, **kwargs).repo_id
        upload(root, repo_id, facts, token=token, options=options, sources=sources, **hub)
    return result


def trainer_push_to_hub(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.push_to_hub`: `create_model_card` below prepares the folder that it uploads."""
    if _trained(trainer) is None:
        return original(trainer, *args, **kwargs)
    folder = Path(trainer.args.output_dir).name
    with explained(
        trainer.hub_model_id or folder, f"The folder {folder!r} is whole", "trainer.push_to_hub() or hf-compress push"
    ):
        return original(trainer, *args, **kwargs)


def create_model_card(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> None:
    """A Trainer writes its card over the one that is there: keep that, and make a section of what the Trainer says."""
    facts = _trained(trainer)
    options = _taken_options(kwargs) if facts is not None else None
    if facts is None or not trainer.is_world_process_zero():
        original(trainer, *args, **kwargs)
        return
    folder = Path(trainer.args.output_dir)
    before = read_card(folder)
    original(trainer, *args, **kwargs)
    written = read_card(folder)
    if before is None:
        (folder / CARD_FILE).unlink()
    else:
        write_text(folder / CARD_FILE, before)
    sources = _sources(trainer.accelerator.unwrap_model(trainer.model))
    prepare(
        folder,
        facts,
        repo_id=trainer.hub_model_id,
        remote_card=_card_there(trainer),
        trainer_card=written,
        options=options,
        token=trainer.args.hub_token,
        sources=sources,
    )
    add_processing(folder, facts, sources, token=trainer.args.hub_token)


def push_from_checkpoint(original: Callable[..., Any], trainer: Any, checkpoint_folder: str) -> Any:
    """`hub_strategy="every_save"` and its likes: the folder is uploaded as it is, so it has to be whole before."""
    facts = _trained(trainer)
    if facts is not None and trainer.is_world_process_zero() and str(trainer.args.hub_strategy.value) != "end":
        checkpoint, folder = Path(checkpoint_folder), Path(trainer.args.output_dir)
        existing = read_card(folder)
        if existing is not None:
            write_text(checkpoint / CARD_FILE, existing)
        written = prepare(
            checkpoint,
            facts,
            repo_id=trainer.hub_model_id,
            remote_card=_card_there(trainer),
            token=trainer.args.hub_token,
            sources=_sources(trainer.accelerator.unwrap_model(trainer.model)),
        )
        for name in EXTRAS:
            if name in written:
                shutil.copyfile(checkpoint / name, folder / name)
    return original(trainer, checkpoint_folder)


def _trained(trainer: Any) -> Facts | None:
    return known(trainer.accelerator.unwrap_model(trainer.model), trained=True)


def _card_there(trainer: Any) -> str | None:
    if trainer.hub_model_id is None:
        return None
    return remote_card_of(trainer.hub_model_id, trainer.args.hub_revision, trainer.args.hub_token)


def _taken_options(kwargs: dict[str, Any]) -> Options:
    """Our own keywords, taken out of those of Transformers."""
    return Options(**{field: kwargs.pop(name) for name, field in _OPTIONS.items() if name in kwargs})


def _sources(model: PreTrainedModel) -> tuple[str, ...]:
    """Where the model's tokenizer may lie."""
    names = (str(model.name_or_path or ""), str(model.__dict__.get(SOURCE) or ""))
    return tuple(name for name in names if name)
