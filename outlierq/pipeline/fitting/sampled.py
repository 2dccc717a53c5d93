"""Some rows of a linear that stand for all of them, and what a change of them costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.errors import StatsError
from outlierq.core.measured.sensitivity import Sensitivity
from outlierq.core.model import LinearSite
from outlierq.detect.sample import spread

if TYPE_CHECKING:
    import torch

# Of a linear that are rounded; what they lose stands for the others, by how much these matter.
ROWS = 32
# Columns whose rounding errors are about as large as each other.
NEAR = 64


@dataclass(frozen=True)
class Loss:
    """Of linears in a scheme. relative: of those that no gradient reached, squared error of the output over its power,
    times weights. nats: of the others; beside: their relative loss.
    """

    relative: float
    nats: float
    beside: float

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.relative + other.relative, self.nats + other.nats, self.beside + other.beside)

    def times(self, factor: float) -> Loss:
        """So many times as large."""
        return Loss(self.relative * factor, self.nats * factor, self.beside * factor)

    def total(self, rate: float) -> float:
        """Everything, with `rate` nats for a relative loss."""
        return self.nats + rate * self.relative


@dataclass(frozen=True)
class Costs:
    """Of a squared change of each output, in nats per token of text. inputs: [in], see `LinearSensitivity`, per token.

    outputs: [out].
    """

    outputs: torch.Tensor
    inputs: torch.Tensor

    @classmethod
    def of(cls, site: LinearSite, sensitivity: Sensitivity | None) -> Costs | None:
        """What the statistics hold of a linear, None when that is nothing; StatsError for other shapes."""
        found = None if sensitivity is None else sensitivity.linears.get(site.module)
        if found is None or sensitivity is None:
            return None
        if (len(found.outputs), len(found.inputs)) != (site.out_features, site.in_features):
            other = f"the sensitivity of {site.module} has other widths than the linear"
            raise StatsError(other, hint="calibrate again")
        share = found.coherence / sensitivity.tokens
        return cls((found.outputs * share).float(), (found.inputs * share).float())


@dataclass(frozen=True)
class Sample:
    """Some rows of one linear that are rounded, and how much each of them counts.

    rows: [n, in]. hessian: [in, in] of the input. counts: [n], for how many rows one stands. power: of all outputs.
    weights: of all rows. outputs, inputs: [n], [in] of what a change costs, None where that is not known.
    """

    rows: torch.Tensor
    hessian: torch.Tensor
    counts: torch.Tensor
    power: float
    weights: int
    outputs: torch.Tensor | None
    inputs: torch.Tensor | None

    @classmethod
    def of(cls, weight: torch.Tensor, hessian: torch.Tensor, importance: torch.Tensor, costs: Costs | None) -> Sample:
        """Half of the rows are those that matter most, the others lie evenly among the rest.

        weight: [out, in]. importance: [in], what a squared error of each column counts.
        """
        import torch

        dense = weight.float()
        squares = dense.square()
        matters = squares @ _near(importance)  # [out] what rounding errors count, but for a factor
        if costs is not None:
            matters *= costs.outputs
        order = matters.argsort(descending=True, stable=True)
        most, rest = order[: ROWS // 2], order[ROWS // 2 :].sort().values
        at = torch.cat([most, spread(rest, ROWS // 2)])
        rows = dense[at]
        power = ((rows @ hessian) * rows).sum(1).clamp_(min=0) * _counts(squares @ hessian.diagonal(), at)
        outputs, inputs = (None, None) if costs is None else (costs.outputs[at], costs.inputs / costs.outputs.mean())
        counts = _counts(matters, at)
        return cls(rows, hessian, counts, power.sum().item(), dense.numel(), outputs, inputs)

    @property
    def weighs(self) -> torch.Tensor:
        """[n] what a squared error of each output of a row counts."""
        return self.counts if self.outputs is None else self.counts * self.outputs

    def loss(self, change: torch.Tensor) -> Loss:
        """Of a change of the rows, [n, in]."""
        errors = ((change @ self.hessian) * change).sum(1) * self.counts
        relative = errors.sum().item() / self.power * self.weights if self.power > 0 else 0.0
        if self.outputs is None:
            return Loss(relative, 0.0, 0.0)
        return Loss(0.0, 0.5 * (errors * self.outputs).sum().item() * self._where_it_counts(change), relative)

    def _where_it_counts(self, change: torch.Tensor) -> float:
        """How much more the tokens count at which the changed columns are large, than all tokens do."""
        assert self.inputs is not None, "the costs are known"
        columns = change.square().T @ self.weighs  # [in]
        plain = (columns * self.hessian.diagonal()).sum().item()
        return (columns * self.inputs).sum().item() / plain if plain > 0 else 1.0


def _near(importance: torch.Tensor) -> torch.Tensor:
    """[in] what the square of each weight counts: a rounding error is as large as the weights near it, not as it."""
    import torch

    return torch.cat([part.mean().expand(len(part)) for part in importance.split(NEAR)])


def _counts(matters: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """[n] for how many rows each of those at [n] stands: the second half for all that are not there. matters: [out]."""
    counts, drawn = matters.new_ones(len(at)), at[ROWS // 2 :]
    known = matters[drawn].sum()
    counts[ROWS // 2 :] = (matters.sum() - matters[at[: ROWS // 2]].sum()) / known if known > 0 else 0.0
    return counts
