"""Scalar codebooks for one matrix: tensors in, tensors out.

    Ŵ[r, c] = s[r, c // G] · C[k(r), I[r, c]]

with scales `s`, codebooks `C` shared by groups of similar rows `k(r)`, and codes `I`. Everything minimises the output
error `tr((W − Ŵ) H (W − Ŵ)ᵀ)`, `H = Σ xᵀx` over calibration tokens.

Sources: E. Yvinec et al., "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings",
arXiv 2309.17361 (codebook and mapping learned together; our re-implementation); E. Frantar et al., "GPTQ", arXiv
2210.17323 (assignment with error feedback). The alternating least squares are exact minimisations of the same error.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import NumericalError
from .coded import Coded, sorted_codes

# Rounds of the k-means start; scales are refitted from the third on, when the codes have settled a little.
START_ROUNDS = 12
# Weights that the start of a codebook looks at; more do not move its quantiles.
START_SAMPLE = 200_000
# Quantiles of a scaled row by which rows are told apart.
ROW_FEATURES = 16
# Columns whose errors are kept apart from the rest of the matrix in the sweeps.
SWEEP_COLUMNS = 64
DAMPING_ATTEMPTS = 5


def damped(gram: Float[Tensor, "n n"], damping: float, order: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n n"]:
    """`H + λI`, `λ = damping · mean(diag H)`, in float64, for the inputs in another `order` if that is given.

    Raises:
        NumericalError: non-finite values, or a Gram that is zero.
    """
    shifted = (gram.clone() if order is None else gram[order[:, None], order]).double()
    scale = shifted.diagonal().mean()
    if not torch.isfinite(scale):
        raise NumericalError("the Gram matrix of the inputs holds non-finite values")
    if scale <= 0:
        raise NumericalError("the Gram matrix of the inputs is zero: the calibration data never reaches this module")
    shifted.diagonal().add_(damping * scale)
    return shifted


def relative_error(
    weight: Float[Tensor, "rows columns"],
    coded: Float[Tensor, "rows columns"],
    gram: Float[Tensor, "columns columns"] | None,
) -> float:
    """`tr(E H Eᵀ) / tr(W H Wᵀ)`, `E = W − Ŵ`; `H = I` where there is no data."""

    whole = output_energy(weight, gram)
    return output_energy(weight - coded, gram) / whole if whole > 0 else 0.0


def output_energy(matrix: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"] | None) -> float:
    """`tr(M H Mᵀ)`; `H = I` where there is no data."""
    return float(((matrix if gram is None else matrix @ gram.to(matrix)) * matrix).double().sum())


def start(
    weight: Float[Tensor, "rows columns"],
    importance: Float[Tensor, " columns"],
    *,
    codes: int,
    column_group: int,
    rows_per_codebook: int,
    generator: torch.Generator,
    in_turn: bool = False,
) -> Coded:
    """Weighted k-means in one dimension, scales and codebooks in turn; nearest assignment.

    Args:
        weight: `W` in float32.
        importance: `diag H`; ones where there is no data.
        codes: codes of a codebook, 2 or more.
        column_group: columns that share a scale.
        rows_per_codebook: rows that share a codebook on average.
        generator: on the CPU; draws the sample that a codebook starts from.
        in_turn: the rows that follow each other share a codebook, rather than those of alike distribution.
    """
    rows, columns = weight.shape
    weights = importance.to(weight).clamp_min(torch.finfo(weight.dtype).tiny).expand(rows, -1)
    energy = _by_group(weights * weight.square(), column_group)
    scales = (energy / _by_group(weights, column_group)).sqrt()
    coded = Coded(
        codes=torch.zeros(rows, columns, dtype=torch.long, device=weight.device),
        codebooks=weight.new_zeros(1, codes),
        scales=scales,
        row_codebook=torch.zeros(rows, dtype=torch.long, device=weight.device),
        column_group=column_group,
    )
    scaled = _scaled(weight, coded)
    books = -(-rows // rows_per_codebook)
    taken = torch.arange(rows, device=weight.device) // rows_per_codebook
    coded = replace(coded, row_codebook=taken if in_turn else group_rows(scaled, books, generator))
    coded = replace(coded, codebooks=_quantile_codebooks(scaled, coded.row_codebook, books, codes, generator))
    for turn in range(START_ROUNDS):
        coded = assign_nearest(weight, coded)
        coded = replace(coded, codebooks=_mean_codebooks(weight, weights, coded))
        if turn >= 2:
            table = coded.tables().gather(1, coded.codes)
            fitted = _by_group(weights * table * weight, column_group)
            norm = _by_group(weights * table.square(), column_group)
            coded = replace(coded, scales=torch.where(norm > 0, fitted / norm, 0).clamp_min(0))
    return assign_nearest(weight, coded)


def constant_rows(weight: Float[Tensor, "rows columns"], coded: Coded) -> Coded:
    """Rows of one value are met exactly: all their weights take the code of that sign with the largest magnitude, and
    their scale what is left."""
    value = weight[:, 0]
    constant = (weight == value[:, None]).all(dim=1) & (value != 0)
    if not constant.any():
        return coded
    tables = coded.tables()
    code = torch.where(value > 0, tables.argmax(dim=1), tables.argmin(dim=1))
    table = tables.gather(1, code[:, None])[:, 0]
    met = (constant & (table * value > 0))[:, None]
    scales = torch.where(met, (value / torch.where(table == 0, 1, table))[:, None], coded.scales)
    return replace(coded, codes=torch.where(met, code[:, None], coded.codes), scales=scales)


def assign_nearest(weight: Float[Tensor, "rows columns"], coded: Coded) -> Coded:
    """The nearest code for every weight."""
    return replace(coded, codes=nearest_codes(_scaled(weight, coded), coded.tables()))


def nearest_codes(
    scaled: Float[Tensor, "rows columns"], tables: Float[Tensor, "rows codes"]
) -> Int[Tensor, "rows columns"]:
    """The nearest of every row's ascending codes, for weights in units of their scale."""
    between = (tables[:, 1:] + tables[:, :-1]) / 2
    codes = torch.zeros(scaled.shape, dtype=torch.long, device=scaled.device)
    for boundary in between.T:
        codes += scaled > boundary[:, None]
    return codes


def feedback_of(gram: Float[Tensor, "columns columns"]) -> tuple[Tensor, Tensor]:
    """The order of the columns for `assign_with_feedback`, and in this order the upper Cholesky factor of `H⁻¹`.

    Columns of much input energy come first; scales are given beforehand, so that any order is allowed.

    Args:
        gram: `H`, damped, float64.

    Raises:
        NumericalError: `H` is not positive definite even with more damping.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    return order, _inverse_factor(gram[order][:, order])


def assign_with_feedback(
    weight: Float[Tensor, "rows columns"], feedback: tuple[Tensor, Tensor], coded: Coded
) -> Coded:
    """Column by column, each column's rounding error made up for by those to come (GPTQ).

    Args:
        feedback: what `feedback_of` makes of `H`; all matrices over the same inputs share it.
    """
    order, factor = feedback[0], feedback[1].to(weight)
    rest, scales = weight[:, order].clone(), coded.wide_scales()[:, order]
    tables = coded.tables()
    between = (tables[:, 1:] + tables[:, :-1]) / 2
    found = torch.empty_like(coded.codes)
    for first in range(0, len(order), SWEEP_COLUMNS):
        block = slice(first, min(first + SWEEP_COLUMNS, len(order)))
        own, triangle = rest[:, block], factor[block, block]
        errors = torch.zeros_like(own)
        for column in range(own.shape[1]):
            scale = scales[:, first + column]
            code = _nearest(own[:, column], scale, between)
            found[:, first + column] = code
            value = scale * tables.gather(1, code[:, None])[:, 0]
            errors[:, column] = (own[:, column] - value) / triangle[column, column]
            own[:, column:] -= errors[:, column, None] * triangle[column, column:]
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    codes = torch.empty_like(found)
    codes[:, order] = found
    return replace(coded, codes=codes)


def sweep_codes(
    weight: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"], coded: Coded, sweeps: int = 1
) -> Coded:
    """Coordinate descent on the codes: every weight in turn takes the code that is best given all others.

    Never raises the error. Rows are independent, so a column is done for all rows at once.
    """
    scales, tables = coded.wide_scales(), coded.tables()
    between = (tables[:, 1:] + tables[:, :-1]) / 2
    gram = gram.to(weight)
    matrix, codes = coded.matrix(), coded.codes.clone()
    error = matrix - weight
    for _ in range(sweeps):
        for first in range(0, weight.shape[1], SWEEP_COLUMNS):
            block = slice(first, min(first + SWEEP_COLUMNS, weight.shape[1]))
            slope, own = error @ gram[:, block], gram[block, block]
            for column in range(own.shape[0]):
                at = first + column
                best = matrix[:, at] - slope[:, column] / own[column, column]
                code = _nearest(best, scales[:, at], between)
                value = scales[:, at] * tables.gather(1, code[:, None])[:, 0]
                change = value - matrix[:, at]
                matrix[:, at], codes[:, at] = value, code
                error[:, at] += change
                slope.addr_(change, own[column])
    return replace(coded, codes=codes)


def refit_codebooks(
    weight: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"], coded: Coded
) -> Coded:
    """The least-squares codebooks for the present codes and scales: one small system a codebook."""
    gram = gram.to(weight)
    size, columns = coded.codebooks.shape[1], weight.shape[1]
    targets, scales = weight @ gram, coded.wide_scales()
    codebooks = coded.codebooks.clone()
    for book in range(len(codebooks)):
        members = (coded.row_codebook == book).nonzero()[:, 0]
        system = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
        right = torch.zeros(size, dtype=torch.float64, device=weight.device)
        for rows in members.split(max(1, 2**24 // (size * columns))):
            spread = weight.new_zeros(len(rows), size, columns)
            spread.scatter_(1, coded.codes[rows][:, None], scales[rows][:, None])
            flat = spread.flatten(end_dim=1)
            product = (flat @ gram).view_as(spread)
            system += torch.einsum("rkn,rln->kl", product, spread).double()
            right += torch.einsum("rkn,rn->k", spread, targets[rows]).double()
        # Codes that no weight uses keep their place; the small ridge also holds nearly unused ones back.
        ridge = 1e-6 * system.diagonal().mean() + torch.finfo(torch.float64).tiny
        system.diagonal().add_(ridge)
        right += ridge * codebooks[book].double()
        codebooks[book] = torch.linalg.solve(system, right).to(codebooks)
    return sorted_codes(replace(coded, codebooks=codebooks))


def refit_scales(weight: Float[Tensor, "rows columns"], gram: Float[Tensor, "columns columns"], coded: Coded) -> Coded:
    """The least-squares scales for the present codes and codebooks: one small system a row."""
    gram, group = gram.to(weight), coded.column_group
    table = coded.tables().gather(1, coded.codes)
    right = _by_group(table * (weight @ gram), group)
    groups = right.shape[1]
    system = weight.new_zeros(len(weight), groups, groups)
    for index in range(groups):
        columns = slice(index * group, (index + 1) * group)
        system[:, index] = _by_group((table[:, columns] @ gram[columns]) * table, group)
    system = system.double()
    ridge = 1e-4 * system.diagonal(dim1=1, dim2=2).mean(dim=1) + torch.finfo(torch.float64).tiny
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    right = right.double() + ridge[:, None] * coded.scales.double()
    scales = torch.linalg.solve(system, right).to(weight)
    # A sign belongs into the codes: a scale that would turn negative stays as it was.
    return replace(coded, scales=torch.where(scales > 0, scales, coded.scales))


def group_rows(scaled: Float[Tensor, "rows columns"], books: int, generator: torch.Generator) -> Int[Tensor, " rows"]:
    """Rows of alike distribution together: k-means on quantiles of the scaled rows."""
    rows, columns = scaled.shape
    if books == 1:
        return torch.zeros(rows, dtype=torch.long, device=scaled.device)
    positions = torch.linspace(0.03, 0.97, ROW_FEATURES) * (columns - 1)
    features = scaled.sort(dim=1).values[:, positions.round().long().to(scaled.device)]
    centres = features[torch.randperm(rows, generator=generator)[:books].to(scaled.device)]
    member = torch.cdist(features, centres).argmin(dim=1)
    for _ in range(10):
        sums = torch.zeros_like(centres).index_add_(0, member, features)
        counts = torch.bincount(member, minlength=books)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        member = torch.cdist(features, centres).argmin(dim=1)
    return member


def _quantile_codebooks(
    scaled: Float[Tensor, "rows columns"],
    member: Int[Tensor, " rows"],
    books: int,
    codes: int,
    generator: torch.Generator,
) -> Float[Tensor, "books codes"]:
    """Codes at evenly spaced quantiles, moved outwards: k-means wants more codes in the tails than the mass says."""
    middle = torch.linspace(-1, 1, 2 * codes + 1)[1::2]
    quantiles = 0.5 + 0.5 * middle.sign() * middle.abs() ** 0.8
    result = scaled.new_zeros(books, codes)
    for book in range(books):
        values = scaled[member == book].flatten()
        if len(values) > START_SAMPLE:
            values = values[torch.randint(len(values), (START_SAMPLE,), generator=generator).to(values.device)]
        result[book] = torch.quantile(values, quantiles.to(values)) if len(values) else middle.to(values)
    return result


def _mean_codebooks(
    weight: Float[Tensor, "rows columns"], weights: Float[Tensor, "rows columns"], coded: Coded
) -> Float[Tensor, "books codes"]:
    """Every code at the weighted mean of the weights that use it."""
    scales, size = coded.wide_scales(), coded.codebooks.shape[1]
    place = (coded.row_codebook[:, None] * size + coded.codes).flatten()
    mass = (weights * scales.square()).flatten()
    above = torch.zeros(coded.codebooks.numel(), dtype=torch.float64, device=weight.device)
    below = torch.zeros_like(above)
    above.index_add_(0, place, (weights * scales * weight).flatten().double())
    below.index_add_(0, place, mass.double())
    means = torch.where(below > 0, above / below, coded.codebooks.flatten().double())
    return means.view_as(coded.codebooks).to(weight).sort(dim=1).values


def _scaled(weight: Float[Tensor, "rows columns"], coded: Coded) -> Float[Tensor, "rows columns"]:
    return weight / coded.wide_scales().clamp_min(torch.finfo(weight.dtype).tiny)


def _nearest(
    values: Float[Tensor, " rows"], scales: Float[Tensor, " rows"], between: Float[Tensor, "rows codes_less_one"]
) -> Int[Tensor, " rows"]:
    return (values[:, None] > scales[:, None] * between).sum(dim=1)


def _by_group(values: Float[Tensor, "rows columns"], group: int) -> Float[Tensor, "rows groups"]:
    """Sums over the columns of every group; the last one may be short."""
    padding = -values.shape[1] % group
    sums: Tensor = torch.nn.functional.pad(values, (0, padding)).unflatten(1, (-1, group)).sum(dim=-1)
    return sums


def _inverse_factor(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Upper Cholesky factor of `H⁻¹`. Raises `NumericalError` after several larger dampings."""
    for attempt in range(DAMPING_ATTEMPTS):
        shifted = gram if attempt == 0 else damped(gram, 10.0 ** (attempt - 4))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed.item():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed.item():
                found: Tensor = upper
                return found
    raise NumericalError("the Gram matrix of the inputs is not positive definite, even with strong damping")
