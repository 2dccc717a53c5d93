"""The nearest codewords in one pass: native/vectors.c, compiled when outlierq was installed.

Without it torch holds all distances in memory, and takes some ten times as long. Of codewords that are equally near
either may be taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from outlierq.ops.compiled.rounding import library

# `enum`s of vectors.c: values of a vector, cells for each and in all, codewords of a row.
WIDTH, EACH, NEAR = 4, 16, 16
CELLS = EACH**WIDTH


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


@dataclass(frozen=True)
class NearWords:
    """Which codewords are nearest somewhere in a cell of the space of magnitudes of four weights.

    There are 16 cells of equal width for each weight, the last without end.

    rows: uint8 [n, 4, 16], 16 words each, one for every cell and further ones for those that need them, of each from
    the one on that is in more, int32 [16^4 + 1]. step: the width of cells.
    """

    rows: torch.Tensor
    more: torch.Tensor
    step: float


def near_words(words: torch.Tensor) -> NearWords | None:
    """Those of the codewords [number, 4], in a quarter of a second. None where there is nothing compiled, for words of
    other widths, and where a cell has so many that nothing would be saved.
    """
    compiled = _compiled("outlierq_near_words")
    if compiled is None or words.shape[1] != WIDTH:
        return None
    rows = torch.empty(2 * CELLS, WIDTH, NEAR, dtype=torch.uint8)
    more, given = torch.empty(CELLS + 1, dtype=torch.int32), words.T.float().contiguous()
    step = (words.max().item() + 1) / EACH
    places = len(rows), rows.data_ptr(), more.data_ptr()
    count = compiled.outlierq_near_words(given.data_ptr(), len(words), step, *places)
    return NearWords(rows[:count].clone(), more, step) if count else None


def nearest_in_cells(ratio: torch.Tensor, near: NearWords) -> torch.Tensor | None:
    """`ratio` [n, 8] as codewords with signs, all weights alike. None: not for this device."""
    compiled = _compiled("outlierq_nearest_in_cells")
    if compiled is None or ratio.device.type != "cpu":
        return None
    ratio = ratio.float().contiguous()
    out = torch.empty_like(ratio)
    places = near.rows.data_ptr(), near.more.data_ptr(), near.step, out.data_ptr()
    compiled.outlierq_nearest_in_cells(ratio.data_ptr(), ratio.numel() // WIDTH, *places)
    return out


@cache
def _compiled(name: str) -> ctypes.CDLL | None:
    """The library; None where there is none, or what was compiled has no such function."""
    compiled = library()
    if compiled is None or not hasattr(compiled, name):
        return None
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    compiled.outlierq_near_words.argtypes = (pointer, size, number, size, pointer, pointer)
    compiled.outlierq_near_words.restype = size
    compiled.outlierq_nearest_in_cells.argtypes = (pointer, size, pointer, pointer, number, pointer)
    return compiled


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
