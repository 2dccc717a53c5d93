"""The compiled pass gives what torch gives, bit for bit; what it does not do is left to torch."""

from __future__ import annotations

import shutil

import pytest
import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.compiled import rounding as native
from outlierq.quantize.rtn import rtn
from outlierq.runtime import cpu

needs_compiler = pytest.mark.skipif(native.library() is None and not shutil.which("gcc"), reason="no compiler for C")


def weights(dtype: torch.dtype, columns: int = 192) -> torch.Tensor:
    """Rows of very different size: zero, constant, positive, tiny, in float16's subnormal range, with ties."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(48, columns, generator=generator) * torch.rand(48, 1, generator=generator).pow(6)
    w[0], w[1], w[2], w[3], w[4] = 0, 0.25, w[2].abs(), w[3] * 1e-7, -w[4].abs()
    w[5] = torch.arange(columns) / 2 - 31.5  # halves of the scale, at 7 bits
    return w.to(dtype)


@needs_compiler
def test_it_was_compiled_where_there_is_a_compiler():
    assert native.library() is not None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_scales_and_zero_points_are_those_of_torch(dtype, scale_dtype, symmetric):
    w = weights(dtype)
    for bits in (2, 3, 4, 7, 8):
        for group_size in (None, 96, 64, 16, 12):
            scheme = QuantScheme(bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
            expected = rtn(w.float(), None, scheme)
            found, squares, lost = native.round_rows(w, scheme)
            for part in ("codes", "scale", "zero_point"):
                one, other = getattr(found, part), getattr(expected, part)
                assert (one is None) == (other is None), (scheme, part)
                assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), (scheme, part)
            power = w.double().square().sum().item()
            change = (expected.dequantize().double() - w.double()).square().sum().item()
            assert squares == pytest.approx(power, rel=1e-5) and lost == pytest.approx(change, rel=1e-5)


@needs_compiler
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_would_be_rounded_to_zero_are_those_of_torch(scale_dtype, symmetric):
    w = torch.linspace(-1, 1, 16)[None] * torch.logspace(-45, -4, 60)[:, None]
    scheme = QuantScheme(4, None, symmetric=symmetric, scale_dtype=scale_dtype)
    expected, (found, _, _) = rtn(w, None, scheme), native.round_rows(w, scheme)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.float().abs() < 1e18].reshape(-1, 2)  # a row each: one is the scale, or the range
    scheme = QuantScheme(8, None, symmetric=False, scale_dtype=str(dtype).removeprefix("torch."))
    expected, (found, _, _) = rtn(finite.float(), None, scheme), native.round_rows(finite, scheme)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero_point, expected.zero_point)


@needs_compiler
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_numbers_that_torch_refuses_are_left_to_torch(wrong):
    w = weights(torch.float32)
    w[40, 100] = wrong
    assert native.round_rows(w, QuantScheme(4, 64, symmetric=True, scale_dtype="float16")) is None


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(8, None, symmetric=True, kind="float"),
        QuantScheme(8, None, symmetric=True, kind="float", block=(16, 16)),
    ],
)
def test_schemes_of_other_kinds_are_left_to_torch(scheme):
    assert native.round_rows(weights(torch.bfloat16), scheme) is None


def test_rows_that_are_not_contiguous_are_left_to_torch():
    assert native.round_rows(weights(torch.bfloat16).T, QuantScheme(8, None, symmetric=True)) is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_tokens_are_those_of_torch(dtype, monkeypatch):
    x = torch.cat([weights(dtype, 100), torch.zeros(4, 100, dtype=dtype)])
    x[48, 3], x[49, 3], x[50, 3], x[51, :] = 1e-44, float("nan"), -float("inf"), torch.arange(100) - 36.5
    x[51, 0] = 127  # scale 1: ties
    codes, scale = native.round_tokens(x)
    monkeypatch.setattr(cpu, "round_tokens", lambda x: None)
    expected, step = cpu.quantize_input(x, None, per_token=True)
    assert torch.equal(codes[:48], expected[:48]) and torch.equal(codes[51], expected[51])
    assert torch.equal(scale.nan_to_num(-1), step.nan_to_num(-1))
    assert scale[48] == 1 and scale[49].isnan() and scale[50].isinf() and scale[51] == 1
    assert native.round_tokens(x.T) is None and native.round_tokens(x.double()) is None


@needs_compiler
def test_scaled_rows_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(33, 100, generator=generator) * 10.0 ** torch.randint(-30, 30, (33, 1), generator=generator)
    values[3, 4], values[5, 6], values[7, 8] = float("inf"), -float("inf"), float("nan")
    scale = torch.rand(33, 1, generator=generator)
    found, expected = native.scale_rows(values, scale), (values * scale).bfloat16()
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().sum() == 1
    assert torch.equal(found.nan_to_num(0).view(torch.int16), expected.nan_to_num(0).view(torch.int16))
    for other in (values.double(), values[:, :50]):
        assert native.scale_rows(other, scale) is None
    assert native.scale_rows(values, scale[:1]) is None


def test_without_the_library_the_output_is_the_same_to_the_byte(tiny_llama, tmp_path, monkeypatch):
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(native, "library", lambda: None)
        quantize(make_plan(open_checkpoint(str(tiny_llama)), load("rtn-w4")), tmp_path / name)
    one, other = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("with", "without"))
    assert [path.name for path in one] == [path.name for path in other] and one
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))
