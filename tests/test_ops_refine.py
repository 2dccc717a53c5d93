"""Refinement only ever lowers the output error, and its scales go to the least-squares solution."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, row_errors, statistics_of

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.ops.grid import Grid, in_groups, minmax_grid, stored
from outlierq.ops.search.columns import ColumnGrid
from outlierq.ops.search.refine import WIDEST, blocks, refine, refit_scales
from outlierq.quantize.gptq import gptq

SCHEMES = [
    QuantScheme(bits, size, symmetric) for bits in (2, 3, 4) for size in (32, None) for symmetric in (True, False)
]
# What float32 sums may add to an error that is measured in float64.
NOISE = 1 + 1e-4


@pytest.fixture(scope="module")
def hessian() -> torch.Tensor:
    return statistics_of(correlated_inputs(512, 160)).hessian


def grid_of(result: QuantTensor) -> Grid:
    zero_point = None if result.zero_point is None else result.zero_point.float()
    return Grid(result.scale.float(), zero_point, result.scheme)


def dense(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    return grid.decode(in_groups(codes, grid.scheme)).view(codes.shape)


def refined(
    w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, passes: int
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """Codes, grid, and how much each row gained."""
    columns, turned = ColumnGrid.of(grid, w.shape[1]), codes.T.contiguous()
    residuals = hessian @ (w - dense(codes, grid)).T
    gains = refine(residuals, turned, columns, hessian, passes=passes)
    return turned.T.contiguous(), columns.by_rows(), gains


def least_squares_errors(w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor) -> torch.Tensor:
    """Row errors with the best scales there are for these codes: min over s of |L^T (C^T s - w)|, H = L L^T."""
    root = torch.linalg.cholesky(hessian.double() + 1e-12 * hessian.diagonal().mean() * torch.eye(len(hessian)))
    centred = in_groups(codes, grid.scheme).double()
    if grid.zero_point is not None:
        centred = centred - grid.zero_point.double()[..., None]
    groups, columns = centred.shape[1:]
    found = []
    for row in range(len(w)):
        spread = torch.zeros(groups * columns, groups, dtype=torch.float64)
        for group in range(groups):
            spread[group * columns : (group + 1) * columns, group] = centred[row, group]
        solved = torch.linalg.lstsq(root.T @ spread, root.T @ w[row].double()[:, None]).solution
        found.append(row_errors((spread @ solved).T - w[row].double(), hessian)[0])
    return torch.stack(found)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_pass_raises_the_error_of_any_row(scheme, hessian):
    w = random_weight(24, 160)
    stats = statistics_of(correlated_inputs(512, 160))
    errors = [row_errors(gptq(w, stats, scheme, refine_passes=n).dequantize() - w, hessian) for n in range(4)]
    for before, after in pairwise(errors):
        assert torch.all(after <= before * NOISE)
    assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refinement_improves_plain_rounding_and_stays_on_the_grid(scheme, hessian):
    w = random_weight(24, 160)
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    better, fitted, gains = refined(w, codes, grid, hessian, 2)
    before = row_errors(dense(codes, grid) - w, hessian)
    after = row_errors(dense(better, fitted) - w, hessian)
    assert torch.all(after <= before * NOISE)
    assert after.sum() < 0.5 * before.sum()
    assert torch.allclose(before - after, gains, rtol=1e-3, atol=1e-4 * before.max().item())
    assert torch.equal(better.round(), better)
    assert scheme.code_min <= better.min() and better.max() <= scheme.code_max
    assert torch.equal(fitted.scale.bfloat16().float(), fitted.scale)


def test_no_pass_changes_nothing(hessian):
    w, scheme = random_weight(4, 160), QuantScheme(4, 32)
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    same, same_grid, gains = refined(w, codes, grid, hessian, 0)
    assert torch.equal(same, codes)
    assert torch.equal(same_grid.scale, grid.scale)
    assert not gains.any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 80, None])
def test_scales_refitted_one_after_the_other_reach_the_float64_least_squares_error_of_all_together(
    group_size, symmetric, hessian
):
    w = random_weight(12, 160)
    scheme = QuantScheme(3, group_size, symmetric, "float32")
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    fitted = refit_scales(w, codes, grid, hessian, times=20)
    found = row_errors(dense(codes, fitted) - w, hessian)
    least = least_squares_errors(w, codes, grid, hessian)
    assert torch.all(found >= least * (1 - 1e-4))
    assert torch.all(found <= least * 1.001)


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_scales_never_err_more_after_rounding_to_storage(symmetric, hessian):
    w, scheme = random_weight(40, 160), QuantScheme(4, 32, symmetric)
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    fitted = refit_scales(w, codes, grid, hessian)
    assert torch.equal(fitted.scale.bfloat16().float(), fitted.scale)
    after, before = (row_errors(dense(codes, g) - w, hessian) for g in (fitted, grid))
    assert torch.all(after <= before * NOISE)


def test_stored_scales_that_err_less_than_the_rounded_solution_are_kept(hessian):
    """A stored scale from which no neighbour errs less is a minimum: rounding what was solved must not leave it."""
    w, scheme = random_weight(40, 160), QuantScheme(4, 32)
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    fitted = refit_scales(w, codes, grid, hessian, times=20)
    least = row_errors(dense(codes, fitted) - w, hessian)
    for group, factor in product(range(5), (1 - 2**-8, 1 + 2**-8)):
        scale = fitted.scale.clone()
        scale[:, group] *= factor
        moved = Grid(stored(scale, scheme), None, scheme)
        assert torch.all(row_errors(dense(codes, moved) - w, hessian) >= least * (1 - 1e-4))


def test_scales_of_a_row_without_codes_are_kept(hessian):
    w, scheme = random_weight(3, 160), QuantScheme(4, 32)
    w[1] = 0
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    fitted = refit_scales(w, codes, grid, hessian)
    assert torch.equal(fitted.scale[1], grid.scale[1])
    assert fitted.scale.isfinite().all()


@pytest.mark.parametrize("rows", [1, 300])
def test_any_number_of_rows_is_refined(rows, hessian):
    w, scheme = random_weight(rows, 160), QuantScheme(3, 32)
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    better, fitted, _ = refined(w, codes, grid, hessian, 1)
    assert row_errors(dense(better, fitted) - w, hessian).sum() < row_errors(dense(codes, grid) - w, hessian).sum()


def test_the_refined_codes_are_a_minimum_in_every_single_code(hessian):
    w = random_weight(3, 160)
    stats = statistics_of(correlated_inputs(512, 160))
    result = gptq(w, stats, QuantScheme(3, None, scale_dtype="float32"), refine_passes=8)
    grid, codes = grid_of(result), result.codes.float()
    least = row_errors(dense(codes, grid) - w, hessian)
    for column in range(0, 160, 7):
        for step in (-1, 1):
            moved = codes.clone()
            moved[:, column] = (moved[:, column] + step).clamp(-4, 3)
            assert torch.all(row_errors(dense(moved, grid) - w, hessian) >= least * (1 - 1e-3))


def test_refinement_writes_to_copies_of_a_grid_and_never_to_the_hessian(hessian):
    w, scheme = random_weight(4, 160), QuantScheme(4, 32, symmetric=False)
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    given = [w, codes, grid.scale, grid.zero_point, hessian]
    before = [t.clone() for t in given]
    refined(w, codes, grid, hessian, 2)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize(("width", "size"), [(160, 32), (300, 100), (512, 256), (640, 640), (90, 1), (2048, 1024)])
def test_blocks_hold_whole_groups_or_parts_of_a_wide_one(width, size):
    found = list(blocks(width, size))
    assert [b.start for b in found] == [0, *(b.stop for b in found[:-1])] and found[-1].stop == width
    assert all(b.start % size == 0 or size > WIDEST for b in found)
    assert all(b.stop - b.start <= WIDEST for b in found)


@pytest.mark.parametrize("group_size", [32, 160, None])
def test_a_second_pass_starts_where_the_first_one_ended(group_size, hessian):
    """What the residuals are brought up to date with is neither forgotten nor counted twice."""
    wide = statistics_of(correlated_inputs(700, 640)).hessian
    w, scheme = random_weight(20, 640), QuantScheme(3, group_size)
    grid = minmax_grid(w, scheme)
    codes = grid.encode(in_groups(w, scheme)).view(w.shape)
    together, grid_of_both, gains = refined(w, codes, grid, wide, 3)
    one_by_one, gained = (codes, grid), 0
    for _ in range(3):
        *one_by_one, more = refined(w, *one_by_one, wide, 1)
        gained = gained + more
    assert (together == one_by_one[0]).float().mean() > 0.995
    assert torch.allclose(gains, gained, rtol=1e-2)
    lost = row_errors(dense(codes, grid) - w, wide) - row_errors(dense(together, grid_of_both) - w, wide)
    assert torch.allclose(lost, gains, rtol=1e-3)
