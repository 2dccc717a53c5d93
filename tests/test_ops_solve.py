"""The factor of a hessian is what GPTQ walks along; where there is none, that is said."""

from __future__ import annotations

import pytest
import torch
from reference.gptq import damped
from reference.statistics import correlated_inputs, statistics_of

from outlierq.core.errors import NumbersError
from outlierq.ops import solve
from outlierq.ops.solve import DAMPING_LADDER, factored


def with_eigenvalues(values: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues, float32."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0)))[0]
    return ((basis.double() * values.double()) @ basis.double().T).float()


def root(hessian: torch.Tensor, damp: float, order: torch.Tensor | None = None) -> torch.Tensor:
    """R, float64, with the zeros below its diagonal that are not stored."""
    return factored(hessian, damp, order).upper.triu().double()


@pytest.mark.parametrize("width", [1, 7, 96, 128, 300])
def test_the_factor_is_upper_and_its_square_is_the_damped_hessian_in_that_order(width):
    hessian = statistics_of(correlated_inputs(512, width, outliers=1)).hessian
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    found = factored(hessian, 0.01, order)
    assert found.level == 0.01
    for block in found.blocks(solve.BLOCK):
        assert torch.equal(found.upper[block, block], found.upper[block, block].triu())
    upper, expected = root(hessian, 0.01, order), damped(hessian, 0.01)[order][:, order]
    assert torch.allclose(upper @ upper.T, expected, rtol=1e-5, atol=1e-5 * expected.diagonal().mean().item())


def test_the_factor_is_the_inverse_of_the_one_that_the_paper_uses():
    hessian = statistics_of(correlated_inputs(512, 96)).hessian
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped(hessian, 0.01)), upper=True)
    assert torch.allclose(root(hessian, 0.01) @ inverse, torch.eye(96, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads, monkeypatch):
    monkeypatch.setattr(solve, "ROWS", 64)
    hessian = statistics_of(correlated_inputs(512, 300)).hessian
    alone = root(hessian, 0.01)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(root(hessian, 0.01), alone)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_singular_hessian_is_damped():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found = factored(statistics_of(x).hessian, 0.01)
    assert found.level == 0.01
    assert found.upper.triu().isfinite().all()


def test_a_channel_without_any_input_does_not_stop_the_factor():
    hessian = statistics_of(correlated_inputs(256, 32)).hessian
    hessian[5], hessian[:, 5] = 0, 0
    assert root(hessian, 0.01).isfinite().all()


def test_an_indefinite_hessian_gets_the_first_damping_that_makes_it_definite():
    values = torch.ones(40)
    values[0] = -0.03
    found = factored(with_eigenvalues(values), 0.01)
    # The ladder holds 0.01, 0.02 and 0.05 of the mean: only the last exceeds 0.03.
    assert found.level == pytest.approx(0.05)
    assert found.damping == pytest.approx(0.05 * values.mean().item(), rel=1e-4)
    assert found.upper.triu().isfinite().all()


def test_the_ladder_starts_at_the_asked_damping_and_rises():
    assert DAMPING_LADDER[0] == 1
    assert list(DAMPING_LADDER) == sorted(DAMPING_LADDER)


@pytest.mark.parametrize(
    "hessian",
    [-torch.eye(6), torch.zeros(6, 6), torch.full((6, 6), float("nan")), torch.eye(6) * float("inf")],
    ids=["negative", "zero", "nan", "inf"],
)
def test_a_hopeless_hessian_is_refused_with_numbers_and_a_hint(hessian):
    with pytest.raises(NumbersError, match=r"\[6, 6\] is not positive definite, even with damping 0\.5") as raised:
        factored(hessian, 0.01)
    assert raised.value.hint


def test_the_hessian_is_not_written_to():
    hessian = statistics_of(correlated_inputs(64, 16)).hessian
    before = hessian.clone()
    factored(hessian, 0.01)
    assert torch.equal(hessian, before)


def test_a_factor_is_worked_out_once_for_all_parts_of_the_rows_and_so_is_that_there_is_none(monkeypatch):
    asked = []
    monkeypatch.setattr(solve, "_climb", lambda *given, real=solve._climb: (asked.append(1), real(*given))[1])
    hessian, hopeless = torch.eye(6), -torch.eye(6)
    with solve.sharing_factors():
        assert factored(hessian, 0.01) is factored(hessian, 0.01)
        for _ in range(2):
            with pytest.raises(NumbersError, match="not positive definite"):
                factored(hopeless, 0.01)
    assert len(asked) == 2


@pytest.mark.parametrize("ordered", [True, False])
def test_a_sweep_of_given_rounding_errors_adds_its_pivots_times_their_squares_to_the_output_error(ordered):
    hessian = statistics_of(correlated_inputs(512, 96)).hessian
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)) if ordered else None
    factor = factored(hessian, 0.01, order)
    errors = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    change, pivots = factor.swept(errors), factor.pivots()
    assert change.shape == errors.shape and pivots.shape == (96,)
    output = ((change.double() @ damped(hessian, 0.01)) * change).sum(1)
    assert torch.allclose(output, (errors.square() @ pivots).double(), rtol=1e-3)
    first = factor.order[0]
    assert torch.allclose(change[:, first], errors[:, first], rtol=1e-4), "nothing was there to shift it"
