"""The mixes of types that llama.cpp knows by name: which tensor of a model gets which type.

The rules are those of `llama_tensor_get_type` in llama.cpp's `src/llama-quant.cpp` for a model with an importance
matrix, so that a name means the same here and there; as rows of `data/gguf_mixes.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from outlierq.core.gguf.types import block_types

# What the rules call `attn_v` is also the matrix that holds keys or queries besides; `ffn_down` also that of experts.
PARTS = {"attn_qkv": "attn_v", "attn_kv_b": "attn_v", "ffn_down_exps": "ffn_down", "ffn_down_shexp": "ffn_down"}
ATTENTION, DOWN = "attn_v", "ffn_down"


@dataclass(frozen=True)
class Shape:
    """What the rules ask of a model. layers: blocks. sharing: queries that share a key. experts: of a block, or 0.

    having: numbers of the blocks that have such a part, () all of them.
    """

    layers: int
    sharing: int
    experts: int
    having: tuple[int, ...] = ()

    def holds(self, condition: str, layer: int) -> bool:
        """Whether a condition of a rule is met in block number `layer`."""
        eighth = self.layers // 8
        return {
            "always": True,
            "more bits": self._more_bits(layer),
            "first 2": layer < 2,
            "first 4": layer < 4,
            "first eighth": layer < eighth,
            "first sixteenth": layer < self.layers // 16,
            "groups of 4": self.sharing >= 4,
            "4 experts": self.experts >= 4,
            "8 experts": self.experts == 8,
            "8 experts, more bits": self.experts == 8 and self._more_bits(layer),
        }[condition]

    def counted(self, part: str, layer: int) -> tuple[Shape, int]:
        """The shape and the number of a block as llama.cpp counts for a part.

        Attention among the blocks that have it; `ffn_down` also, where there are no experts, but out of all blocks.
        """
        if not self.having or part not in (ATTENTION, DOWN) or (part == DOWN and self.experts > 1):
            return self, layer
        shape = replace(self, layers=len(self.having)) if part == ATTENTION else self
        return shape, self.having.index(layer)

    def _more_bits(self, layer: int) -> bool:
        """The first and the last eighth of the blocks, and every third between (`use_more_bits`)."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


@cache
def mixes() -> dict[str, dict[str, Any]]:
    """Rules by the name of a mix: `type` for everything, and by part of a block [condition, type], first that holds."""
    text = (resources.files("outlierq") / "data" / "gguf_mixes.json").read_text(encoding="utf-8")
    content: dict[str, dict[str, Any]] = json.loads(text)
    return content


def type_in_mix(mix: str, part: str, layer: int | None, width: int, shape: Shape, *, tied: bool) -> str:
    """The type of a tensor. part: as GGUF calls it ("attn_v", "token_embd"). layer: of its block, None outside.

    width: columns; an output that the mix's blocks do not divide is Q8_0. tied: the embedding is the output, too.
    """
    rules = mixes()[mix]
    if part == "output" or (part == "token_embd" and tied):
        return "Q8_0" if width % block_types()[rules["type"]].columns else str(rules.get("output", "Q6_K"))
    if layer is None:
        return str(rules.get(part, rules["type"]))
    part = part_in_rules(part)
    counted, number = shape.counted(part, layer)
    for condition, name in rules.get(part, ()):
        if counted.holds(condition, number):
            return _exception(part, str(name), shape, few_bits="few_bits" in rules)
    return _exception(part, str(rules["type"]), shape, few_bits="few_bits" in rules)


def part_in_rules(part: str) -> str:
    """What the rules call a part of a block."""
    return PARTS.get(part, part)


def _exception(part: str, name: str, shape: Shape, *, few_bits: bool) -> str:
    """The type where a key or value is shared by many queries, or a block has eight experts, as llama.cpp has it."""
    if few_bits or part not in (ATTENTION, "attn_k"):
        return name
    if shape.experts == 8:
        return "Q8_0"
    is_70b = shape.layers == 80 and shape.sharing > 1
    return "Q5_K" if is_70b and part == ATTENTION and name in ("Q3_K", "Q4_K") else name
