"""From figures to words: which inputs are dangerous, why, and the cheapest thing to do about it.

Shape measures explain, the predicted output error decides: on current models kurtosis or max-to-median alone say little
about what quantization will cost. Without a predicted error (no sampled rows) the shapes have to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outlierq.core.measured.outliers import Danger


@dataclass(frozen=True)
class Threshold:
    """From `watch` on a figure deserves a look, from `dangerous` on it is one. says: in words, with {value}."""

    watch: float
    dangerous: float
    says: str
    source: str


# Relative output errors. 1e-3 is a signal-to-noise ratio of 30 dB, 1e-2 is 20 dB: plain int8 with two channels 60 times
# the others has 19.5 dB and breaks models, Gaussian inputs have 40 dB. Rounding Gaussian weights to 4 bits in groups of
# 128 costs 1.2e-2 in itself.
ERRORS = {
    "w8a8": Threshold(1e-3, 1e-2, "W8A8 would change {value:.2%} of the output's energy", "ours"),
    "w4a16": Threshold(3e-2, 1e-1, "W4A16 would change {value:.2%} of the output's energy", "ours"),
}
SHAPES = {
    "channel_ratio": Threshold(
        20, 100, "the largest channel is {value:.0f} times the median one", "arXiv:2211.10438: outliers are ~100 times"
    ),
    "largest_sigma": Threshold(
        30, 100, "the largest value is {value:.0f} standard deviations away", "arXiv:2304.07493: CNNs stay below 28"
    ),
    "kurtosis": Threshold(
        10, 100, "kurtosis {value:.0f}, a Gauss has 3", "arXiv:2306.12929: clean models 3 to 20, others above 100"
    ),
    "top_share": Threshold(0.3, 0.9, "1 % of the channels carry {value:.0%} of the energy", "ours"),
    "token_range": Threshold(
        10,
        100,
        "the largest tokens are {value:.0f} times the median one: they would set a static scale",
        "ours",
    ),
    "iqr_rate": Threshold(0.1, 0.3, "{value:.0%} of the values are beyond Tukey's fences, a Gauss has 0.7 %", "ours"),
}
# What to try, the least intrusive first. 16 bits is what is left when nothing else helps.
LADDER = ("smoothquant", "split", "rotation")
LAST_RESORT = "16 bits"
ADVICE = {
    "smoothquant": "smoothing (`smoothquant`, a scale folded into the producer)",
    "split": "keeping its outlier columns in 16 bits (`int8_split`)",
    "rotation": "a rotation",
    LAST_RESORT: "leaving it in 16 bits",
}
LEVELS: tuple[Danger, ...] = ("calm", "watch", "dangerous")
MOST_REASONS = 5


def verdict(measures: Mapping[str, float], errors: Mapping[str, float]) -> tuple[Danger, tuple[str, ...], str]:
    """(danger, reasons, remedy) of one input. errors: by scheme, and by "scheme remedy"."""
    by_error = {name: level(errors[name], limit) for name, limit in ERRORS.items() if name in errors}
    by_shape = {name: level(measures[name], limit) for name, limit in SHAPES.items() if name in measures}
    worst_shape = max(by_shape.values(), default=0)
    danger = max(by_error.values(), default=0) if by_error else worst_shape
    if worst_shape == 2:
        danger = max(danger, 1)
    remedy = cheapest_remedy(errors)
    reasons = [_cost(name, errors, remedy) for name in by_error if by_error[name]]
    shapes = sorted((name for name in by_shape if by_shape[name]), key=lambda name: -by_shape[name])
    reasons += [SHAPES[name].says.format(value=measures[name]) for name in shapes]
    return LEVELS[danger], tuple(reasons[:MOST_REASONS]) if danger else (), remedy


def level(value: float, limit: Threshold) -> int:
    """0 calm, 1 watch, 2 dangerous."""
    return (value >= limit.watch) + (value >= limit.dangerous)


def cheapest_remedy(errors: Mapping[str, float]) -> str:
    """The first of `LADDER` that makes W8A8 calm, else the best that at least halves the error; "" if none is needed.

    A dangerous error that nothing halves stays in 16 bits.
    """
    before, limit = errors.get("w8a8", 0.0), ERRORS["w8a8"]
    if before < limit.watch:
        return ""
    after = {name: errors[f"w8a8 {name}"] for name in LADDER if f"w8a8 {name}" in errors}
    enough = [name for name, error in after.items() if error < limit.watch]
    if enough:
        return enough[0]
    best = min(after, key=after.__getitem__, default="")
    if best and after[best] <= before / 2:
        return best
    return LAST_RESORT if before >= limit.dangerous else ""


def _cost(scheme: str, errors: Mapping[str, float], remedy: str) -> str:
    """The error in words, and what is left of it after the remedy."""
    says = ERRORS[scheme].says.format(value=errors[scheme])
    after = {"w8a8": errors.get(f"w8a8 {remedy}"), "w4a16": errors.get("w4a16 awq")}[scheme]
    if after is None or after >= errors[scheme]:
        return says
    name = {"w8a8": remedy, "w4a16": "awq"}[scheme]
    return f"{says}, {after:.2%} with {name}"
