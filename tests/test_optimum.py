"""`optimum-cli compress`, from an installed wheel and from an editable install, each in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from calibration_helpers import make_tokenizer
from transformers import AutoModelForCausalLM

from hf_compress.layout import layout_of

pytest.importorskip("optimum.commands.optimum_cli", reason="Optimum's command line is not installed")

ROOT = Path(__file__).parent.parent
REGISTERED = "optimum/commands/register/register_hf_compress.py"

# The environments of these tests search this one's packages, and Optimum refuses a command that it finds twice.
pytestmark = pytest.mark.skipif(
    (Path(sysconfig.get_paths()["purelib"]) / REGISTERED).exists(), reason="hf_compress is installed from a wheel"
)

# Runs command lines by Optimum's command and by hf-compress' own under the same name, and prints what each gave.
BOTH = """
import contextlib, io, json, sys
from optimum.commands import optimum_cli

def captured(call):
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            call()
        except SystemExit as exit:
            code = exit.code
    return [code, out.getvalue(), err.getvalue()]

def by_optimum(arguments):
    sys.argv = ["optimum-cli", "compress", *arguments]
    return captured(optimum_cli.main)

lines = json.loads(sys.argv[1])
root = captured(lambda: (sys.argv.__setitem__(slice(None), ["optimum-cli", "--help"]), optimum_cli.main()))
light = "torch" not in sys.modules and "hf_compress" not in sys.modules
found = [by_optimum(line) for line in lines]
from hf_compress.cli import app
own = [captured(lambda: app(args=line, prog_name="optimum-cli compress")) for line in lines]
print(json.dumps({"light": light, "root": root, "optimum": found, "own": own}))
"""


def build(kind: str, tree: Path, out: Path) -> Path:
    """A wheel of a copy of this repository, or what an editable install of it puts into an environment."""
    tree.mkdir()
    shutil.copytree(
        ROOT / "hf_compress", tree / "hf_compress", ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    # Without a compiler the extension is left out, which this test does not need.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=os.environ | {"CC": "no-compiler"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The built file and the Python of an environment that holds it. What it depends on comes from this one."""
    folder = tmp_path_factory.mktemp("install")
    built = build(request.param, folder / "tree", folder / "built")
    venv.create(folder / "environment", with_pip=False, symlinks=os.name != "nt")
    paths = sysconfig.get_paths(vars={"base": str(folder / "environment"), "platbase": str(folder / "environment")})
    site = Path(paths["purelib"])
    zipfile.ZipFile(built).extractall(site)
    # A path that a .pth file adds is searched, and its own .pth files are not: not for an editable install of this.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return built, Path(paths["scripts"]) / Path(sys.executable).name


def run_python(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Warnings of other packages and the width of the terminal are not what is compared.
    environment = os.environ | {"COLUMNS": "120", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_file_is_all_that_goes_into_optimums_namespace(installed: tuple[Path, Path], tmp_path: Path) -> None:
    built, python = installed
    names = zipfile.ZipFile(built).namelist()
    assert not any(name.startswith("hf_compress/cli/optimum") for name in names)
    code = f"import {REGISTERED.removesuffix('.py').replace('/', '.')} as registered; print(registered.__file__)"
    done = run_python(python, tmp_path, "-c", code)
    assert done.stdout.strip().endswith(REGISTERED), done.stderr
    if "editable" in built.name:
        assert "tree" in Path(done.stdout.strip()).parts
    else:
        assert [name for name in names if name.startswith("optimum")] == [REGISTERED]
        assert "tree" not in Path(done.stdout.strip()).parts


def test_compress_takes_what_hf_compress_takes(installed: tuple[Path, Path], dense: Path, tmp_path: Path) -> None:
    _, python = installed
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    make_tokenizer().save_pretrained(dense)
    lines = [
        [],
        ["--help"],
        ["plan", "--help"],
        ["plan", str(dense), "--reduction", "0.2"],
        ["plan", str(dense), "--reduction", "2"],
        ["plan", "--reduction"],
        ["plan", str(dense), "--no-such-option", "1"],
        ["run", str(dense), str(full), "--reduction", "0.2"],
        ["run", "--", str(dense), str(full)],
        ["eval", str(dense)],
        ["no-such-command"],
    ]
    done = run_python(python, tmp_path, "-c", BOTH, json.dumps(lines))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["light"]  # Optimum's start does not wait for torch
    assert "compress" in found["root"][1] and "hf_compress" in found["root"][1]
    assert _untimed(found["optimum"]) == _untimed(found["own"])
    codes = [code for code, _, _ in found["optimum"]]
    assert codes == [2, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2]
    texts = [out + err for _, out, err in found["optimum"]]
    assert "optimum-cli compress [OPTIONS] COMMAND" in texts[1] and "plan" in texts[1]
    assert "bytes on disk" in texts[3]
    assert "is not empty" in texts[7] and "is not empty" in texts[8]
    assert "--text" in texts[9]


def _untimed(results: list[list[Any]]) -> list[Any]:
    """Without the line of a plan that tells how long the run will take."""
    return [
        [code, *([line for line in text.splitlines() if not line.startswith("time ")] for text in (out, err))]
        for code, out, err in results
    ]


def test_a_run_writes_a_checkpoint(installed: tuple[Path, Path], dense: Path, tmp_path: Path) -> None:
    _, python = installed
    make_tokenizer().save_pretrained(dense)
    line = ["compress", "run", str(dense), "out", "--method", "codebook", "--bits", "3", "--learning", "none"]
    done = run_python(python, tmp_path, "-m", "optimum.commands.optimum_cli", *line)
    assert done.returncode == 0, done.stderr
    assert "Saved to out" in done.stderr
    assert layout_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
