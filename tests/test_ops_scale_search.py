"""The scale search never errs more than the min-max grid, and finds what a fine scan finds."""

from __future__ import annotations

import pytest
import torch
from reference.grids import least_error_by_scan, range_error_by_scan
from reference.statistics import correlated_inputs, random_weight, statistics_of

from outlierq.core.scheme import QuantScheme
from outlierq.ops.errors import diagonal_blocks
from outlierq.ops.grid import Grid, in_groups, minmax_grid
from outlierq.ops.search.scale_search import group_blocks, group_error, quick_grid, search_grid

SCHEMES = [
    QuantScheme(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (32, None) for symmetric in (True, False)
]


def errors(grid: Grid, w: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """d H_gg d of every (row, group), float64."""
    grouped = in_groups(w, grid.scheme)
    change = (grid.round(grouped) - grouped).double()
    blocks = diagonal_blocks(hessian, grouped.shape[-1]).double()
    return torch.einsum("rgi,gij,rgj->rg", change, blocks, change)


@pytest.fixture(scope="module")
def hessian() -> torch.Tensor:
    return statistics_of(correlated_inputs(512, 96)).hessian


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["by output error", "by weight error"])
def test_no_group_errs_more_than_with_the_min_max_grid(scheme, weighted, hessian):
    w = random_weight(16, 96)
    w[3, :40] *= 10
    w[7] = 0
    w[8] = 0.02
    objective = hessian if weighted else torch.eye(96)
    found = errors(search_grid(w, scheme, hessian if weighted else None), w, objective)
    plain = errors(minmax_grid(w, scheme), w, objective)
    assert torch.all(found <= plain * (1 + 1e-4) + 1e-9)
    if scheme.symmetric and scheme.bits <= 4:
        assert found.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_searched_scales_are_finite_not_zero_and_storable(scheme, hessian):
    grid = search_grid(random_weight(16, 96), scheme, hessian)
    assert grid.scale.isfinite().all()
    assert torch.all(grid.scale != 0)
    assert torch.equal(grid.scale.bfloat16().float(), grid.scale)
    if not scheme.symmetric:
        assert torch.all((grid.zero_point >= 0) & (grid.zero_point <= scheme.code_max))
        assert torch.equal(grid.zero_point.round(), grid.zero_point)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_search_comes_close_to_a_fine_scan_of_all_scales(bits):
    hessian = statistics_of(correlated_inputs(64, 16, outliers=1)).hessian
    w = random_weight(8, 16)
    scheme = QuantScheme(bits, 8, scale_dtype="float32")
    found = errors(search_grid(w, scheme, hessian), w, hessian)
    blocks = diagonal_blocks(hessian, 8)
    plain = errors(minmax_grid(w, scheme), w, hessian)
    best = torch.tensor(
        [[least_error_by_scan(w[r, g : g + 8], blocks[g // 8], bits) for g in (0, 8)] for r in range(8)]
    )
    # The twin rounds each weight alone, as the search does, but tries 800 scales; a few and a refit come close.
    assert found.sum() - best.sum() < 0.25 * (plain.sum() - best.sum())
    assert (found / best).median() < 1.25


@pytest.mark.parametrize("bits", [2, 4])
def test_asymmetric_search_comes_close_to_a_scan_of_all_ranges(bits):
    hessian = statistics_of(correlated_inputs(64, 8, outliers=1)).hessian
    w = random_weight(6, 8)
    scheme = QuantScheme(bits, 8, symmetric=False, scale_dtype="float32")
    found = errors(search_grid(w, scheme, hessian), w, hessian).sum()
    best = sum(range_error_by_scan(row, hessian, bits) for row in w)
    plain = errors(minmax_grid(w, scheme), w, hessian).sum()
    # The twin shrinks both ends of the range on their own, the search shrinks them together.
    assert found - best < 0.5 * (plain - best)


def test_without_a_hessian_the_search_minimises_the_weight_error():
    w, scheme = random_weight(8, 64), QuantScheme(3, 32)
    plain, identity = search_grid(w, scheme, None), search_grid(w, scheme, torch.eye(64))
    assert torch.allclose(errors(plain, w, torch.eye(64)), errors(identity, w, torch.eye(64)), rtol=1e-3)


def test_an_outlier_that_no_input_reads_is_clipped():
    w = random_weight(4, 32).clamp(-0.1, 0.1)
    w[:, 9] = 0.15
    hessian = torch.eye(32)
    hessian[9, 9] = 1e-6
    scheme = QuantScheme(3, None)
    kept, clipped = (grid.round(w[:, None])[:, 0] for grid in (minmax_grid(w, scheme), search_grid(w, scheme, hessian)))
    assert torch.all(kept[:, 9] > 0.149)
    assert clipped[:, 9].mean() < 0.13


def test_the_error_of_a_group_is_its_share_of_the_output_error(hessian):
    change = random_weight(5, 96).view(5, 3, 32)
    blocks = diagonal_blocks(hessian, 32)
    found = group_error(change, blocks)
    for group in range(3):
        part = hessian[32 * group : 32 * group + 32, 32 * group : 32 * group + 32]
        expected = ((change[:, group].double() @ part.double()) * change[:, group]).sum(1)
        assert torch.allclose(found[:, group].double(), expected, rtol=1e-4)
    assert torch.allclose(group_error(change, None), change.square().sum(-1))


@pytest.mark.parametrize("size", [32, 40, None])
def test_a_diagonal_gives_the_error_of_diagonal_blocks_to_the_bit(size, hessian):
    scheme = QuantScheme(4, size) if size != 40 else QuantScheme(8, None, block=(1, 40))
    diagonal, change = group_blocks(hessian.diagonal(), scheme), random_weight(5, 96)
    grouped = in_groups(change, scheme)
    assert diagonal.shape == grouped.shape[1:]
    for dtype in (torch.float32, torch.bfloat16):
        blocks = diagonal.to(dtype)
        assert torch.equal(group_error(grouped, blocks), group_error(grouped, torch.diag_embed(blocks)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_quick_grid_lies_between_the_min_max_grid_and_the_searched_one(scheme):
    w, diagonal = random_weight(16, 96), torch.rand(96, generator=torch.Generator().manual_seed(0))
    grids = quick_grid(w, scheme, diagonal), search_grid(w, scheme, diagonal), minmax_grid(w, scheme)
    quick, searched, plain = (errors(grid, w, torch.diag(diagonal)).sum().item() for grid in grids)
    assert quick <= plain and quick < 1.3 * searched


@pytest.mark.parametrize("given", [True, False])
def test_the_search_does_not_write_to_its_inputs(given, hessian):
    w, seen = random_weight(8, 96), hessian.clone()
    before = w.clone()
    search_grid(w, QuantScheme(4, 32), hessian if given else None)
    assert torch.equal(w, before)
    assert torch.equal(hessian, seen)
