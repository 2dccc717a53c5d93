"""Packed codes come back from two independent readers: our numpy decoder and the compressed-tensors package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from libraries import PACKED_BITS
from reference.statistics import random_weight

from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.bits import decode_codes, decode_pack_quantized
from outlierq.ops.packing import pack, words_for
from outlierq.quantize.rtn import rtn

BITS = range(2, 9)


def random_codes(bits: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * bits + columns)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("columns", [1, 3, 8, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_of_every_width_come_back(bits, columns):
    codes = random_codes(bits, 5, columns)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, words_for(columns, bits))
    assert np.array_equal(decode_codes(packed, (5, columns), bits, symmetric=False), codes.numpy())


@pytest.mark.parametrize("columns", [1, 7, 32, 45, 96])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_packing_gives_the_words_of_the_compressed_tensors_package(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = random_codes(bits, 6, columns)
    signed = (codes.short() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_zero_points_packed_along_rows_are_the_words_of_the_compressed_tensors_package(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    zero = random_codes(bits, 21, 3)
    signed = (zero.short() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(zero.T.contiguous(), bits).T, pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("bits", BITS)
def test_the_extreme_codes_of_a_width_survive(bits):
    codes = torch.tensor([[0, (1 << bits) - 1] * 17], dtype=torch.uint8)
    assert np.array_equal(decode_codes(pack(codes, bits), (1, 34), bits, symmetric=False), codes.numpy())


@pytest.mark.parametrize("bits", BITS)
def test_unused_bits_at_the_end_of_a_row_are_zero(bits):
    packed = pack(torch.full((1, 5), (1 << bits) - 1, dtype=torch.uint8), bits)
    text = "".join(f"{word & 0xFFFFFFFF:032b}"[::-1] for word in packed[0].tolist())
    assert text == "1" * (5 * bits) + "0" * (len(text) - 5 * bits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_integer_type_of_the_codes_does_not_matter(bits, dtype):
    codes = random_codes(bits, 4, 40)
    assert torch.equal(pack(codes.to(dtype), bits), pack(codes, bits))


@pytest.mark.parametrize("columns", [5, 37, 64])
@pytest.mark.parametrize("bits", BITS)
def test_signed_codes_are_packed_with_their_middle_added(bits, columns):
    codes = random_codes(bits, 4, columns)
    signed = (codes.short() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(signed, bits), pack(codes, bits))


@pytest.mark.parametrize("bits", BITS)
def test_packing_does_not_write_to_the_codes(bits):
    codes = random_codes(bits, 4, 37)
    before = codes.clone()
    pack(codes, bits)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("bits", BITS)
def test_a_packed_quant_tensor_decodes_to_its_dequantized_weight(bits, group_size, symmetric):
    result = rtn(random_weight(9, 48), None, QuantScheme(bits, group_size, symmetric))
    codes = result.codes.short() + (1 << (bits - 1) if symmetric else 0)
    zero = None if symmetric else pack(result.zero_point.T.contiguous(), bits).T
    decoded = decode_pack_quantized(pack(codes, bits), result.scale, zero, (9, 48), bits)
    assert np.array_equal(decoded, result.dequantize().numpy())
