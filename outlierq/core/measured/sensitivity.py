"""`Sensitivity`: what an error of each linear's output costs at the end of the model. Additive over text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.errors import StatsError

if TYPE_CHECKING:
    import torch

# The parts of a linear's statistics, as they are named in a file.
PARTS, ALIKE = ("outputs", "inputs"), "alike"


@dataclass(frozen=True)
class LinearSensitivity:
    """Of one linear; g is the gradient of sum_t log p(y_t) by its output at a token, y_t drawn from the model itself.

    outputs: [out] float64, sum over tokens of g_j^2. inputs: [in] float64, sum over tokens of (mean_j g_j^2) x_i^2.
    alike: [2] float64, over sequences ||sum_t g x^T||^2, and sum_t ||g||^2 ||x||^2; None where that was not measured.
    Of the table of embeddings, whose inputs are tokens: g by each of its rows, the sum over the places of a sequence.
    """

    outputs: torch.Tensor
    inputs: torch.Tensor
    alike: torch.Tensor | None = None

    def __add__(self, other: LinearSensitivity) -> LinearSensitivity:
        """Of both halves of the text."""
        alike = None if self.alike is None or other.alike is None else self.alike + other.alike
        return LinearSensitivity(self.outputs + other.outputs, self.inputs + other.inputs, alike)

    @property
    def coherence(self) -> float:
        """How much more an error of the weights costs than the same errors of each token's outputs, drawn apart.

        It is the same error at all tokens, so what it does at one and at another adds up, or cancels.
        """
        together, apart = (1.0, 1.0) if self.alike is None else self.alike.tolist()
        return together / apart if apart > 0 else 1.0


@dataclass(frozen=True)
class Sensitivity:
    """linears: by module; one that no token reached has none. tokens: how many the model read in all.

    The mean of g g^T is the Fisher matrix of an output, which is the curvature of the KL divergence in it: a change d
    of the output costs 1/2 d^T F d nats (Martens 2014, arXiv:1412.1193).
    """

    tokens: int
    linears: Mapping[str, LinearSensitivity]

    def merge(self, other: Sensitivity) -> Sensitivity:
        """Of both halves of the text."""
        names = sorted({*self.linears, *other.linears})
        return Sensitivity(self.tokens + other.tokens, {name: _sum(self, other, name) for name in names})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name: "module/outputs" [out] and "module/inputs" [in] of each linear, and "tokens" []."""
        import torch

        parts = [(name, part, getattr(one, part)) for name, one in self.linears.items() for part in (*PARTS, ALIKE)]
        named = {f"{name}/{part}": value for name, part, value in parts if value is not None}
        return {"tokens": torch.tensor(self.tokens), **named}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Sensitivity:
        """What `tensors` gave, shapes [out], [in] and []; StatsError when it is something else."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            name, _, part = key.rpartition("/")
            if name and (part not in (*PARTS, ALIKE) or value.ndim != 1 or not value.is_floating_point()):
                raise StatsError(f"the sensitivities hold {key} as {value.dtype} {list(value.shape)}")
            parts.setdefault(name, {})[part] = value
        count = parts.pop("", {}).get("tokens")
        if count is None or count.numel() != 1 or any({*one} - {ALIKE} != {*PARTS} for one in parts.values()):
            raise StatsError("the sensitivities are not whole", hint="calibrate again")
        return cls(int(count), {name: LinearSensitivity(**one) for name, one in parts.items()})


def _sum(one: Sensitivity, other: Sensitivity, name: str) -> LinearSensitivity:
    """Of a linear over both; a half that did not reach it adds nothing."""
    held = [half.linears[name] for half in (one, other) if name in half.linears]
    if len(held) == 1:
        return held[0]
    return held[0] + held[1]
