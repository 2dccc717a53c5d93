"""The quality gate: limits on a measured divergence, and exit code 3 when one is passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.errors import GateError, OutlierqError

if TYPE_CHECKING:
    from outlierq.evaluate.divergence import Divergence


@dataclass(frozen=True)
class GateRow:
    """One limit. name: measure with its unit. relation: "<=" or ">=", as in `value relation limit`."""

    name: str
    value: float
    relation: str
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the value keeps the limit; a value equal to the limit does."""
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return f"{verdict}  {self.name:<34} {self.value:>10.5g} {self.relation} {self.limit:<10.5g}".rstrip()


def check_gate(
    divergence: Divergence,
    *,
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    min_top1: float | None = None,
) -> list[GateRow]:
    """One row for every limit that is given.

    max_kl: nats per token. max_perplexity_increase: relative, 0.05 allows 5 % over the reference.
    min_top1: share of positions, 0..1. Raises when the divergence was measured without a reference.
    """
    limits = (
        ("KL divergence per token (nats)", divergence.kl_per_token, "<=", max_kl),
        ("perplexity increase (relative)", _perplexity_increase(divergence), "<=", max_perplexity_increase),
        ("top-1 agreement (share)", divergence.top1_agreement, ">=", min_top1),
    )
    return [
        GateRow(name, _known(name, value), relation, limit)
        for name, value, relation, limit in limits
        if limit is not None
    ]


def raise_if_failed(rows: Sequence[GateRow]) -> None:
    """GateError with the table of all rows when one of them failed."""
    failed = [row for row in rows if not row.passed]
    if failed:
        table = "\n".join(f"  {row}" for row in rows)
        raise GateError(
            f"{len(failed)} of {len(rows)} quality limits failed\n{table}",
            hint="use more bits, smaller groups or a stronger method, or widen the limit",
        )


def _perplexity_increase(divergence: Divergence) -> float | None:
    """Relative increase over the reference, None without one."""
    if divergence.reference_perplexity is None:
        return None
    return divergence.perplexity / divergence.reference_perplexity - 1


def _known(name: str, value: float | None) -> float:
    """The value, or an error that says how to get it."""
    if value is None:
        raise OutlierqError(f"the gate needs {name}, which is unknown", hint="measure with the original as reference")
    return value
