"""Upload a compressed model in one commit, with its card, its tokenizer and nothing of an earlier push left over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.hub import hf_api

from ..errors import CompressionError
from .facts import CARD_FILE, Facts, facts_of_folder
from .files import PROCESSING, WEIGHTS, matching, model_files, names_in
from .publish import EXTRAS, Options, prepare

# Of a processor: without one of them a repository has none.
_PROCESSORS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json")


class UploadError(CompressionError, OSError):
    """An upload that did not arrive. The repository is as it was: all files come in one commit."""


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    options: Options | None = None,
) -> CommitInfo:
    """Push a saved model to the Hub, and leave in the folder what was written for it.

    Args:
        folder: a compressed model, as `save_pretrained` wrote it. Files that are not a model's stay at home.
        repo_id: the repository; it is made where there is none.
        private, token, revision, create_pr, commit_message, commit_description: as of Transformers' `push_to_hub`.
        options: what to leave out, and what was measured.

    Raises:
        ConfigurationError: no compressed model in the folder.
        UploadError: the upload failed; the folder is whole.
    """
    root = Path(folder)
    facts = facts_of_folder(root)
    with explained(repo_id, f"The folder {root.name!r} is whole", f"hf-compress push {root.name} {repo_id}"):
        repo_id = hf_api().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return upload(
            root,
            repo_id,
            facts,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            options=options,
        )


def upload(
    folder: Path,
    repo_id: str,
    facts: Facts,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    options: Options | None = None,
    sources: tuple[str, ...] = (),
) -> CommitInfo:
    """Prepare a folder and commit its files to a repository that is there.

    Args:
        sources: folders or ids of models to take the tokenizer from, before the base.
    """
    api = hf_api()
    if revision is not None and not revision.startswith("refs/pr/"):
        try:
            api.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
        except HfHubHTTPError as error:
            # Who opens a pull request need not be allowed to make branches.
            if not (create_pr and error.response.status_code == 403):
                raise
    there = names_there(repo_id, revision, token)
    remote_card = remote_card_of(repo_id, revision, token)
    written = prepare(
        folder, facts, repo_id=repo_id, remote_card=remote_card, options=options, token=token, sources=sources
    )
    if not matching(there, _PROCESSORS):
        add_processing(folder, facts, sources, token=token)
    files = model_files(folder, [name for name in EXTRAS if name in written])
    # Weights of an earlier push would be found first by whoever loads the new ones.
    stale = set(matching(there, WEIGHTS)) - set(files) if matching(files, WEIGHTS) else set()
    stale |= {name for name in EXTRAS if name in there and name not in written}
    operations: list[Any] = [CommitOperationAdd(name, folder / name) for name in files]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    commit: CommitInfo = api.create_commit(
        repo_id=repo_id,
        operations=operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        token=token,
        create_pr=create_pr,
        revision=revision,
    )
    return commit


@contextmanager
def explained(repo_id: str, state: str, way_on: str) -> Iterator[None]:
    """Turn a failed request into an `UploadError` that says what is left and how to go on."""
    try:
        yield
    except CompressionError:
        raise
    except Exception as error:  # requests, storage and xet fail in many types of several packages
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UploadError(
            f"the upload to {repo_id!r} failed: {reason} {state}, and the repository is as it was. Go on with "
            f"{way_on}: files that have arrived are not sent again."
        ) from error


def add_processing(folder: Path, facts: Facts, sources: tuple[str, ...], *, token: str | bool | None = None) -> None:
    """Copy tokenizer, image processor and chat template into a folder that has none: from the first source that has
    them, which are folders or ids, else from the base at its commit."""
    if matching(names_in(folder), _PROCESSORS):
        return
    places: list[tuple[str, str | None]] = [(source, None) for source in sources if source]
    if facts.base and facts.base_commit:
        places.append((facts.base, facts.base_commit))
    for name, revision in places:
        found = Path(name) if os.path.isdir(name) else _fetched(name, revision, token)
        # A snapshot of nothing has no folder.
        names = matching(names_in(found), PROCESSING) if found is not None and found.is_dir() else []
        if found is None or not matching(names, _PROCESSORS):
            continue
        for one in names:
            (folder / one).parent.mkdir(exist_ok=True)
            shutil.copyfile(found / one, folder / one)
        return


def _fetched(name: str, revision: str | None, token: str | bool | None) -> Path | None:
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(PROCESSING)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None


def names_there(repo_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    """The files of a repository; none where it or the branch cannot be seen."""
    try:
        return list(hf_api().list_repo_files(repo_id, revision=revision, token=token))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        # Made by somebody who may not see it, or a branch that only the commit makes.
        return []


def remote_card_of(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    """The card of a repository; None if it has none."""
    if CARD_FILE not in names_there(repo_id, revision, token):
        return None
    path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token)
    return Path(path).read_text(encoding="utf-8", errors="replace")
