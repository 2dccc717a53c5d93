"""Grids of E4M3 floats, per channel and in two-dimensional blocks: against a table of all values and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.load.packed.codes.byte_codes import decode_float_quantized, decode_int_quantized
from outlierq.load.packed.codes.numbers import e4m3_values
from outlierq.ops.grid import from_groups, in_groups, minmax_grid, nearest_code, to_quant_tensor
from outlierq.ops.search.scale_search import search_grid
from outlierq.registry import method

CHANNEL = QuantScheme(8, None, kind="float")
BLOCKS = QuantScheme(8, None, kind="float", block=(32, 48))
METHODS = [
    ("rtn", {}),
    ("rtn", {"scale_search": "mse"}),
    ("rtn", {"scale_search": "hessian"}),
    ("gptq", {"scale_search": "minmax", "refine_passes": 0}),
    ("gptq", {}),
]


def weights(rows: int = 70, columns: int = 100, seed: int = 0) -> torch.Tensor:
    """Columns and rows of unlike size, and some useless extremes."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=rng) * torch.rand(1, columns, generator=rng) * 3
    w[::7, ::11] *= 12
    return w


def stats(columns: int = 100, seed: int = 1) -> InputStats:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(400, columns, generator=rng) @ torch.randn(columns, columns, generator=rng) / columns**0.5
    return InputStats(tokens=400, sequences=4, hessian=x.T @ x / 400)


def output_error(w: torch.Tensor, found: QuantTensor, hessian: torch.Tensor) -> float:
    change = found.dequantize() - w
    return ((change @ hessian) * change).sum().item()


def finite_values() -> np.ndarray:
    """Every finite E4M3 number, ascending, written out by the definition of the format."""
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return np.array(sorted({*positive, *(-v for v in positive)}))


def test_there_are_253_finite_values_up_to_448():
    values = finite_values()
    assert len(values) == 253 and values[-1] == 448 and values[values > 0][0] == 2.0**-9
    decoded = e4m3_values()
    assert sorted({float(v) for v in decoded if np.isfinite(v)}) == values.tolist()
    assert np.isnan(decoded[[0x7F, 0xFF]]).all() and np.isfinite(decoded).sum() == 254


def test_bytes_decode_as_torch_reads_them():
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3_values(), theirs)


def test_a_code_is_the_nearest_value_and_saturates():
    values = finite_values()
    x = torch.cat([torch.linspace(-470, 470, 4001), torch.linspace(-0.04, 0.04, 4001), torch.tensor([1e9, -1e9])])
    codes = nearest_code(x.clone(), None, CHANNEL).numpy()
    assert np.isin(codes, values).all()
    distance = np.abs(codes - x.numpy())
    nearest = np.abs(values[None] - x.numpy()[:, None]).min(1)
    np.testing.assert_allclose(distance, nearest, rtol=1e-6)
    assert codes[-2:].tolist() == [448, -448]


def test_values_on_the_grid_stay_what_they_are():
    values = torch.tensor(finite_values(), dtype=torch.float32)
    assert torch.equal(nearest_code(values.clone(), None, CHANNEL), values)


@pytest.mark.parametrize("scheme", [CHANNEL, BLOCKS])
def test_scales_are_the_largest_weight_over_448(scheme):
    w = weights()
    quantized = method("quantize", "rtn").function(w, None, scheme)
    height, width = scheme.block or (1, w.shape[1])
    assert quantized.scale.shape == scheme.scale_shape(*w.shape)
    for i in range(quantized.scale.shape[0]):
        for j in range(quantized.scale.shape[1]):
            part = w[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert quantized.scale[i, j] == (part.abs().max() / 448).bfloat16()
    assert quantized.codes.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("scheme", [CHANNEL, BLOCKS], ids=["channel", "ragged blocks"])
def test_every_method_rounds_within_half_a_step(name, options, scheme):
    w, seen = weights(), stats()
    quantized = method("quantize", name).function(w.clone(), seen, scheme, **options)
    values = quantized.codes.float()
    assert np.isin(values.numpy(), finite_values()).all()
    assert quantized.dequantize().isfinite().all()
    plain = method("quantize", "rtn").function(w, None, scheme)
    if options.get("scale_search") == "mse":
        wrong = (quantized.dequantize() - w).square().sum() / (plain.dequantize() - w).square().sum()
        assert wrong <= 1
    else:
        assert output_error(w, quantized, seen.hessian) <= output_error(w, plain, seen.hessian) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_rows_of_a_block_share_their_scale_whatever_the_search(name):
    w, seen = weights(), stats()
    grid = search_grid(w, BLOCKS, seen.hessian)
    assert grid.scale.shape == (70, 3)
    for start in (0, 32, 64):
        assert torch.equal(grid.scale[start : start + 32], grid.scale[start].expand_as(grid.scale[start : start + 32]))
    assert method("quantize", name).function(w, seen, BLOCKS).scale.shape == (3, 3)


def test_ragged_groups_come_back_from_their_blocks():
    w = weights()
    grouped = in_groups(w, BLOCKS)
    assert grouped.shape == (70, 3, 48) and torch.equal(from_groups(grouped, 100), w)


def test_a_block_of_zeros_has_scale_one_and_codes_zero():
    w = torch.zeros(64, 96)
    w[:32, :48] = 1.0
    grid = minmax_grid(w, BLOCKS)
    quantized = to_quant_tensor(from_groups(grid.encode(in_groups(w, BLOCKS)), 96), grid)
    assert quantized.scale[1].tolist() == [1.0, 1.0] and not quantized.codes.float()[32:].any()
    assert (quantized.dequantize() - w).abs().max() < 0.01  # the scale is rounded to bfloat16


@pytest.mark.parametrize(("name", "options"), METHODS[:-1])  # the last one refits scales, which blocks do not
def test_blocks_of_one_row_are_channels(name, options):
    w, seen = weights(), stats()
    one_row = QuantScheme(8, None, kind="float", block=(1, 100))
    run = method("quantize", name).function
    assert torch.equal(run(w, seen, one_row, **options).dequantize(), run(w, seen, CHANNEL, **options).dequantize())


@pytest.mark.parametrize("scheme", [CHANNEL, BLOCKS])
def test_the_independent_decoder_agrees_with_what_was_meant(scheme):
    quantized = method("quantize", "rtn").function(weights(), None, scheme)
    decoded = decode_float_quantized(quantized.codes, quantized.scale, block=scheme.block)
    np.testing.assert_array_equal(decoded, quantized.dequantize().numpy())
    scales = quantized.scale if scheme.block else quantized.scale[32:]
    part = decode_float_quantized(quantized.codes[32:70], scales, block=scheme.block, first_row=32)
    np.testing.assert_array_equal(part, quantized.dequantize()[32:].numpy())


@pytest.mark.parametrize("scheme", [QuantScheme(8, None), QuantScheme(4, 25)])
def test_plain_integer_bytes_decode_as_meant(scheme):
    quantized = method("quantize", "rtn").function(weights(), None, scheme)
    np.testing.assert_array_equal(
        decode_int_quantized(quantized.codes, quantized.scale), quantized.dequantize().numpy()
    )


def test_damaged_float_weights_are_named():
    codes = torch.zeros(4, 6, dtype=torch.uint8)
    codes[1, 2] = 0x7F
    with pytest.raises(SourceError, match="hold a NaN"):
        decode_float_quantized(codes.view(torch.float8_e4m3fn), torch.ones(4, 1))
    with pytest.raises(SourceError, match=r"scales \[2, 2\] do not fit"):
        decode_float_quantized(torch.zeros(4, 6, dtype=torch.uint8), torch.ones(2, 2), block=(2, 2))
    with pytest.raises(SourceError, match=r"scales \[4, 4\] do not fit"):
        decode_int_quantized(torch.zeros(4, 6, dtype=torch.int8), torch.ones(4, 4))
    with pytest.raises(SourceError, match="matrix of int8"):
        decode_int_quantized(torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 1))
