"""The mathematics of learned codebooks against brute force in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import hf_compress

from hf_compress.methods.codebook import mathematics as m
from hf_compress.methods.codebook.coded import Coded, as_stored

ROWS, COLUMNS, GROUP = 12, 80, 32


@pytest.fixture
def gram() -> torch.Tensor:
    torch.manual_seed(0)
    inputs = torch.randn(300, COLUMNS, dtype=torch.float64) @ torch.randn(COLUMNS, COLUMNS, dtype=torch.float64)
    return m.damped(inputs.T @ inputs, 0.01)


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, COLUMNS, dtype=torch.float64) * torch.rand(ROWS, 1, dtype=torch.float64)


def start(weight: torch.Tensor, importance: torch.Tensor, codes: int = 8, rows_per_codebook: int = 4) -> Coded:
    return m.start(
        weight,
        importance,
        codes=codes,
        column_group=GROUP,
        rows_per_codebook=rows_per_codebook,
        generator=torch.Generator().manual_seed(0),
    )


def loss(weight: torch.Tensor, matrix: torch.Tensor, gram: torch.Tensor) -> float:
    return float((((weight - matrix) @ gram) * (weight - matrix)).sum())


def test_a_matrix_of_few_values_is_met_exactly() -> None:
    values = torch.tensor([-3.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    torch.manual_seed(0)
    weight = values[torch.randint(4, (8, 64))]
    coded = start(weight, torch.ones(64), codes=4, rows_per_codebook=8)
    assert float((coded.matrix() - weight).abs().max()) < 0.2
    for _ in range(20):
        coded = m.refit_codebooks(weight, torch.eye(64, dtype=torch.float64), coded)
        coded = m.refit_scales(weight, torch.eye(64, dtype=torch.float64), coded)
    torch.testing.assert_close(coded.matrix(), weight, rtol=1e-3, atol=1e-3)


def test_zero_rows_stay_zero_and_constant_rows_are_met(gram: torch.Tensor, weight: torch.Tensor) -> None:
    weight = weight.clone()
    weight[3], weight[5], weight[7, :GROUP] = 0, 0.625, 0
    coded = as_stored(start(weight, gram.diagonal()), integer_scales=True)
    assert float((coded.matrix()[5] / 0.625 - 1).abs().max()) < 2e-3  # a step of the scales
    coded = m.assign_with_feedback(weight, m.feedback_of(gram), coded)
    assert coded.matrix()[3].abs().max() == 0
    assert coded.matrix().isfinite().all()


@pytest.mark.parametrize("codes", [3, 4, 8, 16])
def test_nearest_codes_are_the_nearest(weight: torch.Tensor, codes: int) -> None:
    coded = m.assign_nearest(weight, start(weight, torch.ones(COLUMNS), codes))
    choices = coded.wide_scales()[..., None] * coded.tables()[:, None]
    best = (choices - weight[..., None]).abs().min(dim=-1).values
    torch.testing.assert_close((coded.matrix() - weight).abs(), best)


def test_feedback_equals_the_plain_recursion(weight: torch.Tensor, gram: torch.Tensor) -> None:
    """Optimal Brain Quantization in a fixed order, with the inverse of the remaining Gram computed anew each time."""
    coded = start(weight, gram.diagonal())
    found = m.assign_with_feedback(weight, m.feedback_of(gram), coded)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    rest, expected = weight.clone(), torch.zeros_like(coded.codes)
    scales, tables = coded.wide_scales(), coded.tables()
    for place, column in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(gram[left][:, left])
        values = scales[:, column, None] * tables
        expected[:, column] = (values - rest[:, column, None]).abs().argmin(dim=1)
        value = values.gather(1, expected[:, column, None])[:, 0]
        step = (rest[:, column] - value) / inverse[0, 0]
        rest[:, left] -= step[:, None] * inverse[0]
    assert (found.codes == expected).float().mean() > 0.99
    assert loss(weight, found.matrix(), gram) < 0.8 * loss(weight, coded.matrix(), gram)


def test_without_correlation_feedback_is_nearest(weight: torch.Tensor) -> None:
    coded = start(weight, torch.ones(COLUMNS))
    flat = torch.eye(COLUMNS, dtype=torch.float64)
    assert torch.equal(
        m.assign_with_feedback(weight, m.feedback_of(flat), coded).codes, m.assign_nearest(weight, coded).codes
    )


def test_sweeps_end_where_no_single_code_helps(weight: torch.Tensor, gram: torch.Tensor) -> None:
    coded = m.assign_with_feedback(weight, m.feedback_of(gram), start(weight, gram.diagonal(), codes=4))
    before = loss(weight, coded.matrix(), gram)
    once = m.sweep_codes(weight, gram, coded)
    assert loss(weight, once.matrix(), gram) < before
    settled = m.sweep_codes(weight, gram, once, sweeps=30)
    least = loss(weight, settled.matrix(), gram)
    for row in range(0, ROWS, 5):
        for column in range(COLUMNS):
            for code in range(4):
                codes = settled.codes.clone()
                codes[row, column] = code
                assert loss(weight, replace(settled, codes=codes).matrix(), gram) >= least * (1 - 1e-9)


def test_codebooks_are_the_least_squares_ones(weight: torch.Tensor, gram: torch.Tensor) -> None:
    coded = start(weight, gram.diagonal(), codes=4)
    fitted = m.refit_codebooks(weight, gram, coded)
    root = torch.linalg.cholesky(gram)
    for book in range(len(coded.codebooks)):
        rows = (coded.row_codebook == book).nonzero()[:, 0]
        spread = torch.nn.functional.one_hot(coded.codes[rows], 4).double() * coded.wide_scales()[rows][..., None]
        design = torch.einsum("rnk,nm->rmk", spread, root).reshape(-1, 4)
        expected = torch.linalg.lstsq(design, (weight[rows] @ root).reshape(-1, 1)).solution[:, 0]
        torch.testing.assert_close(fitted.codebooks[book], expected.sort().values, rtol=1e-4, atol=1e-4)


def test_scales_are_the_least_squares_ones(weight: torch.Tensor, gram: torch.Tensor) -> None:
    coded = start(weight, gram.diagonal(), codes=8)
    fitted = m.refit_scales(weight, gram, coded)
    root = torch.linalg.cholesky(gram)
    table = coded.tables().gather(1, coded.codes)
    member = torch.nn.functional.one_hot(torch.arange(COLUMNS) // GROUP).double()
    for row in range(ROWS):
        design = root.T @ (table[row][:, None] * member)
        expected = torch.linalg.lstsq(design, (root.T @ weight[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.scales[row], expected, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("integer", [True, False])
def test_stored_scales_are_near_and_the_largest_fits(weight: torch.Tensor, integer: bool) -> None:
    coded = start(weight.float(), torch.ones(COLUMNS))
    stored = as_stored(coded, integer)
    limit = coded.scales.amax(dim=1, keepdim=True) * (0.5 / 255 if integer else 2**-11)
    assert bool(((stored.scales - coded.scales).abs() <= 1.01 * limit).all())
    again = as_stored(stored, integer)
    torch.testing.assert_close(again.scales, stored.scales, rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 3e2])
def test_small_and_large_weights_are_stored_as_well(weight: torch.Tensor, size: float) -> None:
    """Units of scales in fp16 become denormal below weights of about 0.02, which many models have."""
    small = weight.float() * size
    coded = start(small, torch.ones(COLUMNS))
    before, after = (m.relative_error(small, one.matrix(), None) for one in (coded, as_stored(coded, True)))
    assert after < 1.1 * before + 1e-4


def test_row_groups_tell_distributions_apart() -> None:
    torch.manual_seed(0)
    normal, spiky = torch.randn(20, 256), torch.randn(20, 256) ** 3
    rows = torch.cat((normal, spiky / spiky.std(dim=1, keepdim=True)))
    member = m.group_rows(rows, 2, torch.Generator().manual_seed(0))
    assert len(set(member[:20].tolist())) == 1
    assert set(member[:20].tolist()) != set(member[20:].tolist())


def test_a_broken_gram_is_named() -> None:
    with pytest.raises(hf_compress.NumericalError, match="zero"):
        m.damped(torch.zeros(4, 4), 0.01)
    with pytest.raises(hf_compress.NumericalError, match="non-finite"):
        m.damped(torch.full((4, 4), torch.nan), 0.01)
