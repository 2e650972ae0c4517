"""The closed forms against brute force in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from hf_compress.calibration.ridge import ridge_cholesky
from hf_compress.calibration.statistics import gram, head_grams
from hf_compress.errors import ConfigurationError, NumericalError
from hf_compress.methods.modular import mathematics
from hf_compress.methods.modular.allocation import fill_to_cap, influence_reductions, realise

torch.set_default_dtype(torch.float32)


def data(*shape: int, seed: int = 0) -> Float[Tensor, "..."]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def correlated(rows: int, columns: int, seed: int = 0) -> Float[Tensor, "rows columns"]:
    scale = torch.logspace(0, -1.5, columns, dtype=torch.float64)
    return (
        data(rows, columns, seed=seed) @ (torch.eye(columns).double() + 0.4 * data(columns, columns, seed=9)) * scale
    )


def refit(
    gram_: Tensor, kept: Tensor, down: Tensor, ridge: float, drift: Tensor | None = None
) -> tuple[Tensor, float]:
    """The down projection for exactly these channels, and the error that is reported."""
    scores = torch.zeros(len(gram_)).double()
    scores[kept] = 1
    solutions = mathematics.NystromSolutions.of(gram_, down, scores, ridge, drift)
    found, rows = solutions.keep(len(kept))
    assert found.tolist() == sorted(kept.tolist())
    return rows, float(solutions.errors[len(kept)])


def test_refit_is_the_least_squares_optimum() -> None:
    inner, down = correlated(400, 8), data(8, 5, seed=1)
    kept = torch.tensor([0, 2, 3, 6])
    best = torch.linalg.lstsq(inner[:, kept], inner @ down).solution
    found = refit(inner.T @ inner, kept, down, 1e-12)[0]
    torch.testing.assert_close(found, best, rtol=1e-7, atol=1e-9)


def test_refit_that_keeps_all_is_the_dense_matrix_whatever_the_ridge() -> None:
    inner, down = correlated(400, 8), data(8, 5, seed=1)
    found = refit(inner.T @ inner, torch.arange(8), down, 0.1)[0]
    torch.testing.assert_close(found, down, rtol=1e-9, atol=1e-9)


def test_refit_makes_up_for_drift() -> None:
    inner, down, drift = correlated(400, 8), data(8, 5, seed=1), 0.3 * data(400, 5, seed=2)
    kept = torch.tensor([0, 2, 3, 6])
    best = torch.linalg.lstsq(inner[:, kept], inner @ down + drift).solution
    found = refit(inner.T @ inner, kept, down, 1e-12, inner.T @ drift)[0]
    torch.testing.assert_close(found, best, rtol=1e-7, atol=1e-9)


def test_relative_error_is_the_measured_one() -> None:
    inner, down = correlated(400, 8), data(8, 5, seed=1)
    kept = torch.tensor([0, 2, 3, 6])
    gram_ = inner.T @ inner
    small, error = refit(gram_, kept, down, 1e-12)
    measured = (inner @ down - inner[:, kept] @ small).square().sum() / (inner @ down).square().sum()
    assert error == pytest.approx(float(measured), rel=1e-9)


def test_output_error_score_is_the_error_of_removing_one_channel() -> None:
    inner, down = correlated(400, 8), data(8, 5, seed=1)
    scores = mathematics.output_error_scores(inner.T @ inner, down, ridge=1e-13)
    for channel in range(8):
        rest = [c for c in range(8) if c != channel]
        fit = inner[:, rest] @ torch.linalg.lstsq(inner[:, rest], inner @ down).solution
        assert float(scores[channel]) == pytest.approx(float((inner @ down - fit).square().sum()), rel=1e-6)


def test_output_error_keeps_a_better_set_than_leverage_on_average() -> None:
    """Against all subsets of an eight-channel layer: near the optimum, and nearer than the paper's score."""
    excess = {"output_error": 0.0, "leverage": 0.0}
    for seed in range(12):
        inner = data(400, 8, seed=seed) @ data(8, 8, seed=50 + seed)
        down = data(8, 5, seed=100 + seed) * data(8, 1, seed=200 + seed).exp()
        gram_ = inner.T @ inner

        def error(kept: Tensor, gram_: Tensor = gram_, down: Tensor = down) -> float:
            return refit(gram_, kept, down, 1e-12)[1]

        best = min(error(torch.tensor(subset)) for subset in itertools.combinations(range(8), 4))
        scores = {
            "output_error": mathematics.output_error_scores(gram_, down, 1e-12),
            "leverage": mathematics.ridge_leverage_scores(gram_, 1e-4),
        }
        for name, score in scores.items():
            found = error(mathematics.top_indices(score, 4))
            assert found >= best * (1 - 1e-9)
            excess[name] += found - best
    assert excess["output_error"] < excess["leverage"]


def test_leverage_score_against_its_definition() -> None:
    inner = correlated(400, 6)
    gram_ = inner.T @ inner
    shift = 1e-2 * gram_.diagonal().mean() * torch.eye(6)
    expected = (gram_ @ torch.linalg.inv(gram_ + shift)).diagonal()
    torch.testing.assert_close(mathematics.ridge_leverage_scores(gram_, 1e-2), expected, rtol=1e-9, atol=1e-12)


def test_roots_multiply_to_the_gram_and_its_inverse() -> None:
    rows = correlated(100, 6)
    gram_ = rows.T @ rows
    root, inverse = mathematics.symmetric_roots(gram_)
    torch.testing.assert_close(root @ root, gram_, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse @ root, torch.eye(6).double(), rtol=1e-6, atol=1e-6)


def test_singular_gram_is_handled_by_the_floor() -> None:
    rows = correlated(100, 3) @ data(3, 6, seed=4)
    root, inverse = mathematics.symmetric_roots(rows.T @ rows)
    assert torch.isfinite(inverse).all()
    projector = inverse @ root
    torch.testing.assert_close(rows @ projector, rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_value_output_is_the_best_low_rank_map(rank: int) -> None:
    """The summed error of a group equals the Eckart–Young bound on the stacked, weighted map."""
    inputs, value, outputs = correlated(300, 10), data(10, 6, seed=2), data(6, 2 * 10, seed=3)
    values = inputs @ value
    encode, decode = mathematics.value_output_joint((values.T @ values)[None], outputs[None], rank)
    error = (values @ outputs - values @ encode[0] @ decode[0] @ outputs).square().sum()
    singular = torch.linalg.svdvals(values @ outputs)
    bound = singular[rank:].square().sum()
    torch.testing.assert_close(error, bound, rtol=1e-6, atol=1e-8 * float(singular[0] ** 2))


def test_joint_is_no_worse_than_per_head() -> None:
    values, outputs = correlated(300, 6), data(6, 20, seed=3)
    gram_ = (values.T @ values)[None]
    errors = []
    for encode, decode in (
        mathematics.value_output_joint(gram_, outputs[None], 3),
        mathematics.value_output_per_head(gram_, 3),
    ):
        errors.append(float((values @ outputs - values @ encode[0] @ decode[0] @ outputs).square().sum()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_query_key_svd_is_optimal_for_independent_tokens(rank: int) -> None:
    queries, keys = correlated(40, 6, seed=1), correlated(50, 6, seed=2)
    first, second = mathematics.query_key_svd((queries.T @ queries)[None], (keys.T @ keys)[None], rank)
    logits = queries @ keys.T
    error = (logits - (queries @ first[0]) @ (keys @ second[0]).T).square().sum()
    bound = torch.linalg.svdvals(logits)[rank:].square().sum()
    torch.testing.assert_close(error, bound, rtol=1e-6, atol=1e-8 * float(logits.square().sum()))


def test_query_key_svd_balances_the_energies() -> None:
    queries, keys = 1e4 * correlated(40, 6, seed=1), 1e-4 * correlated(50, 6, seed=2)
    first, second = mathematics.query_key_svd((queries.T @ queries)[None], (keys.T @ keys)[None], 3)
    torch.testing.assert_close(
        (queries @ first[0]).square().sum(0), (keys @ second[0]).square().sum(0), rtol=1e-6, atol=0
    )


def test_rotary_pair_scores_do_not_change_under_rotation() -> None:
    queries, keys = correlated(40, 8, seed=1), correlated(40, 8, seed=2)
    angle = data(4, seed=3)

    def rotate(rows: Tensor) -> Tensor:
        first, second = rows.chunk(2, dim=-1)
        return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)

    def score(q: Tensor, k: Tensor) -> Tensor:
        return mathematics.rotary_pair_scores(q.square().sum(0)[None], k.square().sum(0)[None])

    torch.testing.assert_close(score(rotate(queries), rotate(keys)), score(queries, keys))
    dims = mathematics.rotary_pairs_to_dims(torch.tensor([[1, 3]]), 8)
    assert dims.tolist() == [[1, 3, 5, 7]]


def test_equal_scores_keep_the_lower_indices() -> None:
    assert mathematics.top_indices(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("gram_", "message"),
    [
        (torch.full((3, 3), float("nan"), dtype=torch.float64), "non-finite"),
        (torch.zeros(3, 3, dtype=torch.float64), "never reaches"),
        (torch.tensor([[1.0, 9.0], [9.0, 1.0]], dtype=torch.float64), "not positive definite"),
    ],
)
def test_bad_grams_are_named(gram_: Tensor, message: str) -> None:
    with pytest.raises(NumericalError, match=message):
        ridge_cholesky(gram_, 1e-6)


def test_ill_conditioned_gram_gets_a_larger_ridge() -> None:
    """As on very wide MLPs with fewer tokens than channels."""
    rows = data(20, 200) * torch.logspace(0, -6, 200, dtype=torch.float64)
    gram_ = rows.T @ rows
    gram_[0, 0] -= 1e-9 * gram_[0, 0]
    factor = ridge_cholesky(gram_, 1e-12)
    assert torch.isfinite(factor).all()


def test_gram_of_bf16_rows_is_as_exact_as_float32() -> None:
    rows = data(5000, 24).bfloat16()
    exact = rows.double().T @ rows.double()
    torch.testing.assert_close(gram(rows), exact, rtol=0, atol=2e-6 * float(exact.abs().max()))
    heads = rows.reshape(5000, 3, 8)
    expected = torch.einsum("thi,thj->hij", heads.double(), heads.double())
    torch.testing.assert_close(head_grams(heads), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_influence_spares_what_matters_and_meets_the_mean() -> None:
    influence = torch.tensor([0.9, 0.02, 0.05, 0.3], dtype=torch.float64)
    reductions = influence_reductions(influence, 0.3, temperature=0.05, cap=0.8)
    assert float(reductions.mean()) == pytest.approx(0.3, abs=1e-12)
    assert reductions.argsort(descending=True).tolist() == [1, 2, 3, 0]


def test_a_cap_gives_the_excess_back() -> None:
    influence = torch.tensor([0.9, 0.0, 0.05, 0.3], dtype=torch.float64)
    reductions = influence_reductions(influence, 0.4, temperature=0.02, cap=0.6)
    assert float(reductions.max()) == pytest.approx(0.6)
    assert float(reductions.mean()) == pytest.approx(0.4, abs=1e-12)
    with pytest.raises(ConfigurationError, match="max_module_reduction"):
        influence_reductions(influence, 0.7, temperature=0.02, cap=0.6)


def test_fill_to_cap_with_unequal_caps() -> None:
    filled = fill_to_cap(torch.tensor([1.0, 1.0, 2.0]), 5.0, torch.tensor([0.5, 3.0, 3.0]))
    assert float(filled.sum()) == pytest.approx(5.0)
    assert (filled <= torch.tensor([0.5, 3.0, 3.0]) + 1e-12).all()


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_sizes_meet_the_budget_within_half_a_step(multiple: int) -> None:
    wanted = [700.3, 333.9, 1024.0, 512.2, 90.7]
    sizes = realise(wanted, [1024] * 5, [multiple] * 5, [3.0] * 5)
    assert abs(sum(sizes) - sum(wanted)) <= multiple / 2 + 1e-9
    assert all(size % multiple == 0 for size in sizes)
    assert sizes[2] == 1024


def test_no_size_falls_to_zero() -> None:
    assert realise([0.1, 64.0], [64, 64], [8, 8], [1.0, 1.0])[0] == 8
