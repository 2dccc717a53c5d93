"""The power of the outputs of a wide weight, from some of its rows, is within a hundredth of the exact one."""

from __future__ import annotations

import pytest
import torch

from outlierq.ops.search import power
from outlierq.ops.search.power import OutputPower, output_power
from outlierq.ops.solve import factored

WIDTH, ROWS = 384, 1024


def hessian(offset: float, outliers: int) -> torch.Tensor:
    """Of 600 inputs with a mean that is not zero, some large channels, and as many correlated ones as not."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(600, WIDTH, generator=random) @ torch.randn(WIDTH, WIDTH, generator=random).mul_(0.05)
    x += offset * torch.randn(WIDTH, generator=random)
    x[:, :outliers] *= 30
    return x.T @ x / len(x)


@pytest.mark.parametrize(("offset", "outliers"), [(0.0, 0), (3.0, 0), (0.0, 3), (3.0, 3)])
def test_some_rows_tell_the_power_of_all(offset, outliers, monkeypatch):
    monkeypatch.setattr(power, "WIDE_WEIGHT", WIDTH)
    h, random = hessian(offset, outliers), torch.Generator().manual_seed(2)
    w = torch.randn(WIDTH, ROWS, generator=random) * torch.rand(ROWS, generator=random)
    w += 0.1 * torch.linalg.eigh(h).eigenvectors[:, -40:-39]  # trained weights look at their inputs
    factor = factored(h, 0.01, torch.randperm(WIDTH, generator=random))
    found = OutputPower(h, factor).of(w[factor.order])
    exact = output_power(w[factor.order], factor)
    assert torch.allclose(exact, ((w.T @ h) * w.T).sum(1).double(), rtol=1e-3)
    assert found.sum().item() == pytest.approx(exact.sum().item(), rel=0.01)


def test_narrow_weights_and_rows_without_power_are_exact(monkeypatch):
    h, w = hessian(0.0, 0), torch.zeros(WIDTH, 16)
    w[:, 1] = 1.0
    factor = factored(h, 0.01, torch.arange(WIDTH))
    exact = output_power(w, factor)
    assert torch.equal(OutputPower(h, factor).of(w), exact), "narrow"
    monkeypatch.setattr(power, "WIDE_WEIGHT", WIDTH)
    assert torch.allclose(OutputPower(h, factor).of(w), exact), "no sampled row has power"
