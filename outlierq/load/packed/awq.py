"""Reads the GEMM layout of AutoAWQ with numpy alone; shares no code with the exporter, whose work it verifies.

`qweight` and `qzeros` are int32 words along the output rows: row 8 * c + j of word c lies in nibble `NIBBLE[j]`,
counted from the lowest bits. Zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.numbers import Numbers, Parts, Shaped, as_array
from outlierq.load.packed.codes.word_packed import (
    WordPacked,
    WordPackedCheckpoint,
    finished,
    members_of,
    scheme_of,
    stems_of,
)
from outlierq.load.packed.reading import presents, reads_rows

if TYPE_CHECKING:
    import numpy as np

    from outlierq.core.model import Checkpoint

NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
ROLES = ("qweight", "qzeros", "scales")


@reads_rows("awq", *ROLES)
def awq_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """Output rows [start, stop). start: a multiple of 8. SourceError when the tensors do not fit the scheme.

    stored: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]. shape: (out, in).
    """
    _check(stored, scheme, shape)
    words = slice(start // 8, -(-stop // 8))
    codes, zero_point = (read_words(stored[role][:, words]) for role in ("qweight", "qzeros"))
    return finished(codes, zero_point, stored["scales"][:, start:stop], scheme)


def _check(stored: Mapping[str, Shaped], scheme: QuantScheme, shape: tuple[int, int]) -> None:
    """SourceError when a tensor has another shape than the scheme asks for."""
    rows, columns = shape
    groups = scheme.groups(columns)
    expected = {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}
    for role, needed in expected.items():
        if tuple(stored[role].shape) != needed:
            raise SourceError(f"{role} is {list(stored[role].shape)}; {scheme} of {rows} x {columns} needs {needed}")


def read_words(words: Numbers) -> np.ndarray:
    """Uint8 [8 * words, n] of int32 words [n, words]."""
    import numpy as np

    packed = as_array(words)
    if packed.dtype != np.int32:
        raise SourceError(f"awq words are int32, found {packed.dtype}")
    bits = np.ascontiguousarray(packed.T).view(np.uint32)
    values = np.empty((8 * bits.shape[0], bits.shape[1]), np.uint8)
    for row, nibble in enumerate(NIBBLE):
        values[row::8] = bits >> np.uint32(4 * nibble) & np.uint32(15)
    return values


@presents("awq")
def awq_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> WordPackedCheckpoint:
    """An AutoAWQ folder presented as a plain one. config: its quantization_config. SourceError for other versions."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or config.get("bits", config.get("w_bit")) != 4:
        raise SourceError(
            f"{stored.source} is an awq checkpoint of version {version} with {config.get('bits')} bits",
            hint="the gemm version with 4 bits is decoded here",
        )
    size = config.get("group_size", config.get("q_group_size", 128))

    def linear(stem: str) -> WordPacked:
        members = members_of(stored, stem, ROLES)
        columns, words = stored.tensors[f"{stem}.qweight"].shape
        scheme = scheme_of(stem, 4, size, stored.tensors[f"{stem}.scales"].dtype, columns)
        return WordPacked((8 * words, columns), members, scheme)

    def rows(parts: Parts, linear: WordPacked) -> QuantTensor:
        return awq_rows(parts, linear.scheme, linear.shape, 0, linear.shape[0])

    return WordPackedCheckpoint(stored, {f"{stem}.weight": linear(stem) for stem in stems_of(stored)}, rows, _check)
