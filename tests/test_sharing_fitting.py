"""Matrices and corrections fitted to what layers see: against brute force, and on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import calibration, logits, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_compress
from hf_compress import CalibrationConfig, LayerSharingConfig
from hf_compress.calibration.statistics import gram
from hf_compress.errors import CalibrationError, NumericalError
from hf_compress.methods.sharing.fitting import RIDGE, correction, fit

STORIES = Path(__file__).parent / "data" / "stories260k"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(count: int = 3, rows: int = 7, columns: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices, and inputs of unlike directions and lengths, with the rows that stand for a Gram's ridge."""
    weights = [drawn(rows, columns, seed=layer) for layer in range(count)]
    inputs = []
    for layer in range(count):
        seen = drawn(40, columns, seed=10 + layer) * torch.logspace(0, -2, columns) * 3**layer
        inputs.append(seen[:, torch.randperm(columns, generator=torch.Generator().manual_seed(layer))])
    return weights, inputs


def with_ridge(inputs: Tensor) -> Tensor:
    product = gram(inputs)
    return torch.cat((inputs, (RIDGE * product.diagonal().mean()).sqrt() * torch.eye(len(product)).double()))


def test_the_shared_matrix_is_the_least_squares_solution() -> None:
    weights, inputs = layers()
    found = fit(weights, [gram(rows) for rows in inputs], rank=0)
    stacked = [with_ridge(rows) for rows in inputs]
    scales = [1 / (rows @ weight.T).norm() for rows, weight in zip(stacked, weights, strict=True)]
    left = torch.cat([scale * rows for rows, scale in zip(stacked, scales, strict=True)])
    right = torch.cat([scale * rows @ weight.T for rows, weight, scale in zip(stacked, weights, scales, strict=True)])
    torch.testing.assert_close(found.matrix, torch.linalg.lstsq(left, right).solution.T)
    assert found.corrections == [None] * 3
    for rows, weight, error in zip(stacked, weights, found.errors, strict=True):
        lost = (rows @ (weight - found.matrix).T).square().sum() / (rows @ weight.T).square().sum()
        assert error == pytest.approx(float(lost))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (90, 96)])
def test_a_correction_loses_the_smallest_singular_values(rank: int, shape: tuple[int, int]) -> None:
    """Of the outputs: Eckart and Young. The largest shape is searched, not decomposed."""
    difference, rows = drawn(*shape), drawn(200, shape[1], seed=1) * torch.logspace(0, -2, shape[1])
    root = torch.linalg.cholesky(gram(rows))
    torch.manual_seed(0)
    first, second = correction(difference, root, rank)
    lost = (rows @ (difference - second @ first).T).square().sum()
    assert float(lost) == pytest.approx(
        float(torch.linalg.svdvals(rows @ difference.T)[rank:].square().sum()), rel=1e-3
    )
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))


def test_turns_lower_the_loss() -> None:
    """Below a first turn with the best shared matrix, which is below mean and plain truncated SVD."""
    weights, inputs = layers()
    grams = [gram(rows) for rows in inputs]
    found = fit(weights, grams, rank=2)

    def losses(shared: Tensor, plain: bool) -> float:
        total = 0.0
        for weight, rows in zip(weights, map(with_ridge, inputs), strict=True):
            root = torch.eye(5).double() if plain else torch.linalg.cholesky(rows.T @ rows)
            first, second = correction(weight - shared, root, 2)
            rest = weight - shared - second @ first
            total += float((rows @ rest.T).square().sum() / (rows @ weight.T).square().sum())
        return total

    mean = torch.stack(weights).mean(dim=0)
    first_turn = losses(fit(weights, grams, rank=0).matrix, plain=False)
    assert sum(found.errors) < first_turn < losses(mean, plain=True)


def test_full_rank_and_single_layers_lose_nothing() -> None:
    weights, inputs = layers()
    grams = [gram(rows) for rows in inputs]
    assert max(fit(weights, grams, rank=5).errors) < 1e-20
    alone = fit(weights[:1], grams[:1], rank=0)
    assert torch.equal(alone.matrix, weights[0]) and alone.errors == [0.0]


def test_what_the_dtype_loses_is_corrected() -> None:
    """Corrections are for the matrix as it is stored."""
    weights, inputs = layers()
    grams = [gram(rows) for rows in inputs]
    found = fit([weight.bfloat16() for weight in weights], grams, rank=5)
    assert found.matrix.dtype == torch.bfloat16
    assert max(found.errors) < 1e-20


def test_layers_without_data_count_in_every_direction() -> None:
    weights, _ = layers(2)
    found = fit(weights, [None, None], rank=0)
    scales = [1 / weight.square().sum() for weight in weights]
    torch.testing.assert_close(found.matrix, sum(s * w for s, w in zip(scales, weights, strict=True)) / sum(scales))


def test_weights_that_are_not_finite_are_named() -> None:
    weights, inputs = layers(2)
    weights[1][0, 0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        fit(weights, [gram(rows) for rows in inputs], rank=1)


def test_it_needs_data() -> None:
    config = LayerSharingConfig(unique_layers=2, initialization="activation_aware")
    with pytest.raises(CalibrationError, match="needs calibration data"):
        hf_compress.compress(make_model("llama"), config)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("order", ["cycle", "sequence"])
def test_grams_may_lie_in_files(order: Any, on_disk: bool) -> None:
    config = LayerSharingConfig(
        unique_layers=2, order=order, lora_rank=3, initialization="activation_aware", calibration=calibration()
    )
    found = hf_compress.compress(make_model("llama"), config, activations_on_disk=on_disk)
    again = hf_compress.compress(make_model("llama"), config)
    assert torch.equal(logits(found), logits(again))
    rows = [row for row in found.compression_report.modules if row.path.endswith("down_proj")]
    assert all(0 < row.error < 1 for row in rows)


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_compress.methods.sharing.method import LayerSharing

    config = LayerSharingConfig(
        unique_layers=2, lora_rank=3, initialization="activation_aware", calibration=calibration()
    )
    expected = logits(hf_compress.compress(make_model("llama"), config))
    compress_block = LayerSharing.compress_block

    def interrupted(self: Any, block: int, statistics: None) -> Any:
        if block == 2:
            raise KeyboardInterrupt
        return compress_block(self, block, statistics)

    monkeypatch.setattr(LayerSharing, "compress_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    monkeypatch.undo()
    model = hf_compress.compress(make_model("llama"), config, working_directory=tmp_path)
    assert torch.equal(logits(model), expected)


def test_a_real_model_loses_less() -> None:
    """Stories that the model tells itself: those it is not fitted to are likelier than with plain means."""
    dense = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    torch.manual_seed(0)
    begin = torch.full((40, 1), dense.config.bos_token_id)
    told = dense.generate(begin, max_new_tokens=127, min_new_tokens=127, do_sample=True)
    source = CalibrationConfig(told[:32], num_samples=32, num_held_out=0)

    def loss(start: Any) -> float:
        config = LayerSharingConfig(
            unique_layers=3,
            uneven_groups=True,
            order="sequence",
            initialization=start,
            lora_rank=16,
            calibration=source,
        )
        model = hf_compress.compress(AutoModelForCausalLM.from_pretrained(STORIES), config)
        with torch.no_grad():
            return float(model(told[32:], labels=told[32:]).loss)

    losses = {start: loss(start) for start in ("stepwise", "average", "activation_aware")}
    assert losses["activation_aware"] < min(losses["stepwise"], losses["average"]) - 2
