"""What a method that solves by a factor of the hessian loses, foretold without solving.

GPTQ is Babai's nearest plane algorithm (Chen et al. 2025, arXiv:2507.18553): a row loses the sum of (R_jj d_j)^2, where
H = R R^T and d_j is what the rounding of column j's weight lost, shifted by those before it. Shifted weights are
rounded about as well as the weights themselves. So rounding some rows to nearest, by pivots R_jj^2, tells what every
scheme loses. One scheme is carried through the factor, which shows what the tokens weigh at which the error is large,
and that damping is none of it. What is left, a factor that is about the same for all linears and schemes, is measured:
some of the samples are rounded by the method itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from outlierq.core.model import LinearSite
from outlierq.core.scheme import QuantScheme
from outlierq.pipeline.fitting.sampled import Loss, Sample

if TYPE_CHECKING:
    import torch

    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.stats import InputStats
    from outlierq.ops.solve import Factor
    from outlierq.registry import Method

# From the scheme of one measurement to that of the next: all are met in turn, and neighbours are unlike.
STRIDE = 7
Samples = Mapping[LinearSite, Sample]
Losses = dict[LinearSite, dict[QuantScheme, Loss]]


@dataclass(frozen=True)
class Solved:
    """An input as a method sees it. pivots: [in], what the squared rounding error of each column counts.

    factor: None where there is none, and the method rounds to nearest.
    """

    pivots: torch.Tensor
    factor: Factor | None

    @classmethod
    def of(cls, hessian: torch.Tensor, damp: float) -> Solved:
        """By the factor of a hessian [in, in], columns with large inputs first, as methods take them."""
        from outlierq.core.errors import NumbersError
        from outlierq.ops.solve import factored

        try:
            factor = factored(hessian, damp, hessian.diagonal().argsort(descending=True, stable=True))
        except NumbersError:
            return cls(hessian.diagonal(), None)
        return cls(factor.pivots(), factor)

    def change(self, errors: torch.Tensor) -> torch.Tensor:
        """Q - W [n, in] of rows whose rounding errs by `errors` [n, in]."""
        return errors if self.factor is None else self.factor.swept(errors)


@dataclass(frozen=True)
class Foretelling:
    """How the losses of a method are foretold. ratios: of what it lost to what was foretold, where it was asked."""

    method: Method
    options: Mapping[str, Any]
    ratios: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """What foretold losses have to be taken times."""
        return median(self.ratios) if self.ratios else 1.0

    def losses(self, samples: Samples, solved: Solved, schemes: Sequence[QuantScheme]) -> Losses:
        """Of linears with one input in every scheme, but for the rate."""
        lost = {scheme: _weighed(samples, _rounding_errors(samples, scheme, solved), solved) for scheme in schemes}
        middle = _middle({scheme: sum(each.values()) for scheme, each in lost.items()})
        changes = _by_site(samples, solved.change(_rounding_errors(samples, middle, solved)))
        found: Losses = {}
        for site, sample in samples.items():
            carried, base = sample.loss(changes[site]), lost[middle][site]
            found[site] = {s: carried.times(each[site] / base if base > 0 else 0.0) for s, each in lost.items()}
        return found

    def measure(self, samples: Samples, stats: InputStats, losses: Losses) -> None:
        """Let the method itself round the rows to one of the schemes, each time to another one."""
        schemes = list(next(iter(losses.values())))
        scheme = schemes[STRIDE * len(self.ratios) % len(schemes)]
        changes = changes_by(self.method, self.options, samples, stats, scheme)
        lost = sum(samples[site].loss(change).total(1.0) for site, change in changes.items())
        foretold = sum(each[scheme].total(1.0) for each in losses.values())
        if lost > 0 and foretold > 0:
            self.ratios.append(lost / foretold)


def changes_by(
    used: Method, options: Mapping[str, Any], samples: Samples, stats: InputStats | None, scheme: QuantScheme
) -> dict[LinearSite, torch.Tensor]:
    """How the sampled rows [n, in] of linears with one input change when a method rounds all of them at once."""
    rows = _rows(samples)
    rounded: QuantTensor = used.function(rows.clone(), stats, scheme, **options)
    return _by_site(samples, rounded.dequantize().sub_(rows))


def _rounding_errors(samples: Samples, scheme: QuantScheme, solved: Solved) -> torch.Tensor:
    """What rounding all rows to nearest changes, [n, in]."""
    from outlierq.ops.grid import from_groups, in_groups
    from outlierq.ops.search.scale_search import quick_grid

    rows = _rows(samples)
    rounded = quick_grid(rows, scheme, solved.pivots).round(in_groups(rows, scheme))
    return from_groups(rounded, rows.shape[1]).sub_(rows)


def _weighed(samples: Samples, errors: torch.Tensor, solved: Solved) -> dict[LinearSite, float]:
    """What errors [n, in] of all rows count, linear by linear."""
    by_row = _by_site(samples, errors.square() @ solved.pivots)
    return {site: (sample.weighs @ by_row[site]).item() for site, sample in samples.items()}


def _middle(lost: Mapping[QuantScheme, float]) -> QuantScheme:
    """The scheme in the middle of those that lose something."""
    order = sorted(lost, key=lambda scheme: (lost[scheme], str(scheme)))
    return order[(bisect_right(sorted(lost.values()), 0.0) + len(order)) // 2 if lost[order[-1]] > 0 else 0]


def _rows(samples: Samples) -> torch.Tensor:
    """Those of all linears, [n, in]."""
    import torch

    return torch.cat([sample.rows for sample in samples.values()])


def _by_site(samples: Samples, rows: torch.Tensor) -> dict[LinearSite, torch.Tensor]:
    """[n, ...] of all rows, linear by linear."""
    return dict(zip(samples, rows.split([len(sample.rows) for sample in samples.values()]), strict=True))
