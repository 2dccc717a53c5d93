"""The nearest codewords in one pass: native/vectors.c, compiled when outlierq was installed.

Without it torch holds all distances in memory, and takes some ten times as long. Of codewords that are equally near
either may be taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from outlierq.ops.compiled.rounding import library


def nearest_vectors(
    ratio: torch.Tensor, words: torch.Tensor, importance: torch.Tensor, *, even_signs: bool
) -> torch.Tensor | None:
    """`ratio` [n, 8] as codewords with signs. words: [number, 4 or 8]. importance: [period, 8], in turn; None: there is
    nothing compiled, or not for this device."""
    search = _search()
    if search is None or ratio.device.type != "cpu":
        return None
    ratio, importance, words = (each.float().contiguous() for each in (ratio, importance, words.T))
    out = torch.empty_like(ratio)
    search(
        ratio.data_ptr(),
        len(ratio),
        importance.data_ptr(),
        len(importance),
        words.data_ptr(),
        words.shape[1],
        words.shape[0],
        even_signs,
        out.data_ptr(),
    )
    return out


@cache
def _search() -> Callable[..., None] | None:
    """The compiled function; None where there is none, or what was compiled is older than it."""
    compiled = library()
    if compiled is None or not hasattr(compiled, "outlierq_nearest_vectors"):
        return None
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    function = compiled.outlierq_nearest_vectors
    function.argtypes = (pointer, size, pointer, size, pointer, size, number, number, pointer)
    return function
