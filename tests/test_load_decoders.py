"""The decoder agrees with a bit-by-bit reading of the layout, and with the compressed-tensors package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from libraries import PACKED_BITS

from outlierq.core.errors import SourceError
from outlierq.load import decode_codes, decode_pack_quantized
from outlierq.load.packed.codes.bits import decode_zero_points

BITS = range(2, 9)


def packed_bit_by_bit(codes: np.ndarray, bits: int) -> np.ndarray:
    """The slow, clear packer: one Python integer a row, code i at bit i * bits, cut into 32-bit words."""
    words = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << (i * bits) for i, code in enumerate(row)) for row in codes]
    raw = b"".join(row.to_bytes(4 * words, "little") for row in rows)
    return np.frombuffer(raw, "<i4").reshape(len(codes), words)


def random_codes(bits: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(bits * rows + columns).integers(0, 1 << bits, (rows, columns))


@pytest.mark.parametrize("columns", [1, 7, 8, 32, 33, 100, 576])
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_every_width_are_read_where_they_lie(bits, columns):
    codes = random_codes(bits, 5, columns)
    packed = packed_bit_by_bit(codes, bits)
    unsigned = decode_codes(packed, (5, columns), bits, symmetric=False)
    assert np.array_equal(unsigned, codes)
    assert unsigned.dtype == np.int16
    assert np.array_equal(decode_codes(torch.from_numpy(packed.copy()), (5, columns), bits), codes - (1 << (bits - 1)))


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_packed_along_the_rows(bits, rows):
    zero = random_codes(bits, rows, 3)
    packed = np.ascontiguousarray(packed_bit_by_bit(zero.T, bits).T)
    assert np.array_equal(decode_zero_points(packed, (rows, 48), bits, 3), zero)


def test_a_weight_is_code_minus_zero_point_times_the_scale_of_its_group():
    codes, zero = random_codes(3, 4, 12), random_codes(3, 4, 3)
    scale = torch.rand(4, 3).bfloat16()
    packed_zero = np.ascontiguousarray(packed_bit_by_bit(zero.T, 3).T)
    found = decode_pack_quantized(packed_bit_by_bit(codes, 3), scale, packed_zero, (4, 12), 3)
    expected = np.empty((4, 12), np.float32)
    for row in range(4):
        for column in range(12):
            group = column // 4
            expected[row, column] = float(scale[row, group]) * (codes[row, column] - zero[row, group])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("scale", [np.full((6, 1), 0.5), np.array([0.5])])
def test_scales_may_be_one_per_row_or_a_single_one(scale):
    codes = random_codes(4, 6, 10)
    found = decode_pack_quantized(packed_bit_by_bit(codes, 4), scale, None, (6, 10), 4)
    assert np.array_equal(found, (codes - 8) * np.float32(0.5))


def test_a_narrower_last_group_and_an_activation_order_are_followed():
    codes, scale = random_codes(4, 2, 10), np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
    packed = packed_bit_by_bit(codes, 4)
    ragged = decode_pack_quantized(packed, scale, None, (2, 10), 4, group_size=4)
    assert np.array_equal(ragged, (codes - 8) * scale[:, np.arange(10) // 4])
    order = np.array([2, 0, 1, 1, 0, 2, 2, 0, 1, 0], np.int32)
    ordered = decode_pack_quantized(packed, scale, None, (2, 10), 4, group_index=order)
    assert np.array_equal(ordered, (codes - 8) * scale[:, order])


def test_rows_decoded_in_runs_equal_rows_decoded_at_once(monkeypatch):
    codes, scale = random_codes(5, 11, 64), np.random.default_rng(0).random((11, 4), np.float32)
    packed = packed_bit_by_bit(codes, 5)
    whole = decode_pack_quantized(packed, scale, None, (11, 64), 5)
    monkeypatch.setattr("outlierq.load.packed.codes.bits.VALUES_PER_RUN", 200)
    assert np.array_equal(decode_pack_quantized(packed, scale, None, (11, 64), 5), whole)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_what_compressed_tensors_packs_is_decoded_to_the_same_numbers(bits, group_size, symmetric):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns = 40, 96
    groups = columns // group_size if group_size else 1
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    torch.manual_seed(bits)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    zero = torch.randint(low, high + 1, (rows, groups), dtype=torch.int8)
    scale = torch.rand(rows, groups).bfloat16()
    found = decode_pack_quantized(
        pack_to_int32(codes, bits),
        scale,
        None if symmetric else pack_to_int32(zero, bits, packed_dim=0),
        (rows, columns),
        bits,
    )
    spread = torch.repeat_interleave(torch.arange(groups), columns // groups)
    shifted = codes.float() if symmetric else codes.float() - zero.float()[:, spread]
    assert np.array_equal(found, (shifted * scale.float()[:, spread]).numpy())


@pytest.mark.parametrize(
    ("packed", "shape", "bits", "fault"),
    [
        (np.zeros((4, 2), np.int32), (4, 8), 4, r"need int32 words \[4, 1\], found int32 \[4, 2\]"),
        (np.zeros((4, 1), np.int64), (4, 8), 4, "found int64"),
        (np.zeros((4, 1), np.int32), (4, 8), 1, "weights of 1 bits cannot be decoded"),
        (np.zeros((4, 1), np.int32), (4, 8), 9, "weights of 9 bits cannot be decoded"),
    ],
)
def test_words_that_do_not_fit_the_shape_are_refused(packed, shape, bits, fault):
    with pytest.raises(SourceError, match=fault):
        decode_codes(packed, shape, bits)


def test_groups_that_do_not_fit_the_columns_are_refused():
    with pytest.raises(SourceError, match="3 groups of 4 columns do not divide 8 columns"):
        decode_pack_quantized(np.zeros((2, 1), np.int32), np.ones((2, 3)), None, (2, 8), 4, group_size=4)
