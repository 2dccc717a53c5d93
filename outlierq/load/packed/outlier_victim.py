"""Reads `outlierq-olive` checkpoints: 4 bits a weight, where an outlier takes the code of its neighbour (OliVe).

The decoder is numpy alone and shares nothing with the exporter, whose work it verifies: a table of what each of the 256
bytes means, written from arXiv:2304.07493. A byte whose nibbles are no legal pair is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import DTYPES
from outlierq.core.errors import SourceError
from outlierq.core.model import StoredLinear, TensorInfo
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.numbers import Parts, as_array
from outlierq.load.packed.codes.word_packed import members_of
from outlierq.load.packed.decoded import DAMAGED, DecodedCheckpoint, checked_scales
from outlierq.load.packed.described import nothing_packed
from outlierq.load.packed.reading import presents, reads_rows

if TYPE_CHECKING:
    import numpy as np
    import torch

    from outlierq.core.model import Checkpoint

CODES, SCALES = "weight_pairs", "weight_scale"
VICTIM, ILLEGAL = 8, 127


@cache
def pairs_of_bytes() -> np.ndarray:
    """Int8 [256, 2]: the values of the even and the odd column that a byte holds; (127, 127) where it holds none.

    Two numbers in two's complement, of which -8 is none. But beside the nibble 1000, which is a 0, stands an outlier: a
    sign bit, two bits e and a bit m that mean (2 + m) * 2^(e + 2), and are not all 0.
    """
    import numpy as np

    table = np.full((256, 2), ILLEGAL, np.int8)
    normal = [code - 16 if code > 7 else code for code in range(16)]
    for low in range(16):
        for high in range(16):
            if low != VICTIM and high != VICTIM:
                table[low | high << 4] = normal[low], normal[high]
            elif (low & 7) and high == VICTIM:
                table[low | high << 4] = _outlier(low), 0
            elif (high & 7) and low == VICTIM:
                table[low | high << 4] = 0, _outlier(high)
    return table


def _outlier(code: int) -> int:
    """The value of an outlier's nibble."""
    size = (2 + (code & 1)) * 2 ** ((code >> 1 & 3) + 2)
    return -size if code >> 3 else size


@reads_rows("outlierq-olive", CODES, SCALES)
def pair_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """Output rows [start, stop). stored: weight_pairs uint8 [out, in / 2], weight_scale [out, groups].

    SourceError for a byte that is no pair.
    """
    import torch

    packed = as_array(stored[CODES])[start:stop]
    values = pairs_of_bytes()[packed].reshape(len(packed), -1)
    wrong = int((values == ILLEGAL).sum()) // 2
    if wrong:
        raise SourceError(f"{wrong} of {packed.size} bytes are no pair of an outlier and its victim", hint=DAMAGED)
    return QuantTensor(torch.from_numpy(values), stored[SCALES][start:stop], None, scheme)


class PairCheckpoint(DecodedCheckpoint):
    """Its linears, decoded when they are read."""

    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]."""
        return self.quantized(name).dequantize()

    def quantized(self, name: str) -> QuantTensor:
        """Codes [out, in] and scales [out, groups] of a linear, by the name of its weight."""
        shape = self.linears[name].shape
        return pair_rows(self.parts(name), self.code_scheme(name), (shape[0], shape[1]), 0, shape[0])

    def code_scheme(self, name: str) -> QuantScheme:
        """How the linear is stored, by its headers."""
        (_, columns), scale = self.linears[name].shape, self.original.tensors[self.linears[name].members[SCALES]]
        size = None if scale.shape[1] == 1 else columns // scale.shape[1]
        return QuantScheme(4, size, kind="outlier-victim", scale_dtype=DTYPES[scale.dtype][0])

    def check_scales(self, name: str) -> None:
        """SourceError when a scale is no finite positive number, or 0 over codes that are not."""
        parts = self.parts(name)
        shape, scheme = self.linears[name].shape, self.code_scheme(name)

        def decode(empty: torch.Tensor) -> np.ndarray:
            codes: np.ndarray = pair_rows(parts, scheme, (shape[0], shape[1]), 0, shape[0]).codes.numpy()
            grouped = codes.reshape(shape[0], empty.shape[1], -1)
            return grouped[as_array(empty) == 0]

        checked_scales(name, parts[SCALES], decode)


@presents("outlierq-olive")
def pair_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> PairCheckpoint:
    """The presentation of an `outlierq-olive` folder. config: its quantization_config."""
    stems = [name.removesuffix(f".{CODES}") for name in stored.tensors if name.endswith(f".{CODES}")]
    if not stems:
        raise nothing_packed(stored)
    linears = {}
    for stem in stems:
        members = members_of(stored, stem, (CODES, SCALES))
        packed = stored.tensors[members[CODES]]
        if packed.dtype != "U8" or len(packed.shape) != 2:
            raise SourceError(f"{packed.name} is {packed.dtype} {list(packed.shape)}, not a matrix of bytes")
        _check_scales(packed, stored.tensors[members[SCALES]])
        linears[f"{stem}.weight"] = StoredLinear((packed.shape[0], 2 * packed.shape[1]), members)
    return PairCheckpoint(stored, linears)


def _check_scales(packed: TensorInfo, scale: TensorInfo) -> None:
    """SourceError when scales do not belong to the codes, by their headers: one for an even number of columns."""
    (rows, half), shape = packed.shape, scale.shape
    if len(shape) != 2 or shape[0] != rows or not shape[1] or half % shape[1]:
        raise SourceError(
            f"{scale.name} is {list(shape)}, which does not fit codes {list(packed.shape)}", hint="get the file again"
        )
