"""Selection, schedule, positions and products of pruning against plain references."""

from __future__ import annotations

import pytest
import torch

from hf_compress import NumericalError
from hf_compress.kernels.sparse import sparse_linear
from hf_compress.methods.pruning import mathematics, positions
from hf_compress.methods.pruning.format import choose_dtype, store
from hf_compress.methods.pruning.selection import select, sparsity_of


def random_scores(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((7, 11), (40, 3), (13, 13))]


@pytest.mark.parametrize("kept", [1, 2, 100, 300, 365, 366, 1000])
def test_the_best_of_all_tensors_are_kept(kept: int) -> None:
    scores = random_scores()
    masks = mathematics.keep_best(scores, kept)
    flat = torch.cat([score.flatten() for score in scores])
    chosen = torch.cat([mask.flatten() for mask in masks])
    assert chosen.sum() == min(kept, 366)
    assert flat[chosen].sort().values.equal(flat.sort().values[-min(kept, 366) :])


def test_ties_go_to_the_first() -> None:
    scores = [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0, -0.0], [0.0, 2.0]])]
    first, second = mathematics.keep_best(scores, 3)
    assert first.tolist() == [True, False, True]
    assert second.tolist() == [[False, False], [False, True]]
    first, second = mathematics.keep_best(scores, 5)
    assert first.tolist() == [True, True, True]
    assert second.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("value", [0.0, -1.5, 1e-30, 3e38, float("inf"), float("-inf")])
def test_equal_scores_are_counted_exactly(value: float) -> None:
    masks = mathematics.keep_best([torch.full((50,), value), torch.full((5, 10), value)], 61)
    assert sum(int(mask.sum()) for mask in masks) == 61
    assert masks[0].all()


def test_only_allowed_weights_are_kept() -> None:
    scores = random_scores()
    allowed = [score < 0.5 for score in scores]
    masks = mathematics.keep_best(scores, 90, allowed)
    flat = torch.cat([score.flatten() for score in scores])
    chosen, may = (torch.cat([mask.flatten() for mask in group]) for group in (masks, allowed))
    assert chosen.sum() == 90
    assert not (chosen & ~may).any()
    assert flat[chosen].min() >= flat[may & ~chosen].max()
    assert sum(int(mask.sum()) for mask in mathematics.keep_best(scores, 1000, allowed)) == int(may.sum())


def test_scores_that_are_nan_are_refused() -> None:
    with pytest.raises(NumericalError, match="NaN"):
        mathematics.keep_best([torch.tensor([1.0, float("nan")])], 1)
    with pytest.raises(NumericalError, match="NaN"):
        mathematics.keep_best_of_rows(torch.tensor([[1.0, float("nan")]]), 1)


def test_rows_are_compared_by_themselves() -> None:
    score = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert mathematics.keep_best_of_rows(score, 2).tolist() == [[True, False, True, False], [True, True, False, False]]


@pytest.mark.parametrize("compared", ["global", "layer", "row"])
def test_an_earlier_pruning_is_never_undone(compared: str) -> None:
    scores = dict(zip("abc", random_scores(1), strict=True))
    before = {name: score > -0.5 for name, score in scores.items()}
    low = {
        name: torch.where(mask, -score, torch.tensor(9.0))
        for (name, score), mask in zip(scores.items(), before.values(), strict=True)
    }
    masks = select(low, 0.5, compared, before)
    assert all(not (mask & ~before[name]).any() for name, mask in masks.items())
    if compared == "global":
        assert sparsity_of(list(masks.values())) == pytest.approx(0.5, abs=1 / 366)


def test_the_cubic_schedule() -> None:
    found = [mathematics.cubic_sparsity(step, 10, 30, 0.9) for step in range(41)]
    assert found[10] == 0
    assert found[20] == pytest.approx(0.9 * (1 - 0.125))
    assert found[30] == found[40] == 0.9
    assert found == sorted(found)


def test_snip_magnitude_is_the_papers_score() -> None:
    weight, gradient = random_scores(2)[0].double(), random_scores(3)[0].double()
    score, sensitivity, magnitude = mathematics.snip_magnitude(weight, gradient, 0.001, normalize=False)
    torch.testing.assert_close(score, (weight * gradient).abs() + 0.001 * weight**2)
    assert sensitivity == pytest.approx(float((weight * gradient).abs().sum()))
    assert magnitude == pytest.approx(float((0.001 * weight**2).sum()))
    normed, *_ = mathematics.snip_magnitude(1000 * weight, gradient, 0.001, normalize=True)
    torch.testing.assert_close(normed, mathematics.snip_magnitude(weight, gradient, 0.001, normalize=True)[0])


@pytest.mark.parametrize("density", [0.0003, 0.02, 0.1, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 7, 8, 1000, 50_001])
def test_positions_come_back(density: float, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    mask = torch.rand(size, generator=generator) < density
    mask[size // 2] = True
    kept = mask.nonzero().squeeze(1)
    kind, stream = positions.encode(kept, size)
    assert positions.decode(kind, stream, len(kept), size).equal(kept)
    fewest, most = positions.stream_bytes(kind, len(kept), size)
    assert fewest <= len(stream) <= most
    assert len(stream) <= -(-size // 8)


def test_positions_at_98_percent_take_0_161_bits() -> None:
    mask = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0)) < 0.02
    kind, stream = positions.encode(mask.nonzero().squeeze(1), len(mask))
    assert kind == "gaps"
    assert 8 * len(stream) / len(mask) == pytest.approx(0.161, abs=0.002)


def test_runs_of_255_zeros_and_their_neighbours() -> None:
    kept = torch.tensor([254, 255, 511, 511 + 256, 511 + 256 + 511, 5000])
    kind, stream = positions.encode(kept, 6000)
    assert kind == "gaps"
    assert positions.decode(kind, stream, len(kept), 6000).equal(kept)


@pytest.mark.parametrize("kind", ["gaps", "mask"])
def test_damaged_positions_are_refused(kind: str) -> None:
    size = 4000
    mask = torch.rand(size, generator=torch.Generator().manual_seed(0)) < (0.02 if kind == "gaps" else 0.5)
    kept = mask.nonzero().squeeze(1)
    found, stream = positions.encode(kept, size)
    assert found == kind
    with pytest.raises(ValueError, match="positions"):
        positions.decode(kind, stream, len(kept) + 1, size)
    stream[5:7] = 255
    with pytest.raises(ValueError, match="positions"):
        positions.decode(kind, stream, len(kept), size)
    if kind == "gaps":
        longer = torch.full((len(kept),), 254, dtype=torch.uint8)
        with pytest.raises(ValueError, match="reach"):
            positions.decode(kind, longer, len(kept), size)


def test_values_go_where_they_fit() -> None:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert choose_dtype(weights, torch.float32) == "float16"
    assert choose_dtype(weights.bfloat16(), torch.bfloat16) == "bfloat16"
    assert choose_dtype(weights * 1e-6, torch.float32) == choose_dtype(weights * 1e6, torch.float32) == "bfloat16"


def test_int8_values_are_within_half_a_step() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 16).unsqueeze(1)
    mask = torch.rand(16, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    stored = store(weight, mask, "int8", torch.float32)
    rows = mask.nonzero()[:, 0]
    step = stored.scales.float()[rows]
    error = (stored.values.float() * step - weight[mask]).abs()
    # The scale is rounded to 8 bits: the largest weight of a row may be cut by that.
    assert (error <= 0.5 * step + weight[mask].abs() * 2**-8).all()


def csr(mask: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    starts = torch.zeros(len(mask) + 1, dtype=torch.int32)
    starts[1:] = mask.sum(dim=1).cumsum(0)
    return weight[mask], starts, mask.nonzero()[:, 1].int()


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (0,), (2, 3, 4)])
def test_products_and_their_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    mask = torch.rand(30, 20, generator=generator) < 0.2
    mask[4] = False
    x = torch.randn(*shape, 20, generator=generator, dtype=torch.float64)
    values, starts, columns = csr(mask, weight)
    bias = torch.randn(30, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(sparse_linear(x, values, starts, columns, 20, bias), x @ (weight * mask).T + bias)
    inputs = [tensor.requires_grad_() for tensor in (x, values, bias)]
    torch.autograd.gradcheck(lambda x, values, bias: sparse_linear(x, values, starts, columns, 20, bias), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_keep_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(30, 20, generator=generator) < 0.2
    weight, x = torch.randn(30, 20, generator=generator), torch.randn(4, 20, generator=generator)
    values, starts, columns = csr(mask, weight.to(dtype))
    found = sparse_linear(x.to(dtype), values, starts, columns, 20)
    assert found.dtype == dtype
    reference = x.to(dtype).float() @ (weight.to(dtype).float() * mask).T
    torch.testing.assert_close(found.float(), reference, rtol=2**-7, atol=1e-2)


def test_the_operator_is_well_formed() -> None:
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    values, starts, columns = csr(mask, torch.randn(6, 5))
    torch.library.opcheck(
        torch.ops.hf_compress.sparse_linear.default,
        (torch.randn(3, 5, requires_grad=True), values.requires_grad_(), starts, columns, 5, torch.randn(6)),
    )
