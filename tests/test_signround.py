"""Learned rounding starts from GPTQ and keeps, of every row, what errs less on tokens that it did not learn from."""

from __future__ import annotations

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, statistics_of

from outlierq.core.notes import collecting
from outlierq.core.scheme import QuantScheme
from outlierq.ops.held_out import without_rows
from outlierq.quantize.gptq import gptq
from outlierq.quantize.signround import learned_codes, signround

WIDTH = 128
SCHEME = QuantScheme(3, 32)


@pytest.fixture(scope="module")
def stats():
    return statistics_of(correlated_inputs(512, WIDTH))


def held_out_errors(w, made, stats) -> torch.Tensor:
    return (stats.rows.float() @ (made.dequantize() - w).T).square().sum(0)


@pytest.mark.parametrize("step_size", ["sign", "adam"])
@pytest.mark.parametrize("tune", ["codes", "codes and scales"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_row_is_worse_on_tokens_held_out_and_some_are_better(step_size, tune, symmetric, stats):
    w, scheme = random_weight(64, WIDTH), QuantScheme(3, 32, symmetric)
    plain = gptq(w, stats, scheme, refine_passes=0)
    made = signround(w, stats, scheme, refine_passes=0, step_size=step_size, tune=tune)
    before, after = (held_out_errors(w, each, stats) for each in (plain, made))
    assert (after <= before * 1.0001).all() and after.sum() < before.sum()


def test_without_steps_it_is_gptq_and_learning_never_raises_the_error_it_learns_from(stats):
    w = random_weight(64, WIDTH)
    plain = gptq(w, stats, SCHEME)
    assert torch.equal(signround(w, stats, SCHEME, steps=0).codes, plain.codes)
    from outlierq.ops.grid import Grid

    grid = Grid(plain.scale.float(), None, SCHEME)
    errors = []
    for steps in (1, 20, 200):
        codes = learned_codes(w, plain.codes.float(), grid, stats.hessian, steps, adam=True)
        change = codes * grid.per_column(WIDTH)[0] - w
        errors.append(((change @ stats.hessian) * change).sum(1))
    change = plain.dequantize() - w
    start = ((change @ stats.hessian) * change).sum(1)
    assert all((error <= start * 1.0001).all() for error in errors) and errors[-1].sum() < start.sum()


def test_kept_tokens_are_taken_out_of_the_hessian_and_few_tokens_are_said():
    x = correlated_inputs(512, WIDTH).bfloat16().float()
    hessian, rows = without_rows(statistics_of(x))
    assert torch.allclose(hessian, x[32:].T @ x[32:] / 480, rtol=1e-3, atol=1e-2)
    assert torch.equal(rows, x[:32])
    with collecting() as notes:
        without_rows(statistics_of(x[:64]))
    assert "too few to hold 32 of them out" in notes[0]


def test_numbers_that_are_no_plain_integers_are_rounded_as_by_gptq(stats):
    w, scheme = random_weight(16, WIDTH), QuantScheme(4, 16, kind="float", scales="two-level")
    with collecting() as notes:
        made = signround(w, stats, scheme)
    assert torch.equal(made.codes.float(), gptq(w, stats, scheme).codes.float()) and "integers" in notes[0]
