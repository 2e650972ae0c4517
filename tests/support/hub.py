"""Fixtures and helpers of the tests against the Hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import transformers.utils.hub

from .hub_server import HubServer

OWNER = "hf_owner"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that is empty, and a user `me` who is logged in to it with a cache that is empty; without xet."""
    from huggingface_hub import constants

    with HubServer(tmp_path / "server") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setenv("HF_TOKEN", OWNER)
        # Uploads are repeated after waits; the waits are not what is tested.
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
        yield server


def elsewhere(hub: HubServer, folder: Path, code: str, *, package: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code as a stranger does, in a process and with a cache of its own; `package=False`: without hf_compress."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
    hidden = "" if package else "import sys; sys.modules['hf_compress'] = None\n"
    command: list[Any] = [sys.executable, "-c", hidden + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
