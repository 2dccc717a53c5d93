"""Reads GPTQ checkpoints of versions 1 and 2 with numpy alone; shares no code with the exporter it verifies.

`qweight` [in * bits / 32, out] holds the codes of an output row down a column of words, `qzeros` [groups, out * bits /
32] the zero points of a group along a row of words, both as one string of bits, lowest first. Version 1 stores zero
points less one; it is added to all fields of a word at once, so that a borrow of the writer is undone by a carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.bits import unpack
from outlierq.load.packed.codes.numbers import Parts, Shaped, as_array
from outlierq.load.packed.codes.word_packed import (
    WordPacked,
    WordPackedCheckpoint,
    finished,
    members_of,
    scheme_of,
    stems_of,
)
from outlierq.load.packed.described import fits
from outlierq.load.packed.reading import presents, reads_rows

if TYPE_CHECKING:
    import numpy as np

    from outlierq.core.model import Checkpoint

ROLES = ("qweight", "qzeros", "scales", "g_idx")
VERSIONS = {"gptq": 1, "gptq_v2": 2}
WIDTHS = (2, 3, 4, 8)


@reads_rows("gptq", *ROLES)
def gptq_rows(
    stored: Parts,
    scheme: QuantScheme,
    shape: tuple[int, int],
    start: int,
    stop: int,
    *,
    version: int = 1,
) -> QuantTensor:
    """Output rows [start, stop). start: a multiple of 32. SourceError when the tensors do not fit the scheme, or when
    the groups are not runs of columns (activation order; see `gptq_dense`).

    stored: qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out], g_idx
    int32 [in]. shape: (out, in).
    """
    import numpy as np

    _check(stored, scheme, shape)
    columns = shape[1]
    width = scheme.columns_per_group(columns)
    if "g_idx" in stored and not np.array_equal(as_array(stored["g_idx"]), np.arange(columns) // width):
        raise SourceError(f"g_idx does not say that {width} neighbouring columns form a group (activation order)")
    return _rows(stored, scheme, shape, start, stop, version)


@reads_rows("gptq-v2", *ROLES)
def _rows_of_version_2(
    stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int
) -> QuantTensor:
    """The same where zero points are stored as they are."""
    return gptq_rows(stored, scheme, shape, start, stop, version=2)


def gptq_dense(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], version: int) -> np.ndarray:
    """Float32 [out, in] of a whole weight, whatever the order of its columns: group g_idx[i] holds column i."""
    import numpy as np

    _check(stored, scheme, shape)
    width = scheme.columns_per_group(shape[1])
    groups = as_array(stored["g_idx"]) if "g_idx" in stored else np.arange(shape[1]) // width
    if groups.min() < 0 or groups.max() >= scheme.groups(shape[1]):
        raise SourceError(f"g_idx names groups from {groups.min()} to {groups.max()}, of {scheme.groups(shape[1])}")
    quantized = _rows(stored, scheme, shape, 0, shape[0], version)
    dense = as_array(quantized.codes).astype(np.float32)
    if quantized.zero_point is not None:
        dense -= as_array(quantized.zero_point).astype(np.float32)[:, groups]
    return dense * quantized.scale.float().numpy()[:, groups]


def _check(stored: Mapping[str, Shaped], scheme: QuantScheme, shape: tuple[int, int]) -> None:
    """SourceError when a tensor has another shape than the scheme asks for."""
    (rows, columns), groups, bits = shape, scheme.groups(shape[1]), scheme.bits
    expected = {
        "qweight": (columns * bits // 32, rows),
        "qzeros": (groups, rows * bits // 32),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }
    for role, needed in expected.items():
        if role in stored and tuple(stored[role].shape) != needed:
            raise SourceError(f"{role} is {list(stored[role].shape)}; {scheme} of {rows} x {columns} needs {needed}")


def _rows(
    stored: Parts,
    scheme: QuantScheme,
    shape: tuple[int, int],
    start: int,
    stop: int,
    version: int,
) -> QuantTensor:
    """Codes, scales and zero points of some output rows."""
    import numpy as np

    bits = scheme.bits
    codes = fields(as_array(stored["qweight"])[:, start:stop].T, bits, shape[1])
    words = as_array(stored["qzeros"])[:, start * bits // 32 : stop * bits // 32]
    if version == 1:
        first = start * bits // 32
        ones = [_ones(first + word, bits) for word in range(words.shape[1])]
        words = (np.ascontiguousarray(words).view(np.uint32) + np.array(ones, np.uint32)).view(np.int32)
    zero_point = fields(words, bits, stop - start).T
    return finished(codes, zero_point, stored["scales"][:, start:stop], scheme)


def _ones(word: int, bits: int) -> int:
    """Word number `word` of a string of fields that are all 1."""
    return sum(1 << (place - 32 * word) for place in range(32 * word, 32 * word + 32) if place % bits == 0)


def fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Uint8 [rows, count] of int32 words [rows, count * bits / 32]: field i at bits i * bits and up, lowest first."""
    import numpy as np

    if words.dtype != np.int32 or words.shape[1] * 32 < count * bits:
        raise SourceError(f"{count} fields of {bits} bits do not fit {words.shape[1]} words of {words.dtype}")
    return unpack(words, bits, count)


@presents("gptq")
def gptq_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> WordPackedCheckpoint:
    """A GPTQ folder presented as a plain one. config: its quantization_config. SourceError for another layout."""
    name = config.get("checkpoint_format") or config.get("format") or "gptq"
    if name not in VERSIONS or config.get("pack_dtype", "int32") != "int32":
        raise SourceError(
            f"{stored.source} is a GPTQ checkpoint in the layout {name} of {config.get('pack_dtype', 'int32')} words",
            hint="gptq and gptq_v2 with int32 words are decoded here",
        )
    return gptq_presentation(stored, lambda stem: {**config, **_override(config, stem)}, VERSIONS[name])


def gptq_presentation(
    stored: Checkpoint, said_of: Callable[[str], Mapping[str, Any]], version: int, *, in_order: bool = False
) -> WordPackedCheckpoint:
    """A checkpoint of this layout. said_of: bits and group_size of a module. version: 1 or 2, of the zero points.
    in_order: g_idx may be left out, where neighbouring columns form a group.
    """

    def linear(stem: str) -> WordPacked:
        members = members_of(stored, stem, ROLES[:3] if in_order and f"{stem}.g_idx" not in stored.tensors else ROLES)
        own = said_of(stem)
        if own.get("bits") not in WIDTHS:
            raise SourceError(f"{stored.source} stores {stem} in {own.get('bits')} bits; 2, 3, 4 and 8 are decoded")
        words, rows = stored.tensors[f"{stem}.qweight"].shape
        columns = words * 32 // own["bits"]
        scheme = scheme_of(
            stem, own["bits"], own.get("group_size", -1), stored.tensors[f"{stem}.scales"].dtype, columns
        )
        return WordPacked((rows, columns), members, scheme)

    def rows(parts: Parts, linear: WordPacked) -> QuantTensor:
        return gptq_rows(parts, linear.scheme, linear.shape, 0, linear.shape[0], version=version)

    def dense(parts: Parts, linear: WordPacked) -> np.ndarray:
        return gptq_dense(parts, linear.scheme, linear.shape, version)

    return WordPackedCheckpoint(
        stored, {f"{stem}.weight": linear(stem) for stem in stems_of(stored)}, rows, _check, dense
    )


def _override(config: Mapping[str, Any], stem: str) -> Mapping[str, Any]:
    """What GPTQModel's `dynamic` says of one module: the first pattern that fits; "-:" ones say that it is plain."""
    for pattern, own in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and fits(pattern.removeprefix("+:"), stem):
            return own or {}
    return {}
