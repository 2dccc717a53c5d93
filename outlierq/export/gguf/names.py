"""What a tensor of a Hugging Face model is called in a GGUF file, and where in it: experts share one tensor.

The names are those of gguf's own tables (`gguf.get_tensor_name_map`); a few spellings are made theirs first.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from outlierq.core.errors import RecipeError

if TYPE_CHECKING:
    from gguf import TensorNameMap

EXPERT = re.compile(r"\.experts\.(\d+)\.")
# Spellings of transformers' classes -> those of the tables.
SPELLINGS = (
    (re.compile(r"^model\.(layers\.\d+)\.block_sparse_moe\.experts\."), r"\1.feed_forward.experts."),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\."), ""),
    (re.compile(r"\.e_score_correction_bias$"), ".e_score_correction.bias"),
    (re.compile(r"\.sinks$"), ".sinks.weight"),
    (re.compile(r"\.dt_bias$"), ".dt_proj.bias"),
)


@lru_cache(maxsize=1 << 12)  # a tensor is asked for many times
def gguf_name(name: str, architecture: str = "llama") -> str:
    """The name in a GGUF file of a tensor as transformers calls it; RecipeError when it has none.

    architecture: llama.cpp's. All experts of a block have the same.
    """
    asked = EXPERT.sub(".experts.", name)
    for spelling, theirs in SPELLINGS:
        asked = spelling.sub(theirs, asked)
    number = re.search(r"\.(\d+)\.", asked)
    if number is not None:  # asked for block 0, since the table lists every block apart
        asked = f"{asked[: number.start()]}.0.{asked[number.end() :]}"
    translated: str | None = _names(architecture).get_name(asked, try_suffixes=(".weight", ".bias"))
    if translated is None:
        raise RecipeError(
            f"{name} has no name in a GGUF file of this architecture", hint="use another export.format for this model"
        )
    return translated if number is None else translated.replace("blk.0.", f"blk.{number[1]}.")


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor is a part of; None for any other."""
    number = EXPERT.search(name)
    return None if number is None else int(number[1])


@cache
def _names(architecture: str) -> TensorNameMap:
    """gguf's own table of names of an architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), 1)
