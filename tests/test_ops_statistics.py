"""`InputStats` is additive over data and closed under scaling: what methods may take for granted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.statistics import correlated_inputs, statistics_of

from outlierq.core.errors import StatsError
from outlierq.core.stats import THRESHOLDED, InputStats

LENGTH = 16


def close(found: InputStats, expected: InputStats, *, without: tuple[str, ...] = ()) -> None:
    assert (found.tokens, found.sequences) == (expected.tokens, expected.sequences)
    assert found.tensors().keys() - set(without) == expected.tensors().keys() - set(without)
    for name, value in expected.tensors().items():
        if name not in without:
            scale = value.double().abs().max().item()
            mine = found.tensors()[name]
            assert mine.dtype == value.dtype, name
            assert torch.allclose(mine.double(), value.double(), rtol=1e-4, atol=1e-6 * scale), name


@pytest.fixture
def x() -> torch.Tensor:
    return correlated_inputs(4 * LENGTH, 8)


def test_statistics_of_two_halves_merge_to_those_of_the_whole(x):
    halves = [statistics_of(part, sequence_length=LENGTH) for part in x.split(LENGTH)]
    merged = halves[0].merge(halves[1]).merge(halves[2]).merge(halves[3])
    close(merged, statistics_of(x, sequence_length=LENGTH), without=("rows",))
    assert torch.equal(merged.rows, x.bfloat16())


def test_merging_is_associative(x):
    a, b, c = (statistics_of(part, sequence_length=LENGTH) for part in x.split([LENGTH, 2 * LENGTH, LENGTH]))
    close(a.merge(b).merge(c), a.merge(b.merge(c)))


def test_halves_of_unequal_length_are_weighed_by_their_tokens(x):
    a, b = statistics_of(x[:LENGTH]), statistics_of(x[LENGTH:])
    expected = (x.double().T @ x.double() / len(x)).float()
    assert torch.allclose(a.merge(b).hessian, expected, rtol=1e-4, atol=1e-4)


def test_merging_does_not_write_to_either_side(x):
    a, b = (statistics_of(part) for part in x.split(2 * LENGTH))
    before = {name: value.clone() for name, value in a.tensors().items()}
    a.merge(b)
    assert all(torch.equal(before[name], value) for name, value in a.tensors().items())


def test_merging_with_statistics_that_lack_a_field_names_it(x):
    with pytest.raises(StatsError, match="`hessian`"):
        statistics_of(x).merge(replace(statistics_of(x), hessian=None))


def test_scaled_statistics_are_those_of_the_scaled_data(x):
    scale = torch.rand(8, generator=torch.Generator().manual_seed(5)) * 3 + 0.2
    found = statistics_of(x, sequence_length=LENGTH).scaled(scale)
    counts = THRESHOLDED
    expected = statistics_of(x / scale, sequence_length=LENGTH)
    close(found, expected, without=(*counts, "rows"))
    assert torch.allclose(found.rows.float(), expected.rows.float(), rtol=2**-7)
    assert all(getattr(found, name) is None for name in counts)


def test_scaling_twice_is_scaling_by_the_product(x):
    stats = statistics_of(x)
    a, b = torch.rand(8) + 0.5, torch.rand(8) + 0.5
    close(stats.scaled(a).scaled(b), stats.scaled(a * b), without=("rows",))


def test_derived_figures_are_per_token(x):
    stats = statistics_of(x)
    assert stats.channels == 8
    assert torch.allclose(stats.mean, x.mean(0), atol=1e-5)
    assert torch.allclose(stats.abs_mean, x.abs().mean(0), rtol=1e-5)
    assert torch.equal(stats.abs_max, x.abs().amax(0))


def test_a_statistic_that_was_not_kept_is_named():
    with pytest.raises(StatsError, match="do not hold `abs_mean`") as raised:
        InputStats(tokens=1, sequences=1).need("abs_mean")
    assert "outlierq calibrate" in raised.value.hint
