"""Learned codebooks on encoders of text and of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import ENCODERS, calibration, features, make_encoder
from transformers import AutoModel, PreTrainedModel

import hf_compress
from hf_compress import CodebookConfig
from hf_compress.methods.codebook import CodebookLinear


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_matrix_of_the_blocks_is_coded(encoder: str, tmp_path: Path) -> None:
    dense = features(make_encoder(encoder), encoder)

    def error(model: PreTrainedModel) -> float:
        return float((features(model, encoder) - dense).square().mean() / dense.square().mean())

    alone = hf_compress.compress(make_encoder(encoder), CodebookConfig(bits=3, learning="none"))
    learned = hf_compress.compress(make_encoder(encoder), CodebookConfig(bits=3, calibration=calibration(encoder)))
    layers = [module for module in learned.modules() if isinstance(module, CodebookLinear)]
    assert len(layers) == 3 * 6
    assert {row.kind for row in learned.compression_report.modules} == {"mlp", "query_key", "value_output"}
    assert error(learned) < 0.9 * error(alone) < 0.2

    learned.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(features(again, encoder), features(learned, encoder))
    assert hf_compress.plan(make_encoder(encoder), CodebookConfig(bits=3, learning="none")).bytes_on_disk == (
        learned.compression_report.bytes_after
    )
