"""A result of which no report says how it was made: its folds are guessed, and judged by what a fold can do."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from outlierq.pipeline.checking.finding import Fault, Findings
from outlierq.pipeline.checking.weights import FOREIGN, Grid, judge_weight

if TYPE_CHECKING:
    import torch

# Part of all weights that need fitted scales to be told, from which folds are taken for unknown.
MOST_RESCUED = 0.3
# The same of those that are foreign, from which the order of channels is taken for unknown.
MOST_FOREIGN = 0.3


class Guess:
    """Judges weights whose folds are not known: as inferred folds leave them, else after any positive scales.

    may_be_folded: whether anything else in the checkpoint shows that there were folds: gains that differ from the
    source's. Without that no scale is fitted. findings: get the faults once all weights were seen (`judge`). is_fitted:
    whether scales per column and row had to be fitted, since the folds could not be inferred.
    """

    def __init__(self, findings: Findings, *, may_be_folded: bool):
        self.findings, self.may_be_folded, self.is_fitted = findings, may_be_folded, False
        self.errors: dict[str, float] = {}
        self._strict: dict[str, list[Fault]] = {}
        self._fitted: dict[str, tuple[float, list[Fault]]] = {}

    def add(self, name: str, weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> float:
        """Look at one weight, float32 [out, in]; gives its relative error."""
        strict = Findings()
        self.errors[name] = error = judge_weight(name, weight, expected, grid, strict)
        self._strict[name] = strict.faults
        if strict.faults and self.may_be_folded:
            again = Findings()
            after = judge_weight(name, weight, fitted_to(weight, expected), grid, again)
            self._fitted[name] = after, again.faults
        return error

    def judge(self, *, other_tables: bool, may_be_ordered: bool) -> bool:
        """Judge the weights against each other; whether they were judged. other_tables: embeddings differ, too.

        may_be_ordered: the format is one whose writer puts channels into another order.
        """
        if not self.errors:
            return True
        rescued = [name for name, (_, faults) in self._fitted.items() if not faults]
        if len(rescued) > MOST_RESCUED * len(self.errors):
            self.is_fitted = True
            self.errors |= {name: error for name, (error, _) in self._fitted.items()}
        usual = median(self.errors.values())
        foreign = sum(error > FOREIGN for error in self.errors.values())
        if may_be_ordered and foreign > MOST_FOREIGN * len(self.errors):
            self.findings.note("the order of channels is not known without the report; the weights were not judged")
            return False
        if usual > FOREIGN and other_tables:
            self.findings.note(
                f"the weights are not those of the source with other scales (median error {usual:.2f}): rotated, or of "
                "another model; they were not judged"
            )
            return False
        for name, faults in self._strict.items():
            self.findings.faults += self._fitted[name][1] if self.is_fitted and name in self._fitted else faults
        return True


def fitted_to(weight: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The original [out, in] with the scale per column, then per row, that brings it nearest to `weight`.

    A fold (AWQ, SmoothQuant) multiplies columns; the producer that takes it off, its rows. Scales that are not positive
    are no folds: such columns and rows stay as they are.
    """
    import torch

    tiny = 1e-30
    columns = (weight * original).sum(0) / (original * original).sum(0).clamp(min=tiny)
    fitted = original * torch.where(columns > 0, columns, torch.ones_like(columns))
    rows = (weight * fitted).sum(1) / (fitted * fitted).sum(1).clamp(min=tiny)
    return fitted * torch.where(rows > 0, rows, torch.ones_like(rows))[:, None]
