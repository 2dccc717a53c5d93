"""`InputStats`: what calibration keeps of one linear input. Additive, and closed under transforms."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from outlierq.core.errors import NumbersError, StatsError

if TYPE_CHECKING:
    import torch

SUMS = ("sum_x", "sum_abs", "sum_sq", "sum_cube", "sum_fourth", "count_large", "sequence_large")
EXTREMES = {"min": "minimum", "max": "maximum", "first_abs_max": "maximum"}


@dataclass(frozen=True)
class InputStats:
    """Sufficient statistics of one input group over the calibration tokens; K is the number of channels.

    tokens, sequences: how many were seen (padding and skipped first tokens excluded).
    min, max: [K] float32. sum_x, sum_abs, sum_sq, sum_cube, sum_fourth: [K] float64 power sums.
    count_large: [K] tokens with |x| >= 6; sequence_large: [K] sum over sequences of the share of such positions
    (the LLM.int8() criterion, arXiv:2208.07339 section 3). first_abs_max: [K] largest |x| at position 0 of a sequence.
    hessian: [K, K] float32, (1 / tokens) * sum of x x^T. rows: [R, K] bfloat16 reservoir of whole tokens.
    first_rows: [sequences, K] float32, the first token of every sequence (usually an attention sink).
    A field that the recipe did not need is None.
    """

    tokens: int
    sequences: int
    min: torch.Tensor | None = None
    max: torch.Tensor | None = None
    sum_x: torch.Tensor | None = None
    sum_abs: torch.Tensor | None = None
    sum_sq: torch.Tensor | None = None
    sum_cube: torch.Tensor | None = None
    sum_fourth: torch.Tensor | None = None
    count_large: torch.Tensor | None = None
    sequence_large: torch.Tensor | None = None
    first_abs_max: torch.Tensor | None = None
    hessian: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    first_rows: torch.Tensor | None = None

    def need(self, name: str) -> torch.Tensor:
        """The field or derived statistic `name`; StatsError when it was not kept, NumbersError when it holds a NaN."""
        value = getattr(self, name)
        if value is None:
            raise StatsError(
                f"the statistics do not hold `{name}`", hint="calibrate again: `outlierq calibrate` keeps everything"
            )
        if not value.isfinite().all():
            raise NumbersError(f"the statistic `{name}` holds a NaN or Inf", hint="calibrate again")
        return value

    @property
    def channels(self) -> int:
        """Number of input channels K."""
        return next(t.shape[-1] for t in self.tensors().values())

    @property
    def mean(self) -> torch.Tensor | None:
        """[K] float32 mean over tokens."""
        return None if self.sum_x is None else (self.sum_x / self.tokens).float()

    @property
    def abs_mean(self) -> torch.Tensor | None:
        """[K] float32 mean of |x| over tokens."""
        return None if self.sum_abs is None else (self.sum_abs / self.tokens).float()

    @property
    def abs_max(self) -> torch.Tensor | None:
        """[K] float32 largest |x|."""
        return None if self.min is None or self.max is None else (-self.min).maximum(self.max)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("tokens", "sequences")}
        return {name: value for name, value in values.items() if value is not None}

    def merge(self, other: InputStats) -> InputStats:
        """Statistics of both halves of the data. Associative up to floating-point rounding.

        Both sides must hold the same fields. The reservoirs are concatenated.
        """
        import torch

        tokens = self.tokens + other.tokens
        merged: dict[str, torch.Tensor] = {}
        for name, mine in self.tensors().items():
            theirs = other.need(name)
            if name in SUMS:
                merged[name] = mine + theirs
            elif name in EXTREMES:
                merged[name] = getattr(torch, EXTREMES[name])(mine, theirs)
            elif name == "hessian":
                merged[name] = mine * (self.tokens / tokens) + theirs * (other.tokens / tokens)
            else:
                merged[name] = torch.cat([mine, theirs])
        return replace(self, tokens=tokens, sequences=self.sequences + other.sequences, **merged)

    def weighing_sinks(self, weight: float) -> InputStats:
        """The same with the first token of every sequence counted `weight` times in the hessian.

        Every later token attends to it, so an error there is paid many times (docs/what-we-learned.md). Statistics
        without first tokens (routed or skipped ones) are returned as they are.
        """
        if self.hessian is None or self.first_rows is None:
            return self
        first = self.first_rows.float()
        total = self.tokens + (weight - 1) * len(first)
        weighed = (self.hessian * self.tokens).addmm_(first.T, first, alpha=weight - 1).div_(total)
        return replace(self, hessian=weighed, first_rows=None)

    def scaled(self, scale: torch.Tensor) -> InputStats:
        """Statistics of x' = x / scale, for scale [K] > 0. H' = H / (s s^T) (methods sheet, section 0.3)."""
        wide = scale.double()
        powers = {"sum_x": 1, "sum_abs": 1, "sum_sq": 2, "sum_cube": 3, "sum_fourth": 4}
        changed: dict[str, torch.Tensor] = {}
        for name, value in self.tensors().items():
            if name in powers:
                changed[name] = value / wide ** powers[name]
            elif name in EXTREMES:
                changed[name] = value / scale
            elif name == "hessian":
                changed[name] = value / (scale[:, None] * scale[None, :])
            elif name in ("rows", "first_rows"):
                changed[name] = (value.float() / scale).to(value.dtype)
        # How often a threshold is passed cannot be derived for the scaled input.
        return replace(self, **changed, count_large=None, sequence_large=None)
