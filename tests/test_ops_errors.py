"""Output errors from the hessian are those of the tokens it was made of; products keep their precision settings."""

from __future__ import annotations

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, statistics_of

from outlierq.ops.errors import diagonal_blocks, output_error, relative_output_error, relative_weight_error
from outlierq.ops.precision import matmul_operands


def test_the_output_error_is_the_mean_over_tokens_of_the_squared_change():
    x = correlated_inputs(200, 32)
    change = random_weight(7, 32)
    found = output_error(change, statistics_of(x).hessian).item()
    expected = (x.double() @ change.double().T).square().sum(1).mean().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_relative_output_error_divides_by_the_mean_squared_output():
    x = correlated_inputs(200, 32)
    w, approximation = random_weight(7, 32), random_weight(7, 32) * 1.1
    found = relative_output_error(w, approximation, statistics_of(x).hessian)
    assert found == pytest.approx(0.01, rel=1e-3)
    assert relative_weight_error(w, approximation) == pytest.approx(0.01, rel=1e-3)


def test_an_all_zero_weight_has_no_relative_error():
    zero = torch.zeros(3, 8)
    assert relative_output_error(zero, zero, torch.eye(8)) == 0
    assert relative_weight_error(zero, zero) == 0


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
