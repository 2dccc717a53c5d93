"""A result of which no report says how it was made: its folds are guessed, and judged by what a fold can do."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from outlierq.pipeline.checking.finding import Fault, Findings
from outlierq.pipeline.checking.weights import FOREIGN, Grid, judge_weight

if TYPE_CHECKING:
    import torch


class Guess:
    """Judges weights whose folds are not known: as they are, else after positive scales per column and row.

    may_be_folded: whether anything else in the checkpoint shows that there were folds: gains that differ from the
    source's. Without that no scale is fitted. findings: get the faults once all weights were seen (`judge`).
    """

    def __init__(self, findings: Findings, *, may_be_folded: bool):
        self.findings, self.may_be_folded = findings, may_be_folded
        self.errors: dict[str, float] = {}
        self._faults: dict[str, list[Fault]] = {}

    def add(self, name: str, weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> float:
        """Look at one weight, float32 [out, in]; gives its relative error."""
        findings = Findings()
        error = judge_weight(name, weight, expected, grid, findings)
        if findings.faults and self.may_be_folded:
            fitted = fitted_to(weight, expected)
            again = Findings()
            after = judge_weight(name, weight, fitted, grid, again)
            if after < error:
                findings, error = again, after
        self._faults[name] = findings.faults
        self.errors[name] = error
        return error

    def judge(self, *, other_tables: bool, may_be_ordered: bool) -> bool:
        """Judge the weights against each other; whether they were judged. other_tables: embeddings differ, too.

        may_be_ordered: the format is one whose writer puts channels into another order.
        """
        if not self.errors:
            return True
        usual = median(self.errors.values())
        if may_be_ordered and any(error > FOREIGN for error in self.errors.values()):
            self.findings.note("the order of channels is not known without the report; the weights were not judged")
            return False
        if usual > FOREIGN and other_tables:
            self.findings.note(
                f"the weights are not those of the source with other scales (median error {usual:.2f}): rotated, or of "
                "another model; they were not judged"
            )
            return False
        for faults in self._faults.values():
            self.findings.faults += faults
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
