"""The inverse Cholesky factor is what GPTQ needs of a hessian, and says so when there is none."""

from __future__ import annotations

import pytest
import torch
from reference.gptq import damped
from reference.statistics import correlated_inputs, statistics_of

from outlierq.core.errors import NumbersError
from outlierq.ops.solve import DAMPING_LADDER, inverse_cholesky


def with_eigenvalues(values: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues, float32."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0)))[0]
    return ((basis.double() * values.double()) @ basis.double().T).float()


def test_the_factor_is_upper_and_its_square_is_the_damped_inverse():
    hessian = statistics_of(correlated_inputs(512, 96)).hessian
    upper, level = inverse_cholesky(hessian, 0.01)
    assert level == 0.01
    assert torch.equal(upper, upper.triu())
    product = upper.double().T @ upper.double() @ damped(hessian, 0.01)
    assert torch.allclose(product, torch.eye(96, dtype=torch.float64), atol=1e-2)


def test_a_singular_hessian_is_damped():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    upper, level = inverse_cholesky(statistics_of(x).hessian, 0.01)
    assert level == 0.01
    assert upper.isfinite().all()


def test_a_channel_without_any_input_does_not_stop_the_factor():
    hessian = statistics_of(correlated_inputs(256, 32)).hessian
    hessian[5], hessian[:, 5] = 0, 0
    upper, _ = inverse_cholesky(hessian, 0.01)
    assert upper.isfinite().all()


def test_an_indefinite_hessian_gets_the_first_damping_that_makes_it_definite():
    values = torch.ones(40)
    values[0] = -0.03
    upper, level = inverse_cholesky(with_eigenvalues(values), 0.01)
    # The ladder holds 0.01, 0.02 and 0.05 of the mean: only the last exceeds 0.03.
    assert level == pytest.approx(0.05)
    assert upper.isfinite().all()


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
        inverse_cholesky(hessian, 0.01)
    assert raised.value.hint


def test_the_hessian_is_not_written_to():
    hessian = statistics_of(correlated_inputs(64, 16)).hessian
    before = hessian.clone()
    inverse_cholesky(hessian, 0.01)
    assert torch.equal(hessian, before)
