"""Laws of integer grids: what is stored is what was rounded to, whatever the group looks like."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from reference.grids import grid_values, nearest_distance
from reference.statistics import random_weight

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.ops.grid import Grid, in_groups, minmax_grid, range_grid, stored
from outlierq.quantize.rtn import rtn

SCHEMES = [
    QuantScheme(bits, group_size, symmetric, dtype)
    for bits in range(2, 9)
    for group_size in (16, None)
    for symmetric in (True, False)
    for dtype in ("bfloat16", "float16")
]
PLAIN = [scheme for scheme in SCHEMES if scheme.bits in (2, 3, 4, 8) and scheme.scale_dtype == "bfloat16"]


def grid_of(result: QuantTensor) -> Grid:
    """The grid as a reader of the file sees it."""
    zero_point = None if result.zero_point is None else result.zero_point.float()
    return Grid(result.scale.float(), zero_point, result.scheme)


def values_of(result: QuantTensor, row: int, group: int) -> torch.Tensor:
    zero = 0 if result.zero_point is None else result.zero_point[row, group].item()
    return grid_values(result.scale[row, group].item(), zero, (result.scheme.code_min, result.scheme.code_max))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_stored_scale_gives_the_stored_codes_again(scheme):
    w = random_weight(24, 64)
    result = rtn(w, None, scheme)
    assert result.scale.dtype == getattr(torch, scheme.scale_dtype)
    again = grid_of(result).encode(in_groups(w, scheme)).view(w.shape)
    assert torch.equal(again, result.codes.float())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantize_is_code_minus_zero_point_times_scale(scheme):
    result = rtn(random_weight(6, 32), None, scheme)
    dense = result.dequantize()
    width = scheme.columns_per_group(32)
    assert dense.dtype == torch.float32
    for row in range(6):
        for column in range(32):
            zero = 0 if scheme.symmetric else int(result.zero_point[row, column // width])
            scale = result.scale[row, column // width].float()
            assert dense[row, column] == scale * (int(result.codes[row, column]) - zero)


@pytest.mark.parametrize("scheme", PLAIN, ids=str)
def test_every_weight_goes_to_the_nearest_of_all_grid_values(scheme):
    w = random_weight(8, 64)
    result = rtn(w, None, scheme)
    distance = (in_groups(w, scheme) - in_groups(result.dequantize(), scheme)).abs().double()
    for row in range(8):
        for group in range(scheme.groups(64)):
            least = nearest_distance(in_groups(w, scheme)[row, group], values_of(result, row, group))
            assert torch.all(distance[row, group] <= least + 1e-6 * result.scale[row, group].float().abs())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_all_zero_group_has_scale_one_and_stays_zero(scheme):
    w = random_weight(3, 32)
    w[1] = 0
    result = rtn(w, None, scheme)
    assert torch.all(result.scale[1] == 1)
    assert torch.all(result.dequantize()[1] == 0)


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0117, 1e-6])
@pytest.mark.parametrize("scheme", PLAIN, ids=str)
def test_a_constant_group_is_kept_up_to_the_precision_of_its_scale(scheme, value):
    dense = rtn(torch.full((2, 32), value), None, scheme).dequantize()
    assert torch.allclose(dense, torch.full((2, 32), value), rtol=2**-8, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scheme", PLAIN, ids=str)
def test_one_outlier_is_held_by_the_min_max_grid(scheme, sign):
    w = random_weight(2, 32)
    w[0, 5] = sign * 40.0
    dense = rtn(w, None, scheme).dequantize()
    assert dense[0, 5] == pytest.approx(sign * 40.0, rel=2**-7)


def test_an_outlier_spoils_its_own_group_alone():
    w = random_weight(1, 64)
    loud = w.clone()
    loud[0, 3] = 40.0
    scheme = QuantScheme(4, 16)
    calm, spoiled = rtn(w, None, scheme).dequantize(), rtn(loud, None, scheme).dequantize()
    assert torch.equal(calm[:, 16:], spoiled[:, 16:])
    assert not torch.equal(calm[:, :16], spoiled[:, :16])


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_group_as_wide_as_the_row_equals_per_channel(symmetric):
    w = random_weight(5, 48)
    grouped, channel = (rtn(w, None, QuantScheme(4, size, symmetric)) for size in (48, None))
    assert channel.scale.shape == (5, 1)
    assert torch.equal(grouped.dequantize(), channel.dequantize())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(2.0, 3.0), (-3.0, -2.0), (-1.0, 5.0), (0.0, 1.0)])
def test_an_asymmetric_range_always_holds_zero(bits, low, high):
    grid = range_grid(torch.tensor([[low]]), torch.tensor([[high]]), QuantScheme(bits, None, symmetric=False))
    assert grid.round(torch.zeros(1, 1, 1)).item() == 0
    for edge in (low, high):
        # One step for the rounded zero point, one for the clamp that the rounded scale may cause.
        assert grid.round(torch.full((1, 1, 1), edge)).item() == pytest.approx(edge, abs=grid.scale.item())


def test_an_asymmetric_grid_spends_no_codes_on_a_sign_that_does_not_occur():
    w = torch.linspace(0, 1, 16)[None]
    asymmetric, symmetric = (rtn(w, None, QuantScheme(4, None, s)).dequantize() for s in (False, True))
    assert (asymmetric - w).abs().max() < 0.2 * (symmetric - w).abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_stored_scale_is_a_value_of_its_storage_type(dtype):
    scale = torch.rand(50) * 1e-2
    kept = stored(scale, QuantScheme(scale_dtype=dtype))
    assert torch.equal(kept.to(getattr(torch, dtype)).float(), kept)
    assert torch.allclose(kept, scale, rtol=2**-8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_too_small_for_its_storage_type_is_the_smallest_there_is(symmetric):
    scheme = QuantScheme(4, None, symmetric, scale_dtype="float16")
    result = rtn(torch.full((1, 8), 1e-12), None, scheme)
    assert torch.all(result.scale == 2**-24) and torch.all(result.dequantize() == 0)
    assert torch.all(rtn(torch.zeros(1, 8), None, scheme).scale == 1)
    w = torch.linspace(-1, 1, 16)[None] * 2e-7  # a scale of 3e-8 is rounded to zero or to 6e-8
    assert (rtn(w, None, scheme).dequantize() - w).norm() < 0.2 * w.norm()


def test_units_too_small_for_float16_are_the_smallest_there_is():
    w = torch.randn(2, 256) * 5e-6
    scheme = QuantScheme(4, 32, symmetric=False, scales="two-level")
    assert (rtn(w, None, scheme).dequantize() - w).norm() < 0.12 * w.norm()


def test_bits_per_weight_counts_codes_scales_and_zero_points():
    w = random_weight(4, 128)
    assert rtn(w, None, QuantScheme(4, 32)).bits_per_weight == 4 + 16 / 32
    assert rtn(w, None, QuantScheme(3, 64, symmetric=False)).bits_per_weight == 3 + (16 + 3) / 64
    assert rtn(w, None, QuantScheme(8, None)).bits_per_weight == 8 + 16 / 128


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_a_quant_tensor_are_the_rows_of_its_weight(symmetric):
    result = rtn(random_weight(10, 32), None, QuantScheme(4, 16, symmetric))
    part = result.rows(3, 7)
    assert part.shape == (4, 32)
    assert torch.equal(part.dequantize(), result.dequantize()[3:7])


def test_a_quant_tensor_cannot_be_changed():
    result = rtn(random_weight(2, 16), None, QuantScheme(4, 16))
    with pytest.raises(FrozenInstanceError):
        result.codes = None


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_takes_the_better_places_of_another(symmetric):
    scheme = QuantScheme(4, 16, symmetric)
    first, second = minmax_grid(random_weight(3, 32), scheme), minmax_grid(random_weight(3, 32, seed=2), scheme)
    better = torch.tensor([[True, False], [False, False], [True, True]])
    mixed = first.where(better, second)
    assert torch.equal(mixed.scale, torch.where(better, second.scale, first.scale))
    if not symmetric:
        assert torch.equal(mixed.zero_point, torch.where(better, second.zero_point, first.zero_point))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_per_column_repeats_the_values_of_each_group(symmetric):
    grid = minmax_grid(random_weight(3, 32), QuantScheme(4, 8, symmetric))
    scale, zero_point = grid.per_column(32)
    assert torch.equal(scale, grid.scale[:, torch.arange(32) // 8])
    assert symmetric == (zero_point is None)
    if not symmetric:
        assert torch.equal(zero_point, grid.zero_point[:, torch.arange(32) // 8])


def test_a_negative_scale_mirrors_the_grid():
    scheme = QuantScheme(3, None)
    w = random_weight(2, 16).view(2, 1, 16)
    grid = minmax_grid(w.view(2, 16), scheme)
    mirrored = replace(grid, scale=-grid.scale)
    assert torch.equal(mirrored.round(-w), -grid.round(w))


@pytest.mark.parametrize("scheme", PLAIN, ids=str)
def test_a_scheme_knows_its_codes_and_groups(scheme):
    count = scheme.code_max - scheme.code_min + 1
    assert count == 1 << scheme.bits
    assert scheme.code_min == (-(count // 2) if scheme.symmetric else 0)
    assert scheme.groups(64) * scheme.columns_per_group(64) == 64
    assert str(scheme.bits) in str(scheme)
