"""Compiled code packs what numpy and torch pack, byte for byte, and what the definition of each format says."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import FP4_MAX, QuantScheme
from outlierq.export import awq, format_type, gptq
from outlierq.export.gguf import blocks as blocks_of_gguf
from outlierq.export.gguf.format import encode_blocks
from outlierq.export.writer import all_finite, as_bytes
from outlierq.load.gguf.superblocks import spread
from outlierq.ops.compiled import packing as native_packing
from outlierq.ops.compiled import rounding as native
from outlierq.ops.compiled import unpacking
from outlierq.ops.packing import e2m1_codes, pack, pack_bytes, pack_down, pack_e2m1
from outlierq.quantize.rtn import rtn

DENSE = format_type("dense")({})
pytestmark = pytest.mark.skipif(native.library() is None and not shutil.which("gcc"), reason="no compiler for C")
BITS = range(2, 9)
# Bits and bytes of a run: those of the types of GGUF.
RUNS = [(1, 1), (1, 32), (2, 1), (2, 4), (2, 32), (4, 1), (4, 8), (4, 16), (4, 32), (4, 64)]
SCALE_DTYPES = ["bfloat16", "float16", "float32"]


def codes_of(bits: int, rows: int, columns: int, *, signed: bool) -> torch.Tensor:
    """Random codes, with rows of only the least, only the largest, and both in turn."""
    generator = torch.Generator().manual_seed(1000 * bits + columns)
    low = -(1 << (bits - 1)) if signed else 0
    high = low + (1 << bits)
    codes = torch.randint(low, high, (rows, columns), generator=generator)
    codes[0], codes[1 % rows] = low, high - 1
    codes[2 % rows, ::2], codes[2 % rows, 1::2] = low, high - 1
    return codes.to(torch.int8 if signed else torch.uint8)


def site_of(rows: int, columns: int) -> LinearSite:
    return LinearSite("layer.linear", "layer.linear.weight", None, rows, columns, 0)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are equal."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and bytes(as_bytes(one)) == bytes(as_bytes(other))


def bits_of(data: torch.Tensor) -> np.ndarray:
    """[rows, bits of a row], those of the first byte first, least significant first."""
    raw = data.contiguous().view(torch.uint8).numpy().reshape(len(data), -1)
    return (raw[:, :, None] >> np.arange(8) & 1).reshape(len(raw), -1)


def without(monkeypatch: pytest.MonkeyPatch, action):
    """What it gives when there is no compiled code."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return action()


def test_it_was_compiled_where_there_is_a_compiler():
    assert native_packing.bit_string(torch.zeros(8, dtype=torch.uint8), 4) is not None


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_packed_as_numpy_does_and_bit_by_bit_as_defined(bits, signed, monkeypatch):
    for rows, columns in (
        (1, 1),
        (3, 7),
        (1, 8),
        (5, 32),
        (4, 33),
        (2, 96),
        (3, 1023),
        (2, 1024),
        (7, 1056),
        (3, 3104),
    ):
        codes = codes_of(bits, rows, columns, signed=signed)
        packed = pack(codes, bits)
        assert same(packed, without(monkeypatch, lambda c=codes: pack(c, bits))), (rows, columns)
        stored = codes.numpy().astype(int) + (1 << (bits - 1) if signed else 0)
        meant = (stored[:, :, None] >> np.arange(bits) & 1).reshape(rows, -1)
        found = bits_of(packed)
        assert np.array_equal(found[:, : meant.shape[1]], meant) and not found[:, meant.shape[1] :].any()


@pytest.mark.parametrize("bits", BITS)
def test_a_string_of_any_number_of_eights_ends_where_it_should(bits, monkeypatch):
    """Runs of 128 eights are worked on together; bytes beyond the last eight must not be touched."""
    for eights in (1, 2, 3, 4, 5, 127, 128, 129, 130, 256, 261):
        codes = np.random.default_rng(eights).integers(0, 256, 8 * eights).astype(np.uint8)
        guarded = np.full(eights * bits + 16, 0xA5, np.uint8)
        native.library().outlierq_pack(codes.ctypes.data, eights, bits, 1 << (bits - 1), False, guarded.ctypes.data)
        masked = codes & np.uint8((1 << bits) - 1)
        expected = without(monkeypatch, lambda c=masked: pack_bytes(c, bits, 1 << (bits - 1)))
        assert np.array_equal(guarded[: eights * bits], expected) and (guarded[eights * bits :] == 0xA5).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_words_down_the_columns_are_those_of_rows_transposed(bits, signed, monkeypatch):
    for rows, columns in ((1, 32), (32, 32), (33, 64), (31, 256), (40, 288), (100, 544), (5, 36)):
        codes = codes_of(bits, rows, columns, signed=signed)
        words = pack_down(codes, bits)
        assert same(words, without(monkeypatch, lambda c=codes: pack(c, bits)).T.contiguous()), (rows, columns)
        assert same(words, without(monkeypatch, lambda c=codes: pack_down(c, bits))), (rows, columns)


@pytest.mark.parametrize("format", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", gptq.WIDTHS)
def test_gptq_is_encoded_to_the_same_bytes(bits, symmetric, format, monkeypatch):
    site = site_of(64, 320)
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(bits))
    quantized = rtn(weight, None, QuantScheme(bits, 64, symmetric, "float16"))
    encode = format_type(format)({}).encode
    found, expected = encode(site, quantized), without(monkeypatch, lambda: encode(site, quantized))
    assert found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(8, 1), (8, 128), (16, 3), (136, 129), (264, 96), (272, 520)])
def test_awq_words_are_those_of_numpy_and_nibble_by_nibble_as_defined(rows, columns, signed, monkeypatch):
    codes = codes_of(4, rows, columns, signed=signed)
    words = awq._words(codes)
    assert same(words, without(monkeypatch, lambda: awq._words(codes)))
    stored = codes.int() + (8 if signed else 0)
    for place, row in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        assert torch.equal(words >> 4 * place & 15, stored[row::8].T)


def test_every_byte_of_e4m3_becomes_the_same_code_of_e2m1(monkeypatch):
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(2, 128)
    found = pack_e2m1(every.view(torch.float8_e4m3fn))
    assert same(found, without(monkeypatch, lambda: pack_e2m1(every.view(torch.float8_e4m3fn))))
    codes = e2m1_codes(every.numpy())
    assert np.array_equal(found.numpy(), codes[:, ::2] | codes[:, 1::2] << np.uint8(4))
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    assert pack_e2m1(numbers.to(torch.float8_e4m3fn)).tolist() == [
        0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE,
    ]  # fmt: skip


GGUF = {
    "Q4_0": QuantScheme(4, 32, True, "float16"),
    "Q4_0 with one scale for 96": QuantScheme(4, 96, True, "float16"),
    "Q4_1": QuantScheme(4, 32, False, "float16"),
    "Q4_1 by row": QuantScheme(4, None, False, "float16"),
    "Q8_0": QuantScheme(8, 64, True, "float16"),
    "MXFP4": QuantScheme(4, 32, True, "float16", kind="float", scales="power-of-two"),
    "Q4_K": QuantScheme(4, 32, False, "float16", scales="two-level"),
}


@pytest.mark.parametrize(("bits", "run"), RUNS)
def test_parts_of_codes_are_packed_and_spread_as_numpy_does(bits, run, monkeypatch):
    codes = np.random.default_rng(run).integers(0, 256, (3, 512), np.uint8)
    blocks = np.random.default_rng(bits).integers(0, 256, (3, 5, 150), np.uint8)[..., 13:141]
    packed, numbers = (
        [blocks_of_gguf._fields(codes, bits, run, shift) for shift in (0, 2, 4)],
        spread(blocks, bits, run),
    )
    monkeypatch.setattr(native_packing, "fields", lambda *_: None)
    monkeypatch.setattr(unpacking, "spread", lambda *_: None)
    for found, shift in zip(packed, (0, 2, 4), strict=True):
        assert np.array_equal(found, blocks_of_gguf._fields(codes, bits, run, shift))
    assert np.array_equal(numbers, spread(blocks, bits, run))
    assert np.array_equal(spread(packed[0].reshape(3, 1, -1), bits, run).reshape(codes.shape), codes & (1 << bits) - 1)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", GGUF)
def test_blocks_of_gguf_are_those_of_numpy(kind, turned, monkeypatch):
    rows, columns, scheme = 10, 768, GGUF[kind]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).pow(8)
    weight[0], weight[1], weight[2] = 0, weight[1].abs(), weight[2] * 1e-6
    quantized, site = rtn(weight, None, scheme), site_of(rows, columns)
    order = torch.randperm(rows, generator=generator) if turned else None
    found = encode_blocks(site, quantized, order)
    assert native_packing.gguf_blocks(kind.partition(" ")[0], quantized, order) is not None
    assert same(found, without(monkeypatch, lambda: encode_blocks(site, quantized, order)))
    part = quantized.rows(3, 8)
    assert same(encode_blocks(site, part), without(monkeypatch, lambda: encode_blocks(site, part)))


def test_minima_of_q4_1_are_rounded_as_torch_does_for_every_scale_and_zero_point():
    halves = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scale = halves[halves.isfinite()][:, None]
    scheme = QuantScheme(4, None, False, "float16")
    for zero in range(0, 256, 5):  # larger than 4 bits: products beyond float16, too
        zero_point = torch.full(scale.shape, zero, dtype=torch.uint8)
        quantized = QuantTensor(torch.zeros(len(scale), 32, dtype=torch.uint8), scale, zero_point, scheme)
        blocks = native_packing.gguf_blocks("Q4_1", quantized, None)
        expected = (-zero_point.float() * scale.float()).to(torch.float16)
        assert same(blocks[:, 2:4].contiguous().view(torch.float16), expected)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dense_weights_are_those_of_torch(symmetric, scale_dtype, monkeypatch):
    for bits in BITS:
        for group_size in (None, 96, 32, 12):
            weight = torch.randn(9, 192, generator=torch.Generator().manual_seed(bits))
            quantized = rtn(weight, None, QuantScheme(bits, group_size, symmetric, scale_dtype))
            assert native_packing.dequantize(quantized) is not None
            found = DENSE.encode(site_of(9, 192), quantized)
            expected = without(monkeypatch, lambda q=quantized: DENSE.encode(site_of(9, 192), q))
            assert same(found["layer.linear.weight"], expected["layer.linear.weight"]), (bits, group_size)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_scale_of_16_bits_times_every_code_is_rounded_as_torch_does(symmetric, scale_dtype):
    """Infinite scales and NaN among them: they are refused later, and must not come out as numbers."""
    dtype = getattr(torch, scale_dtype)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    scale = halves.view(torch.bfloat16 if dtype == torch.float32 else dtype).to(dtype)[:, None]
    every = torch.arange(-128, 128).to(torch.int8) if symmetric else torch.arange(256).to(torch.uint8)
    zero = None if symmetric else (halves.int() * 7 % 256).to(torch.uint8)[:, None]
    quantized = QuantTensor(every.repeat(len(scale), 1), scale, zero, QuantScheme(8, None, symmetric, scale_dtype))
    found, expected = native_packing.dequantize(quantized), quantized.dequantize().to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert same(found.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_that_are_not_finite_are_found_among_all_others(dtype, monkeypatch):
    """Each number alone at the end of 100 others: it counts at every place of a vector, and nothing else does."""
    width = 8 * dtype.itemsize
    every = torch.arange(1 << width, dtype=torch.int32).to(torch.int16 if width == 16 else torch.uint8).view(dtype)
    finite = every.float().isfinite()
    good = every[finite]
    assert all_finite(good) and without(monkeypatch, lambda: all_finite(good))
    for number, expected in zip(every[::7], finite[::7].tolist(), strict=True):
        some = torch.ones(101, dtype=torch.float32).to(dtype)
        some[-1] = number
        assert all_finite(some) == expected


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(4, 16, True, kind="float", scales="two-level"),
        QuantScheme(4, 32, True, kind="float", scales="power-of-two"),
        QuantScheme(8, None, True),
        QuantScheme(3, 64, True),
        QuantScheme(4, 64, False),
    ],
)
def test_compressed_tensors_are_encoded_to_the_same_bytes(scheme, monkeypatch):
    site, weight = site_of(64, 192), torch.randn(64, 192, generator=torch.Generator().manual_seed(1)) * FP4_MAX
    quantized = rtn(weight, None, scheme)
    found = format_type("compressed-tensors")({}).encode(site, quantized)
    expected = without(monkeypatch, lambda: format_type("compressed-tensors")({}).encode(site, quantized))
    assert found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in found)


def test_what_is_not_in_bytes_or_not_contiguous_is_left_to_numpy_and_torch():
    scheme = QuantScheme(4, 32, True, "float16")
    quantized = rtn(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), None, scheme)
    turned = QuantTensor(quantized.codes.T.contiguous().T, quantized.scale, None, scheme)
    wide = QuantTensor(quantized.codes.short(), quantized.scale, None, scheme)
    for other in (turned, wide):
        assert native_packing.gguf_blocks("Q4_0", other, None) is None and native_packing.dequantize(other) is None
        assert same(encode_blocks(site_of(64, 64), other), encode_blocks(site_of(64, 64), quantized))
        found, expected = (DENSE.encode(site_of(64, 64), q)["layer.linear.weight"] for q in (other, quantized))
        assert same(found, expected)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("rtn-w4", ["quantize.symmetric=false"]),
        ("rtn-w4", ["quantize.bits=3", "quantize.group_size=32"]),
        ("rtn-w4", ["export.format=gptq", "quantize.group_size=32"]),
        ("rtn-w4", ["export.format=awq", "quantize.group_size=32", "quantize.symmetric=false"]),
        ("rtn-w4", ["export.format=dense"]),
        ("mxfp4", []),
        ("nvfp4", []),
    ],
)
def test_a_whole_run_writes_the_same_files(recipe, settings, tiny_llama, tmp_path, monkeypatch):
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    def run(name: str) -> dict[str, bytes]:
        quantize(make_plan(open_checkpoint(str(tiny_llama)), load(recipe, settings)), tmp_path / name)
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}

    found = run("with")
    assert found and found == without(monkeypatch, lambda: run("without"))


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(8, None, True, kind="float"),
        QuantScheme(4, 32, True, kind="float", scales="power-of-two"),
        GGUF["Q4_K"],
    ],
)
def test_numbers_of_other_kinds_are_dequantized_by_torch(scheme):
    quantized = rtn(torch.randn(4, 256, generator=torch.Generator().manual_seed(1)), None, scheme)
    assert native_packing.dequantize(quantized) is None
