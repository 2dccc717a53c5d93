"""Output errors from the hessian are those of the tokens it was made of; products keep their precision settings."""

from __future__ import annotations

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, statistics_of

from outlierq.ops.errors import RelativeErrors, diagonal_blocks, output_error
from outlierq.ops.precision import matmul_operands


def test_the_output_error_is_the_mean_over_tokens_of_the_squared_change():
    x = correlated_inputs(200, 32)
    change = random_weight(7, 32)
    found = output_error(change, statistics_of(x).hessian).item()
    expected = (x.double() @ change.double().T).square().sum(1).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_relative_errors_are_those_of_all_rows_whatever_pieces_they_come_in():
    x = correlated_inputs(200, 32)
    hessian, w = statistics_of(x).hessian, random_weight(7, 32)
    change = random_weight(7, 32) * 0.1
    found = RelativeErrors()
    for rows in (slice(0, 3), slice(3, 7)):
        found.add(w[rows], w[rows] + change[rows], hessian)
    power, lost = (((x.double() @ each.double().T) ** 2).sum().item() for each in (w, change))
    assert found.output == pytest.approx(lost / power, rel=1e-4)
    assert found.weight == pytest.approx((change.norm() / w.norm()).item(), rel=1e-5)


def test_without_a_hessian_the_output_error_is_not_known():
    found = RelativeErrors()
    found.add(torch.ones(2, 4), torch.full((2, 4), 1.1), None)
    assert found.output is None and found.weight == pytest.approx(0.1, rel=1e-5)


def test_an_all_zero_weight_has_no_relative_error():
    found = RelativeErrors()
    found.add(torch.zeros(3, 8), torch.zeros(3, 8), torch.eye(8))
    assert (found.output, found.weight) == (0, 0)


def test_diagonal_blocks_are_cut_along_the_diagonal():
    hessian = torch.arange(64.0).view(8, 8)
    blocks = diagonal_blocks(hessian, 4)
    assert torch.equal(blocks[0], hessian[:4, :4])
    assert torch.equal(blocks[1], hessian[4:, 4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_precision_of_products_is_restored_even_after_an_error(dtype):
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(KeyError), matmul_operands(dtype):
        raise KeyError
    assert (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


def test_full_precision_means_full_precision():
    a, b = random_weight(64, 256), random_weight(256, 64, seed=2)
    with matmul_operands(torch.float32):
        found = a @ b
    assert torch.allclose(found.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-6)
