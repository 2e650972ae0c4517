"""The guide on adding a family, followed to the letter for one that nobody has heard of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import token_ids
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import hf_compress
from hf_compress import Anatomy, CalibrationConfig, MlpAnatomy
from hf_compress.anatomy import records

GUIDE = Path(hf_compress.__file__).parent / "anatomy" / "README.md"


class InventedConfig(PreTrainedConfig):  # type: ignore[misc]
    model_type = "invented"
    hidden_size: int = 32
    width: int = 64
    num_hidden_layers: int = 3
    vocab_size: int = 96


class Mixing(nn.Module):
    """One head that sees everything."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.ask, self.find, self.take, self.give = (nn.Linear(size, size) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        found = nn.functional.scaled_dot_product_attention(self.ask(states), self.find(states), self.take(states))
        given: Tensor = self.give(found)
        return given


class InventedBlock(nn.Module):
    def __init__(self, config: InventedConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mixing = Mixing(config.hidden_size)
        self.grow = nn.Linear(config.hidden_size, config.width)
        # How a record's MLP finds its activation.
        self.act = nn.GELU()
        self.shrink = nn.Linear(config.width, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.mixing(self.norm(states))
        after: Tensor = states + self.shrink(self.act(self.grow(states)))
        return after


class InventedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = InventedConfig
    base_model_prefix = "invented"

    def __init__(self, config: InventedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(InventedBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        states = self.embed_tokens(input_ids)
        for block in self.stack:
            states = block(states)
        return BaseModelOutput(last_hidden_state=states)


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return InventedModel(InventedConfig()).eval()


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is known to Transformers for the time of a test, and its record forgotten after it."""
    monkeypatch.setattr(records, "_RECORDS", dict(records._RECORDS))
    AutoConfig.register("invented", InventedConfig, exist_ok=True)
    AutoModel.register(InventedConfig, InventedModel, exist_ok=True)


def states(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids(3, 10, seed=4)).last_hidden_state
    return found


def test_the_guide_can_be_followed(invented: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    scope: dict[str, Any] = {
        "make_model": make_model,
        "calibration": CalibrationConfig(token_ids(), num_samples=20, num_held_out=4, batch_size=8),
        "folder": tmp_path,
    }
    for block in blocks:
        exec(block, scope)
    assert "stack.0.mixing.ask Linear" in capsys.readouterr().out
    for name, key in (("coded", "model"), ("pruned", "pruned"), ("smaller", "smaller")):
        again = AutoModel.from_pretrained(tmp_path / name)
        assert torch.equal(states(again), states(scope[key]))
        assert len(again.compression_report.modules) >= 1
    assert {row.kind for row in scope["model"].compression_report.modules} == {"mlp", "query_key", "value_output"}
    assert scope["smaller"].compression_report.block_linear_reduction == pytest.approx(0.1, abs=0.02)


def test_the_record_shows_among_the_families(invented: None) -> None:
    hf_compress.register_anatomy(
        Anatomy(model_types=("invented",), blocks="stack", attention=None, mlp=None, decoder=False)
    )
    (found,) = hf_compress.families(["invented"])
    assert found.architecture == "InventedModel"
    assert {name: support.works for name, support in found.methods.items()} == {
        "MLPs": "no",
        "attention": "no",
        "codebooks": "yes",
        "pruning": "yes",
        "heads, columns": "no",
        "sharing": "yes",
    }


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"model_types": "invented"}, "tuple of names"),
        ({"model_types": ()}, "tuple of names"),
        ({"blocks": ""}, "path of the list of blocks"),
        ({"kinds": (("grow", "feed_forward"),)}, "kind 'feed_forward', expected one of 'mlp'"),
    ],
)
def test_a_record_that_says_too_little_is_refused(fields: dict[str, Any], found: str, unchecked_types: None) -> None:
    with pytest.raises(hf_compress.ConfigurationError, match=found):
        hf_compress.register_anatomy(Anatomy(**{"model_types": ("invented",), **fields}))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"blocks": "tower"}, "expects a list of blocks at 'tower'.*3 blocks at 'stack'"),
        ({"attention": None}, "'stack.0.mlp.up_proj', 'stack.0.mlp.gate_proj', 'stack.0.mlp.down_proj'"),
        ({"mlp": MlpAnatomy(path="", up="grow", gate=None, down="shrink")}, "'stack.0.self_attn.q_proj', .*o_proj'"),
        ({"attention": None, "mlp": None, "kinds": (("mixing.ask", "query_key"), ("mixin.find", "query_key"))},
         "at 'stack.0.mixin.find', which InventedModel does not have"),
    ],
)  # fmt: skip
def test_a_record_half_filled_is_told_what_is_missing(invented: None, fields: dict[str, Any], found: str) -> None:
    hf_compress.register_anatomy(
        Anatomy(**{"model_types": ("invented",), "blocks": "stack", "decoder": False, **fields})
    )
    with pytest.raises(hf_compress.UnsupportedModelError, match=found):
        hf_compress.compress(make_model(), hf_compress.CodebookConfig(bits=3, learning="none"))
