"""Versions of the libraries that the tests run with: at the lower ends of their ranges some know less than we write."""

from __future__ import annotations

from collections.abc import Collection
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
FACTS = "5.23"  # the transformers that what is said of its classes is about
decoded_first = needs("transformers", FACTS, "decodes weights after it has initialised the class, too late for some")
decoder_of_parts = needs("transformers", FACTS, "has no Auto class for DiffusionGemma")
experts_in_one = needs("transformers", "5.18", "has the experts of Aria in modules of their own")
swiglu_limit = needs("transformers", "5.20", "has no such key")

# 5.24 calls the cache of an attention by another name than the one that compressed-tensors up to 0.20 hooks.
rounded_cache = pytest.mark.skipif(
    at_least("transformers", "5.24") and not at_least("compressed-tensors", "0.21"),
    reason="transformers from 5.24 on keeps the cache in 16 bits with compressed-tensors before 0.21",
)


def skip_unless_known(model_type: str, known: Collection[str]) -> None:
    """Skip a test of an architecture that an older transformers does not have. known: those that it has."""
    if model_type not in known and not at_least("transformers", FACTS):
        pytest.skip(f"transformers before {FACTS} may not have {model_type}")
