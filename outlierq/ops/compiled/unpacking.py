"""Numbers of a few bits out of packed bytes, in one pass: native/unpack.c, compiled when outlierq was installed.

Readers use it, writers do not: what reads a file back shares no code with what wrote it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from outlierq.ops.compiled.rounding import library

if TYPE_CHECKING:
    import numpy as np


def spread(raw: np.ndarray, bits: int, run: int) -> np.ndarray | None:
    """Bytes [rows, blocks, n] as numbers of `bits` bits, [rows, blocks, 8 n / bits].

    run: of so many bytes first the lowest bits of all of them, then the next. None where nothing is compiled, or not
    for such runs; numpy then does the same.
    """
    import numpy as np

    function = _spread()
    if function is None or raw.ndim != 3 or not raw.size or not _is_strided(raw):
        return None
    rows, blocks, count = raw.shape
    numbers = np.empty((rows, blocks, count * 8 // bits), np.uint8)
    place, stride = raw.ctypes.data, raw.strides[1]
    done = function(place, rows * blocks, stride, count // run, bits, run, numbers.ctypes.data)
    return numbers if done else None


def _is_strided(raw: np.ndarray) -> bool:
    """Whether the bytes of a block lie side by side, and all blocks are equally far apart."""
    return raw.dtype.itemsize == raw.strides[2] == 1 and raw.strides[0] == raw.shape[1] * raw.strides[1]


@cache
def _spread() -> Callable[..., int] | None:
    """The compiled function; None where there is none, or what was compiled is older than it."""
    compiled = library()
    if compiled is None or not hasattr(compiled, "outlierq_spread") or sys.byteorder != "little":
        return None
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    function = compiled.outlierq_spread
    function.argtypes = (pointer, size, size, size, number, number, pointer)
    return function
