"""Stage 3: all measures of one input group and of one block. What cannot be measured is said, never skipped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from outlierq.core.errors import NumbersError, StatsError
from outlierq.core.measured.outliers import BlockOutliers, ChannelOutliers, GroupOutliers, MassiveEntry
from outlierq.detect import output_error
from outlierq.detect.blocks.massive import massive_entries, persistent_share, super_weight
from outlierq.detect.blocks.sinks import no_op_heads, sink_heads
from outlierq.detect.inputs import channel_ratio, iqr_rate, kurtosis, qsur, sigma_rate
from outlierq.detect.inputs.concentration import top_share
from outlierq.detect.inputs.llm_int8 import large_share
from outlierq.detect.inputs.token_range import token_range
from outlierq.detect.sample import spread
from outlierq.detect.verdict import ERRORS, verdict
from outlierq.detect.weights import farms, hill, spectrum
from outlierq.detect.weights.owl import outlier_ratio
from outlierq.ops.by_output import dimension_ratio

if TYPE_CHECKING:
    from outlierq.core.measured.block_stats import BlockStats
    from outlierq.core.model import InputGroup, LinearSite
    from outlierq.core.scheme import QuantScheme
    from outlierq.core.stats import InputStats

T = TypeVar("T")
# Values that quartiles and tails of a whole input are estimated from: a rate of 0.7 % is then known to 7 %.
SAMPLED_VALUES = 1 << 15
# Channels of which every measure is kept: those with the largest |x|.
LISTED_CHANNELS = 16
# Rows that tell in which dimension groups err less.
BY_OUTPUT_ROWS = 512
Weights = Mapping["LinearSite", torch.Tensor]


class Findings:
    """Figures by name, and for those that could not be had the reason."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._reasons: dict[str, list[str]] = {}

    def take(self, name: str, measure: Callable[[], float]) -> float | None:
        """Keep the figure that `measure` returns; a figure that is not finite, or an error of ours, is missing."""
        value = self.attempt(name, measure)
        if value is not None and not math.isfinite(value):
            self.miss(name, "it is not a finite number for these values")
        elif value is not None:
            self.values[name] = value
        return value

    def attempt(self, name: str, measure: Callable[[], T]) -> T | None:
        """The result of `measure`, or None and a missing entry."""
        try:
            return measure()
        except (StatsError, NumbersError) as error:
            self.miss(name, f"{error.what} ({error.hint})" if error.hint else error.what)
            return None

    def miss(self, name: str, reason: str) -> None:
        """Say why `name` is not there."""
        self._reasons.setdefault(reason, []).append(name)

    def take_over(self, other: Findings) -> None:
        """What `other` misses is missing here, too."""
        for reason, names in other._reasons.items():
            self._reasons.setdefault(reason, []).extend(names)

    @property
    def missing(self) -> tuple[str, ...]:
        """One entry a reason: "sigma_rate, iqr_rate: the statistics do not hold `rows` (calibrate again)"."""
        return tuple(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in self._reasons.items())


def measure_group(block: int, group: InputGroup, stats: InputStats | None, weights: Weights) -> GroupOutliers:
    """Everything about one input. weights: [out, in] of every site of the group."""
    names = tuple(site.module for site in group.sites)
    head: dict[str, Any] = {"group": group.name, "block": block, "role": role(group.name), "sites": names}
    if stats is None or not stats.tokens:
        reason = "no token reached it during calibration (calibrate on more text, or add it to `quantize.ignore`)"
        missing = (f"every measure of the input: {reason}",)
        by_site, findings = {}, Findings()
        for site, weight in weights.items():
            by_site[site.module] = _measure_weight(weight, findings)
        return GroupOutliers(
            **head, tokens=0, abs_max=(), weights=by_site, danger="watch", missing=missing + findings.missing,
            reasons=("no token reached it: nothing is known about its input",),
        )  # fmt: skip
    findings = Findings()
    _measure_input(stats, findings)
    abs_max = findings.attempt("abs_max", lambda: stats.need("abs_max"))
    outliers = findings.attempt("outlier_channels", lambda: channel_ratio.standing_out(_ratios(stats)))
    by_site, errors = _measure_sites(group, stats, weights, findings)
    danger, reasons, remedy = verdict(findings.values, errors)
    if any("NaN or Inf" in reason for reason in findings.missing):
        danger, reasons = "dangerous", ("its statistics or weights hold NaN or Inf", *reasons)
    return GroupOutliers(
        **head,
        tokens=stats.tokens,
        abs_max=() if abs_max is None else tuple(abs_max.tolist()),
        outlier_channels=outliers or (),
        top_channels=() if abs_max is None else _listed_channels(stats, abs_max, findings),
        measures=findings.values,
        weights=by_site,
        errors=errors,
        remedy=remedy,
        danger=danger,
        reasons=reasons,
        missing=findings.missing,
    )


def _ratios(stats: InputStats) -> torch.Tensor:
    """[K] of every channel to the median one."""
    return channel_ratio.channel_ratios(stats.need("abs_max"))


def role(name: str) -> str:
    """The name without the block and other numbers: "model.layers.3.mlp.experts.5.up_proj" is "mlp.experts.up_proj"."""
    after_block = re.sub(r"^.*?\.\d+\.", "", name, count=1)
    return re.sub(r"\.\d+(?=\.|$)", "", after_block)


def _measure_input(stats: InputStats, findings: Findings) -> None:
    """The shape of the whole input."""
    findings.take("channel_ratio", lambda: channel_ratio.channel_ratio(stats))
    findings.take("top_share", lambda: top_share(stats))
    findings.take("kurtosis", lambda: kurtosis.kurtosis(stats))
    findings.take("largest_sigma", lambda: sigma_rate.largest_sigma(stats))
    findings.take("large_share", lambda: large_share(stats))
    findings.take("token_range", lambda: token_range(stats))
    covariance = findings.attempt("log_qsur, rotation_gain", lambda: qsur.covariance(stats))
    if covariance is not None:
        findings.take("log_qsur", lambda: qsur.log_qsur(covariance))
        findings.take("rotation_gain", lambda: qsur.rotation_gain(covariance))
    rows = findings.attempt("sigma_rate, iqr_rate, hill_alpha", lambda: stats.need("rows"))
    if rows is not None:
        sample = spread(rows, max(8, SAMPLED_VALUES // rows.shape[1])).float()
        findings.take("sigma_rate", lambda: sigma_rate.sigma_rate(stats, sample))
        findings.take("iqr_rate", lambda: iqr_rate.iqr_rate(sample.flatten()).item())
        findings.take("hill_alpha", lambda: hill.hill_alpha(sample.abs()))


def _listed_channels(stats: InputStats, abs_max: torch.Tensor, findings: Findings) -> tuple[ChannelOutliers, ...]:
    """Every measure of the channels with the largest |x|, largest first; None where a channel has no such figure."""
    largest = abs_max.topk(min(LISTED_CHANNELS, len(abs_max))).indices

    def columns() -> torch.Tensor:
        return stats.need("rows")[:, largest].float()

    table = {
        "ratio": lambda: channel_ratio.channel_ratios(abs_max)[largest],
        "kurtosis": lambda: kurtosis.channel_kurtosis(stats)[largest],
        "sigma_rate": lambda: sigma_rate.column_sigma_rate(columns()),
        "iqr_rate": lambda: iqr_rate.iqr_rate(columns()),
        "hill_alpha": lambda: hill.hill_alphas(columns().abs()),
    }
    measured = {name: findings.attempt(f"{name} of channels", measure) for name, measure in table.items()}
    lists = {name: values.tolist() for name, values in measured.items() if values is not None}
    return tuple(
        ChannelOutliers(
            channel=channel,
            abs_max=abs_max[channel].item(),
            **{name: values[place] for name, values in lists.items() if math.isfinite(values[place])},
        )
        for place, channel in enumerate(largest.tolist())
    )


def _measure_weight(weight: torch.Tensor, findings: Findings) -> dict[str, float]:
    """The spectrum of one weight; what is missing goes into `findings`."""
    own = Findings()
    if not _finite(weight):
        bad = int((~weight.isfinite()).sum())
        findings.miss(
            "alpha, stable_rank", f"{bad} of {weight.numel()} weights are NaN or Inf (get the checkpoint again)"
        )
        return {}
    own.take("alpha", lambda: farms.spectrum_alpha(weight))
    own.take("stable_rank", lambda: spectrum.stable_rank(weight))
    findings.take_over(own)
    return own.values


def _finite(weight: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf; the sum shows it several times faster than a look at every value."""
    return bool(weight.sum(dtype=torch.float32).isfinite() or weight.isfinite().all())


def _measure_sites(
    group: InputGroup, stats: InputStats, weights: Weights, findings: Findings
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Figures by site, and the predicted errors of the group by scheme."""
    by_site = {site.module: _measure_weight(weight, findings) for site, weight in weights.items()}
    if not all(map(_finite, weights.values())):
        return by_site, {}
    wide = {site.module: weight.float() for site, weight in weights.items()}
    stack = torch.cat(list(wide.values()))
    errors = _predict_group(group, stats, stack, findings)
    findings.take("by_output", lambda: _by_output(stack, stats))
    for scheme, grid in _schemes(group).items():
        if scheme not in errors:
            continue
        for site, weight in wide.items():
            alone = len(wide) == 1  # then the group's figure is its own
            by_site[site][scheme] = errors[scheme] if alone else _predict(weight, stats, grid)
    return by_site, errors


def _by_output(stack: torch.Tensor, stats: InputStats) -> float:
    """AdaDim's ratio at 4 bits: below 1, single channels spoil the groups that they lie in. stack: [outputs, in]."""
    scheme = output_error.w4a16(stack.shape[1])
    most, size = min(BY_OUTPUT_ROWS, len(stack)), scheme.group_size or 1
    rows = most // size * size or most  # whole groups, so that both ways spend the same bits
    return dimension_ratio(spread(stack, rows), stats.need("hessian"), scheme)


def _schemes(group: InputGroup) -> dict[str, QuantScheme]:
    """The schemes whose cost is predicted."""
    width = group.sites[0].in_features
    return {"w8a8": output_error.W8A8, "w4a16": output_error.w4a16(width), **output_error.block_floats(width)}


def _predict(weight: torch.Tensor, stats: InputStats, scheme: QuantScheme, scale: torch.Tensor | None = None) -> float:
    """The predicted error; weight-only schemes are judged by the hessian, so they need it."""
    if scheme.activations is None:
        stats.need("hessian")
    return output_error.predicted_error(weight, stats, scheme, scale)


def _predict_group(group: InputGroup, stats: InputStats, stack: torch.Tensor, findings: Findings) -> dict[str, float]:
    """Predicted errors of all sites together, as they are and with the remedies. stack: [all outputs, in] float32.

    A rotation is tried only where nothing cheaper is enough: it changes the whole model.
    """
    errors, schemes = Findings(), _schemes(group)
    for name, scheme in schemes.items():
        errors.take(name, partial(_predict, stack, stats, scheme))
    if "w8a8" in errors.values:
        _predict_folded(group, stats, stack, errors)
        columns = errors.attempt("w8a8 split", partial(output_error.split_columns, stack, stats))
        if columns is not None:
            errors.take("w8a8 split", partial(output_error.split_error, stack, stats, columns))
        if min(value for name, value in errors.values.items() if name.startswith("w8a8")) >= ERRORS["w8a8"].watch:
            errors.take("w8a8 rotation", partial(output_error.rotated_error, stack, stats))
    findings.take_over(errors)
    return errors.values


def _predict_folded(group: InputGroup, stats: InputStats, stack: torch.Tensor, errors: Findings) -> None:
    """Scales, which need a producer to absorb their inverse."""
    if group.fold is None:
        why = group.fold_note or "the calibration found none"
        errors.miss(
            "w8a8 smoothquant, w4a16 awq",
            f"no norm or linear can absorb a scale of this input: {why} (a rotation or a split needs none)",
        )
        return
    tie = torch.tensor(group.fold.index)
    scales = {
        "w8a8 smoothquant": partial(output_error.smoothquant_scale, stack, stats, tie),
        "w4a16 awq": partial(output_error.awq_scale, stats, tie),
    }
    for name, choose in scales.items():
        scale = errors.attempt(name, choose)
        if scale is not None and name.split()[0] in errors.values:
            errors.take(name, partial(_predict, stack, stats, _schemes(group)[name.split()[0]], scale))


def measure_block(
    block: int, stats: BlockStats | None, inputs: Mapping[str, InputStats], weights: Mapping[str, Weights]
) -> BlockOutliers:
    """The residual stream, the attention and the OWL ratio of one block.

    inputs, weights: by group name; a weight is [out, in].
    """
    findings = Findings()
    owl = findings.attempt("owl", lambda: _owl(inputs, weights))
    massive: tuple[MassiveEntry, ...] = ()
    if stats is None:
        findings.miss("residual stream and attention", "the statistics hold no block statistics (calibrate again)")
    else:
        massive = findings.attempt("massive", lambda: massive_entries(block, stats)) or ()
        _measure_stream(stats, findings)
    return BlockOutliers(block=block, owl=owl, measures=findings.values, massive=massive, missing=findings.missing)


def _measure_stream(stats: BlockStats, findings: Findings) -> None:
    """Residual stream, attention, cache, experts."""
    findings.take("residual_abs_max", lambda: stats.need("residual_abs_max").max().item())
    findings.take("residual_median", lambda: stats.need("residual_median").item())
    findings.take("residual_kurtosis", lambda: stats.need("residual_kurtosis")[0].item())
    findings.take("residual_kurtosis_max", lambda: stats.need("residual_kurtosis")[1].item())
    findings.take("persistent_share", lambda: persistent_share(stats))
    findings.take("sink_heads", lambda: sink_heads(stats))
    findings.take("no_op_heads", lambda: no_op_heads(stats))
    findings.take("key_abs_max", lambda: stats.need("key_abs_max").max().item())
    findings.take("value_abs_max", lambda: stats.need("value_abs_max").max().item())
    if stats.expert_tokens is not None:
        findings.take("fewest_expert_tokens", lambda: float(stats.need("expert_tokens").min().item()))


def _owl(inputs: Mapping[str, InputStats], weights: Mapping[str, Weights]) -> float:
    """OWL over every site whose input was seen; an error names one that was not."""
    linears = []
    for name, sites in weights.items():
        if name not in inputs or not inputs[name].tokens:
            raise StatsError(f"no token reached {name}, so its weights cannot be ranked with the others")
        rms = (inputs[name].need("sum_sq") / inputs[name].tokens).sqrt()
        linears += [(weight, rms) for weight in sites.values()]
    return outlier_ratio(linears)


def find_super_weight(
    entry: MassiveEntry, inputs: Mapping[str, InputStats], weights: Mapping[str, Weights], width: int
) -> str | None:
    """The weight that wrote a massive activation of this block, in words; None when the statistics do not tell.

    weights: [out, in] by group and site. width: of the residual stream, the outputs of the weights that count.
    """
    best: tuple[float, str] | None = None
    for name, sites in weights.items():
        stats = inputs.get(name)
        if stats is None or stats.top_tokens is None:
            continue
        for site, weight in sites.items():
            written = super_weight(entry, weight, stats.top_tokens) if len(weight) == width else None
            if written is not None and (best is None or abs(written[2]) > best[0]):
                column, value, product = written
                best = abs(product), f"{site.module}[{entry.channel}, {column}] = {value:.3g}, which adds {product:.4g}"
    return best[1] if best else None
