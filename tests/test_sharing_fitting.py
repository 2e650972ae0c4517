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
from hf_compress.methods.sharing.fitting import RIDGE, Fit, leading_left
from hf_compress.methods.sharing.fitting import fit as fit_layers

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


def fit(weights: list[Tensor], grams: Any, rank: int) -> Fit:
    return fit_layers(weights, grams, rank, [f"layer.{index}" for index in range(len(weights))])


def corrected(difference: Tensor, root: Tensor, rank: int) -> Tensor:
    """What is left of a difference after its best correction."""
    left = leading_left(difference @ root, rank)[:, :rank]
    return difference - left @ left.T @ difference


def with_ridge(inputs: Tensor) -> Tensor:
    product = gram(inputs)
    return torch.cat((inputs, (RIDGE * product.diagonal().mean()).sqrt() * torch.eye(len(product)).double()))


def test_the_shared_matrix_is_the_least_squares_solution() -> None:
    weights, inputs = layers()
    found = fit(weights, [gram(rows) for rows in inputs], rank=0)
    stacked = [with_ridge(rows) for rows in inputs]
    energies = torch.stack([(rows @ weight.T).square().sum() for rows, weight in zip(stacked, weights, strict=True)])
    scales = energies.clamp_min(energies.mean()).rsqrt()
    left = torch.cat([scale * rows for rows, scale in zip(stacked, scales, strict=True)])
    right = torch.cat([scale * rows @ weight.T for rows, weight, scale in zip(stacked, weights, scales, strict=True)])
    torch.testing.assert_close(found.matrix, torch.linalg.lstsq(left, right).solution.T)
    assert found.corrections == [None] * 3
    for rows, weight, error in zip(stacked, weights, found.errors, strict=True):
        lost = (rows @ (weight - found.matrix).T).square().sum() / energies.mean().clamp_min(
            (rows @ weight.T).square().sum()
        )
        assert error == pytest.approx(float(lost))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (90, 96)])
def test_a_correction_loses_the_smallest_singular_values(rank: int, shape: tuple[int, int]) -> None:
    """Of the outputs: Eckart and Young. The largest shape is searched, not decomposed."""
    difference, rows = drawn(*shape), drawn(200, shape[1], seed=1) * torch.logspace(0, -2, shape[1])
    lost = (rows @ corrected(difference, torch.linalg.cholesky(gram(rows)), rank).T).square().sum()
    least = torch.linalg.svdvals(rows @ difference.T)[rank:].square().sum()
    assert float(lost) == pytest.approx(float(least), rel=1e-3)


def test_a_search_needs_no_random_numbers_of_the_user() -> None:
    matrix = drawn(90, 96)
    before = torch.get_rng_state()
    found = leading_left(matrix, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(leading_left(matrix, 4), found)
    again = leading_left(matrix + 1e-3 * drawn(90, 96, seed=1), 4, found)
    assert torch.linalg.matrix_norm(again[:, :4].T @ found[:, :4], 2) == pytest.approx(1, abs=1e-2)


def test_turns_lower_the_loss() -> None:
    """Below a first turn with the best shared matrix, which is below mean and plain truncated SVD."""
    weights, inputs = layers()
    grams = [gram(rows) for rows in inputs]
    found = fit(weights, grams, rank=2)

    def losses(shared: Tensor, plain: bool) -> float:
        total = 0.0
        for weight, rows in zip(weights, map(with_ridge, inputs), strict=True):
            root = torch.eye(5).double() if plain else torch.linalg.cholesky(rows.T @ rows)
            rest = corrected(weight - shared, root, 2)
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
    # What is left is the rounding of the corrections.
    assert 1e-8 < max(found.errors) < 1e-4
    pair, rows = found.corrections[2], with_ridge(inputs[2])
    assert pair is not None and {tensor.dtype for tensor in pair} == {torch.bfloat16}
    lost = weights[2].bfloat16().double() - found.matrix.double() - pair[1].double() @ pair[0].double()
    # The last layer puts out most.
    relative = (rows @ lost.T).square().sum() / (rows @ weights[2].T).square().sum()
    assert found.errors[2] == pytest.approx(float(relative), rel=0.1)


def test_layers_without_data_count_in_every_direction() -> None:
    weights, _ = layers(2)
    found = fit(weights, [None, None], rank=0)
    energies = torch.stack([weight.square().sum() for weight in weights])
    scales = 1 / energies.clamp_min(energies.mean())
    torch.testing.assert_close(found.matrix, sum(s * w for s, w in zip(scales, weights, strict=True)) / sum(scales))


def test_what_is_not_finite_is_named() -> None:
    weights, inputs = layers(2)
    grams = [gram(rows) for rows in inputs]
    grams[1][0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"layer\.1: the Gram matrix holds non-finite"):
        fit(weights, grams, rank=1)
    weights[1][0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"layer\.1: weights that are not finite"):
        fit(weights, grams, rank=1)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_faint_layers_leave_something_to_the_others(size: float, rank: int) -> None:
    """Such as the zeros that a block is made with that is to change nothing at first."""
    weights, inputs = layers(2)
    grams = [gram(inputs[0]), gram(inputs[0])]
    found = fit([weights[0], size * weights[1]], grams, rank)
    # Both count alike: half of the first stays, and a quarter of its energy is lost.
    assert found.errors[0] < (0.45 if rank == 0 else 0.05)
    assert fit([0 * weight for weight in weights], grams, rank).errors == [0.0, 0.0]


def test_a_layer_that_sees_zeros_is_named_and_counts_like_others() -> None:
    model = make_model("opt")
    model.model.decoder.layers[3].fc1.bias.data.fill_(-1e4)
    config = LayerSharingConfig(
        unique_layers=2, lora_rank=2, initialization="activation_aware", calibration=calibration()
    )
    with pytest.warns(UserWarning, match=r"never run through model\.decoder\.layers\.3\.fc2:"):
        hf_compress.compress(model, config)


def test_a_layer_that_keeps_its_own_matrix_has_no_say() -> None:
    def errors(**fields: Any) -> dict[str, float]:
        config = LayerSharingConfig(
            unique_layers=2, initialization="activation_aware", calibration=calibration(), **fields
        )
        rows = hf_compress.compress(make_model("llama"), config).compression_report.modules
        return {row.path: row.error for row in rows if "up_proj" in row.path}

    assert errors()["model.layers.0.mlp.up_proj"] > 0.05
    found = errors(modules_to_not_convert=("layers.2.mlp.up_proj",))
    assert found["model.layers.0.mlp.up_proj"] == 0 and "model.layers.2.mlp.up_proj" not in found


def test_the_blocks_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make_model("llama"), []
    model.model.layers[1].register_forward_pre_hook(lambda module, inputs: calls.append(1))
    config = LayerSharingConfig(unique_layers=2, initialization="activation_aware", calibration=calibration())
    hf_compress.compress(model, config)
    # What they are called with is recorded, then they run.
    assert len(calls) == 2 * 3


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
