"""No pickle anywhere, and no code from a recipe or from calibration data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

import hf_compress
from hf_compress import ConfigurationError
from hf_compress.calibration.sources import open_rows
from hf_compress.cli.recipe_file import load_recipe

PACKAGE = Path(hf_compress.__file__).parent


def test_a_recipe_file_cannot_ask_for_code(tmp_path: Path) -> None:
    sound: dict[str, Any] = {"stages": [{"method": "codebook", "bits": 3}], "calibration": {"dataset": "a/b"}}
    path = tmp_path / "recipe.yaml"
    for change in (
        {"trust_remote_code": True},
        {"stages": [{"method": "codebook", "bits": 3, "trust_remote_code": True}]},
        {"calibration": {"dataset": "a/b", "trust_remote_code": True}},
    ):
        path.write_text(yaml.safe_dump({**sound, **change}))
        with pytest.raises(ConfigurationError, match="unknown field `trust_remote_code`"):
            load_recipe(path)
    path.write_text("calibration: !!python/object/apply:os.system [touch here]\nmethod: codebook\n")
    with pytest.raises(ConfigurationError, match="no YAML"):
        load_recipe(path)
    path.write_text(yaml.safe_dump(sound))
    assert load_recipe(path)[1].dataset == "a/b"


def test_calibration_data_of_the_hub_run_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.update(kwargs))
    open_rows(hf_compress.CalibrationConfig("somebody/something"))
    assert "split" in asked and "trust_remote_code" not in asked
    assert int(datasets.__version__.split(".")[0]) >= 4, "earlier versions run scripts of a dataset"


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _problems(source: str) -> list[str]:
    """What a source file does that could run code from a file."""
    tree, found = ast.parse(source), []
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found += [f"imports {name}" for name in names if name.split(".")[0] in forbidden]
    for name, call in _calls(tree):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("eval", "exec", "compile", "__import__", "os.system", "yaml.load", "yaml.unsafe_load"):
            found.append(f"calls {name}")
        if keywords.get("allow_pickle") == "True" or keywords.get("trust_remote_code", "False") not in ("False",):
            found.append("allow_pickle or trust_remote_code")
    return found


def test_the_source_has_no_pickle() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    problems = {file.name: _problems(file.read_text(encoding="utf-8")) for file in files}
    assert {name: found for name, found in problems.items() if found} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "yaml.load(text)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_for_pickle_finds_it(line: str) -> None:
    assert _problems(line)
