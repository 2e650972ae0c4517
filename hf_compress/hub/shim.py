"""The file in a repository that lets `trust_remote_code=True` stand for `import hf_compress`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..output import write_text

MODULE = "hf_compress_shim"
SHIM_FILE = f"{MODULE}.py"

# It holds no model: the stock class loads the checkpoint once the package has told Transformers how.
_SOURCE = '''"""Loads this compressed model with hf_compress; no model code is here, the class is Transformers'."""

import transformers

try:
    import hf_compress
except ImportError as error:
    raise ImportError(
        "this model is compressed with hf_compress, which cannot be imported here "
        f"({error}). Install it: pip install hf_compress"
    ) from error


def __getattr__(name):
    """An auto class, such as AutoModelForCausalLM, that leaves the loading to Transformers' class of the same name."""
    if not name.startswith("Auto"):
        raise AttributeError(name)

    class Loader:
        @classmethod
        def register_for_auto_class(cls, auto_class=None):
            return None

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            kwargs["trust_remote_code"] = False
            return getattr(transformers, name).from_pretrained(*args, **kwargs)

        @classmethod
        def _from_config(cls, config, **kwargs):
            kwargs["trust_remote_code"] = False
            return getattr(transformers, name).from_config(config, **kwargs)

    return Loader
'''


def write_shim(folder: Path) -> None:
    """Put the shim into a saved model's folder, and name it in the config for every auto class that fits."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    kind = type(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    names = [name for name in modeling_auto.__all__ if name.startswith("AutoModel")]
    auto = [name for name in names if kind in (getattr(getattr(modeling_auto, name), "_model_mapping", None) or ())]
    # What a model brings along of its own stays: another repository's code would not find its modules here.
    known = content.get("auto_map")
    others = {name: value for name, value in known.items() if not is_ours(value)} if isinstance(known, dict) else {}
    content["auto_map"] = {**{name: f"{MODULE}.{name}" for name in auto}, **others}
    write_text(folder / SHIM_FILE, _SOURCE)
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def is_ours(reference: Any) -> bool:
    """Whether an entry of `auto_map` points at the shim, of this repository or of another."""
    return isinstance(reference, str) and reference.split("--")[-1].startswith(f"{MODULE}.")


def forget_shim(config: Any) -> None:
    """Take the shim out of a config that is about to be written where no shim is."""
    auto_map = getattr(config, "auto_map", None)
    if isinstance(auto_map, dict) and any(is_ours(value) for value in auto_map.values()):
        others = {name: value for name, value in auto_map.items() if not is_ours(value)}
        if others:
            config.auto_map = others
        else:
            del config.auto_map
