"""Biases of zeros where a model class has a place for them, so that a shift has something to be folded into.

Outlier Suppression+ (arXiv:2304.09145) centres an input, x' = x - z, and gives its readers the bias b + W z. Llama and
its relatives have no biases, but their classes take some by a key of config.json. Which shifts that makes possible is
proved, not listed. Of a gated block without biases it is one: rows of attention sum to 1, so what is taken off the
values comes out of attention unchanged, v_proj -> o_proj. The other inputs are left as they are: an RMSNorm has no bias
by which the shift could be taken off, and between up_proj and down_proj the gate multiplies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from outlierq.core.model import TensorInfo
from outlierq.registry import rewriter
from outlierq.transform.rotate import Rewrite


@dataclass(frozen=True)
class BiasKey:
    """A key of config.json with which the model class takes more biases than the checkpoint holds.

    path: of the key. value: what opens the places. tensors: the biases that it then needs, by name.
    """

    path: tuple[str, ...]
    value: Any
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Shift:
    """A shift of one group's input that biases can carry. bias: the producer's, which takes it off. new: those of its
    biases that the checkpoint does not hold. note: how it was proved.
    """

    bias: str
    new: frozenset[str]
    note: str


@dataclass(frozen=True)
class Openings:
    """keys: those of this model. shifts: by input group, those that need new biases. obstacle: why the keys cannot be
    used, empty when they can.
    """

    keys: tuple[BiasKey, ...] = ()
    shifts: Mapping[str, Shift] = field(default_factory=dict)
    obstacle: str = ""


@rewriter("add_biases", paper="arXiv:2304.09145")
def add_biases(openings: Openings) -> Rewrite:
    """Zeros for every bias that a key governs, where one of them lets a shift be folded; nothing else changes.

    Without such a key the model is left as it is, with a note: what follows can still scale.
    """
    biases = frozenset().union(*(shift.new for shift in openings.shifts.values()))
    used = [key for key in openings.keys if biases & key.tensors.keys()]
    if not used:
        reason = openings.obstacle or "no key of this model's config makes a shift possible"
        return Rewrite({}, (f"add_biases: nothing is added: {reason}",))
    zeros = {name: info for key in used for name, info in key.tensors.items()}
    settings = {key.path: key.value for key in used}
    said = ", ".join(f"{'.'.join(path)}: {str(value).lower()}" for path, value in settings.items())
    cost = sum(info.nbytes for info in zeros.values())
    note = f"add_biases: {said} adds {len(zeros)} biases, {cost:,} bytes; {len(openings.shifts)} inputs can be shifted"
    shifts = {group: (shift.bias, shift.note) for group, shift in openings.shifts.items()}
    return Rewrite({}, (note,), zeros=zeros, settings=settings, shifts=shifts)
