"""`InputStats`: what calibration keeps of one linear input. Additive, and closed under transforms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from outlierq.core.errors import NumbersError, StatsError
from outlierq.core.measured.block_stats import TOP_COLUMNS

if TYPE_CHECKING:
    import torch

    from outlierq.core.move import Move

SUMS = (
    "sum_x", "sum_abs", "sum_sq", "sum_cube", "sum_fourth", "count_large", "sequence_large", "count_huge",
    "log2_histogram", "token_histogram",
)  # fmt: skip
# What cannot be derived for a scaled input: how often a threshold is passed, and which channel of a token is largest.
THRESHOLDED = ("count_large", "sequence_large", "count_huge", "log2_histogram", "token_histogram", "top_tokens")
TABLES = ("log2_histogram", "token_histogram", "top_tokens")  # those whose last axis is not the channels
# Sums over tokens, wherever they stand, and averages: what tokens of another text may be mixed into.
OF_TOKENS = frozenset({"hessian", "cross", *SUMS}) - {"sequence_large", *TABLES}
LOG2_BINS, LOG2_LOWEST = 48, -24
TOKEN_BINS = 64
TOP_TOKENS = 20
SEQUENCE, VALUE = TOP_COLUMNS.index("sequence"), TOP_COLUMNS.index("value")
EXTREMES = {"min": "minimum", "max": "maximum", "first_abs_max": "maximum"}
# Of inputs beside what they are in another run of the model, or before they are rounded.
PAIRED = ("cross", "first_change", "first_rounded")


@dataclass(frozen=True)
class InputStats:
    """Sufficient statistics of one input group over the calibration tokens; K is the number of channels.

    tokens, sequences: how many were seen (padding and skipped first tokens excluded).
    min, max: [K] float32, smallest and largest value of each channel. sum_x, sum_abs, sum_sq, sum_cube, sum_fourth: [K]
    float64 power sums.
    count_large: [K] tokens with |x| >= 6; sequence_large: [K] sum over sequences of the share of such positions
    (the LLM.int8() criterion, arXiv:2208.07339 section 3). first_abs_max: [K] largest |x| at position 0 of a sequence.
    hessian: [K, K] float32, (1 / tokens) * sum of x x^T. rows: [R, K] bfloat16 reservoir of whole tokens.
    first_rows: [sequences, K] float32, the first token of every sequence (usually an attention sink).
    count_huge: [K] tokens with |x| >= 20. log2_histogram: [K, 48] int32, bin b counts |x| in [2^(b-24), 2^(b-23)); what
    is below (zeros, too) is in bin 0, what is above in bin 47. It is of a sample of the tokens, about every third; a
    row's sum is their number. token_histogram: [64] int64, tokens by floor(2 log2(max over channels of |x|)) + 32,
    clipped to the bins. top_tokens: [<= 20, 6] float32, the tokens with the largest |x|, largest first, a row a token
    (columns: `TOP_COLUMNS` of core/measured/block_stats.py, where the median is the lower one of two middle values; the
    token id is -1 where it is not known).
    cross: [K, K] float32, (1 / tokens) * sum of (x0 - x) x^T, with x0 the same token's input in the original model,
    where x is what it is behind the quantized blocks, or as it is rounded; then the hessian is that of rounded inputs,
    too. first_change, first_rounded: [sequences, K] float32, of first tokens x0 - x, and x where it is rounded.
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
    count_huge: torch.Tensor | None = None
    log2_histogram: torch.Tensor | None = None
    token_histogram: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    first_change: torch.Tensor | None = None
    first_rounded: torch.Tensor | None = None

    def need(self, name: str) -> torch.Tensor:
        """The field or derived statistic `name`; StatsError when it was not kept, NumbersError when it holds a NaN."""
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise StatsError(
                f"the statistics do not hold `{name}`", hint="calibrate again: `outlierq calibrate` keeps everything"
            )
        # A sum is read several times faster than every value; it is not finite when a value is not, or on overflow.
        if not (value.sum().isfinite() or value.isfinite().all()):
            raise NumbersError(f"the statistic `{name}` holds a NaN or Inf", hint="calibrate again")
        return value

    @property
    def channels(self) -> int:
        """Number of input channels K."""
        return next(t.shape[-1] for name, t in self.tensors().items() if name not in TABLES)

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

        Both sides must hold the same fields. The reservoirs are concatenated; the sequences of `other` come after ours.
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
            elif name in ("hessian", "cross"):
                merged[name] = (mine * (self.tokens / tokens)).add_(theirs, alpha=other.tokens / tokens)
            elif name == "top_tokens":
                merged[name] = largest_entries(torch.cat([mine, _later(theirs, self.sequences)]), TOP_TOKENS)
            else:
                merged[name] = torch.cat([mine, theirs])
        return replace(self, tokens=tokens, sequences=self.sequences + other.sequences, **merged)

    def weighing_sinks(self, weight: float) -> InputStats:
        """`weigh_sinks` of copies."""
        copies = {name: value.clone() for name, value in self.tensors().items() if name in ("hessian", "cross")}
        return replace(self, tokens=self.tokens, sequences=self.sequences, **copies).weigh_sinks(weight)

    def weigh_sinks(self, weight: float) -> InputStats:
        """The same with the first token of every sequence counted `weight` times in the hessian, which is changed.

        Every later token attends to it, so an error there is paid many times (docs/what-we-learned.md). `sum_x` and
        `cross` are weighed alike, so that they fit the hessian. Statistics without first tokens (routed or skipped
        ones) are returned as they are.
        """
        if self.hessian is None or self.first_rows is None:
            return self
        first = (self.first_rows if self.first_rounded is None else self.first_rounded).float()
        total = self.tokens + (weight - 1) * len(first)
        weighed = self.hessian.mul_(self.tokens).addmm_(first.T, first, alpha=weight - 1).div_(total)
        sums = self.sum_x
        if sums is not None:
            sums = (sums + (weight - 1) * self.first_rows.double().sum(0)) * (self.tokens / total)
        cross = self.cross
        if cross is not None and self.first_change is not None:
            cross = cross.mul_(self.tokens).addmm_(self.first_change.T, first, alpha=weight - 1).div_(total)
        return replace(self, hessian=weighed, sum_x=sums, cross=cross)

    def moved(self, move: Move) -> InputStats:
        """Statistics of x' = (x - shift) / scale."""
        return (self if move.shift is None else self.shifted(move.shift)).scaled(move.scale)

    def scaled(self, scale: torch.Tensor) -> InputStats:
        """Statistics of x' = x / scale, for scale [K] > 0. H' = H / (s s^T)."""
        wide = scale.double()
        powers = {"sum_x": 1, "sum_abs": 1, "sum_sq": 2, "sum_cube": 3, "sum_fourth": 4}
        changed: dict[str, torch.Tensor] = {}
        for name, value in self.tensors().items():
            if name in powers:
                changed[name] = value / wide ** powers[name]
            elif name in EXTREMES:
                changed[name] = value / scale
            elif name in ("hessian", "cross"):
                changed[name] = value / (scale[:, None] * scale[None, :])
            elif name in ("rows", "first_rows", "first_change", "first_rounded"):
                changed[name] = (value.float() / scale).to(value.dtype)
        return self._with(changed)

    def shifted(self, shift: torch.Tensor) -> InputStats:
        """Statistics of x' = x - shift, for shift [K]. H' = H - z m^T - m z^T + z z^T with m the mean of x."""
        if self.cross is not None:
            raise StatsError("paired inputs cannot be shifted", hint="use transforms that only scale with this method")
        sum_x, wide = self.need("sum_x"), shift.double()
        mean = sum_x / self.tokens
        changed: dict[str, torch.Tensor | None] = dict.fromkeys(("sum_abs", "sum_sq", "sum_cube", "sum_fourth"))
        changed["sum_x"] = sum_x - self.tokens * wide
        for name in ("min", "max", "rows", "first_rows"):
            value = getattr(self, name)
            changed[name] = None if value is None else (value.float() - shift).to(value.dtype)
        if self.hessian is not None:
            cross = wide[:, None] * mean
            moved = self.hessian.double() - cross - cross.T + wide[:, None] * wide
            changed["hessian"] = moved.to(self.hessian.dtype)
        first = changed["first_rows"]
        changed["first_abs_max"] = None if first is None else first.float().abs().amax(0)
        return self._with(changed)

    def _with(self, changed: Mapping[str, torch.Tensor | None]) -> InputStats:
        """With these fields changed, and without what cannot be derived for a changed input."""
        gone: dict[str, None] = dict.fromkeys(THRESHOLDED)
        return replace(self, tokens=self.tokens, sequences=self.sequences, **changed, **gone)


FIELDS = tuple(field.name for field in fields(InputStats) if field.name not in ("tokens", "sequences"))
DERIVED = {"mean": ("sum_x",), "abs_mean": ("sum_abs",), "abs_max": ("min", "max")}  # and the fields behind them


def largest_entries(table: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` rows of a table [n, 6] of extreme entries (`TOP_COLUMNS`) with the largest |value|, largest first.

    Of equal ones the earlier row comes first, so that the result does not depend on how the data was cut.
    """
    order = table[:, VALUE].abs().argsort(descending=True, stable=True)
    return table[order[:count]]


def _later(table: torch.Tensor, sequences: int) -> torch.Tensor:
    """The table with its sequences counted from `sequences` on."""
    moved = table.clone()
    moved[:, SEQUENCE] += sequences
    return moved
