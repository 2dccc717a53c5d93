"""Versions of the libraries that the tests run with: at the lower ends of their ranges some know less than we write."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def at_least(package: str, number: str) -> bool:
    return Version(version(package)) >= Version(number)


def needs(package: str, number: str, reason: str) -> pytest.MarkDecorator:
    """For tests of what an older `package` cannot do. reason: what that is."""
    return pytest.mark.skipif(not at_least(package, number), reason=f"{package} before {number} {reason}")


sentencepiece_in_gguf = needs("transformers", "5.18", "loses tokens of such files")
# 2, 4 and 8 bits fill whole words; of other widths no code was split between two words.
dense_words = needs("compressed-tensors", "0.18", "packs 3, 5, 6 and 7 bits in another way")
PACKED_BITS = [pytest.param(bits, marks=dense_words if 32 % bits else ()) for bits in range(2, 9)]
# Up to 0.18 it guesses from the scales' shape, and takes one column of blocks for one scale a row.
narrow_blocks = needs("compressed-tensors", "0.19", "misreads FP8 blocks of matrices at most one block wide")
decoded_first = needs("transformers", "5.23", "initialises weights of such classes before it decodes them")
kimi_linear = needs("transformers", "5.18", "has no such class")
experts_in_one = needs("transformers", "5.18", "has the experts of Aria in modules of their own")
swiglu_limit = needs("transformers", "5.20", "has no such key")
