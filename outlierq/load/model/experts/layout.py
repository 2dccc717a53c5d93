"""How a model class holds the weights of all experts of a block in one tensor, and what each expert's part is called.

A class says it by transformers' experts interface: gate and up halves behind each other or row by row in turn, matrices
[in, out] or [out, in], with biases or without, with a gate or without one. The names of the parts on disk are those of
transformers' own conversion table, else the usual ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# How the fused modules of transformers 5 call their weights; UP where there is no gate.
GATE_UP, UP, DOWN, BIAS = "gate_up_proj", "up_proj", "down_proj", "_bias"
FIRST_HALF, SECOND_HALF, EVEN, ODD, WHOLE = "first half", "second half", "even", "odd", "whole"


@dataclass(frozen=True)
class Leaves:
    """What an expert's weights are called on disk. gate: None where there is none."""

    gate: str | None
    up: str
    down: str


@dataclass(frozen=True)
class Layout:
    """What transformers' decorator for experts was told, or what a proof has shown.

    is_sorted: the module is given each expert's tokens behind each other, weighted already, and not who is chosen.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    has_post_expert_norm: bool = False
    is_sorted: bool = False

    @property
    def up(self) -> str:
        """The parameter with the weights of the up projections, and those of the gates."""
        return GATE_UP if self.has_gate else UP

    @property
    def slots(self) -> tuple[str, ...]:
        """The parameters that hold a part of every expert."""
        weights = (self.up, DOWN)
        return (*weights, *(f"{name}{BIAS}" for name in weights)) if self.has_bias else weights

    def widths(self, part: torch.nn.Module) -> tuple[int, int, int]:
        """Number of experts, rows of an expert's up projection, and its columns."""
        matrix = part._parameters[self.up].shape[1:]
        rows, columns = reversed(matrix) if self.is_transposed else matrix
        return len(part._parameters[DOWN]), rows // 2 if self.has_gate else rows, columns

    def pieces(self, leaves: Leaves) -> Iterator[tuple[str, str, str]]:
        """(parameter, leaf of the part, which of its rows are the part's) of one expert, weights before biases."""
        kinds = [("", ".weight"), (BIAS, ".bias")] if self.has_bias else [("", ".weight")]
        first, second = (FIRST_HALF, SECOND_HALF) if self.is_concatenated else (EVEN, ODD)
        for ending, leaf in kinds:
            if leaves.gate is not None:
                yield f"{self.up}{ending}", f"{leaves.gate}{leaf}", first
            yield f"{self.up}{ending}", f"{leaves.up}{leaf}", second if self.has_gate else WHOLE
            yield f"{DOWN}{ending}", f"{leaves.down}{leaf}", WHOLE


def rows_of(which: str, count: int) -> slice:
    """The rows of a fused matrix of `count` rows that belong to a part."""
    half = count // 2
    ways = {FIRST_HALF: (0, half), SECOND_HALF: (half, count), EVEN: (0, count, 2), ODD: (1, count, 2)}
    return slice(*ways.get(which, (0, count)))


def usual_leaves(layout: Layout) -> Leaves:
    """The names of parts for which there is no table."""
    return Leaves("gate_proj" if layout.has_gate else None, "up_proj", "down_proj")


def merged_leaves(model: torch.nn.Module, name: str, layout: Layout) -> Leaves | None:
    """The names of the parts that transformers merges into the module called `name`; None when it merges none.

    name: in full, as some conversions are of a part of the model only.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    merging = {layout.up: ["MergeModulelist", "Concatenate"] if layout.has_gate else ["MergeModulelist"]}
    merging[DOWN] = ["MergeModulelist"]
    patterns: dict[str, list[str]] = {}
    for step in get_model_conversion_mapping(model):
        if isinstance(step, WeightConverter) and f".{step.scope_prefix or ''}.".replace("..", ".") in f".{name}.":
            target = step.target_patterns[0].rpartition(".")[2]
            if [type(operation).__name__ for operation in step.operations] == merging.get(target):
                patterns[target] = [_leaf(pattern, name.rpartition(".")[2]) for pattern in step.source_patterns]
    parts = [*patterns.get(layout.up, []), *patterns.get(DOWN, [])]
    count = 3 if layout.has_gate else 2
    if len(parts) != count or not all(parts):
        return None
    return Leaves(*parts) if layout.has_gate else Leaves(None, *parts)


def _leaf(pattern: str, name: str) -> str:
    """ "w1" of ".experts.*.w1.weight" for the module called "experts"; empty for a pattern of another form."""
    before, _, leaf = pattern.removesuffix(".weight").rpartition(".")
    return leaf if pattern.endswith(".weight") and before.endswith(f"{name}.*") else ""
