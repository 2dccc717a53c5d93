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
    (re.compile(r"\.layer_scalar$"), ".layer_scalar.weight"),
    (re.compile(r"\.dt_bias$"), ".dt_proj.bias"),
    (re.compile(r"^model\.(layers\.\d+)\.experts\."), r"model.\1.mlp.experts."),
)
# Vectors of Gemma 4's mixtures, which the tables have no names for.
SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}


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
    translated = _translated(asked, architecture)
    if translated is None and EXPERT.search(name):  # of some architectures the tables know only both together
        translated = _translated(asked, "llama")
    if translated is None:
        raise RecipeError(
            f"{name} has no name in a GGUF file of this architecture", hint="use another export.format for this model"
        )
    return translated if number is None else translated.replace("blk.0.", f"blk.{number[1]}.")


def _translated(asked: str, architecture: str) -> str | None:
    """The name that a tensor of block 0, or of none, has by gguf's table; None where it has none."""
    part = asked.removeprefix("model.layers.0.")
    if part in SCALES:
        return f"blk.0.{SCALES[part]}"
    name: str | None = _names(architecture).get_name(asked, try_suffixes=(".weight", ".bias"))
    return name


def expert_of(name: str) -> int | None:
    """The number of the expert that a tensor is a part of; None for any other."""
    number = EXPERT.search(name)
    return None if number is None else int(number[1])


@cache
def _names(architecture: str) -> TensorNameMap:
    """gguf's own table of names of an architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), 1)
