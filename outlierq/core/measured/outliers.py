"""`OutlierReport`: where a model's outliers are, what they will cost, and what would help. JSON round trip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from outlierq.core.errors import OutlierqError
from outlierq.core.machine.printable import whole_characters
from outlierq.core.machine.untrusted import checked
from outlierq.core.report import Shown

OUTLIER_REPORT_VERSION = 1

Danger = Literal["calm", "watch", "dangerous"]


@dataclass(frozen=True)
class MassiveEntry:
    """One massive activation in the residual stream (arXiv:2402.17762): where, which token, and how large."""

    block: int
    sequence: int
    position: int
    token: int
    text: str
    channel: int
    value: float
    ratio: float


@dataclass(frozen=True)
class ChannelOutliers:
    """One channel of an input. ratio: of its largest |x| to the median channel's. sigma_rate, iqr_rate: shares of the
    sampled tokens; hill_alpha: exponent of their tail. None where the channel has no such figure (it is constant).
    """

    channel: int
    abs_max: float
    ratio: float | None = None
    kurtosis: float | None = None
    sigma_rate: float | None = None
    iqr_rate: float | None = None
    hill_alpha: float | None = None


@dataclass(frozen=True)
class GroupOutliers:
    """The input of the linears in one group.

    group: its name in the statistics. role: the name without block and numbers ("self_attn.q_proj").
    sites: the linears that read it. abs_max: [channels] largest |x|. outlier_channels: ascending.
    top_channels: the channels with the largest |x|, largest first, with every measure.
    measures: name -> value (channel_ratio, top_share, kurtosis, sigma_rate, largest_sigma, iqr_rate, hill_alpha,
    token_range, log_qsur, ...). weights: site -> name -> value (alpha, stable_rank, ...).
    errors: scheme -> predicted relative output error, "w8a8", "w4a16", "nvfp4", "mxfp4", and the same after a remedy
    ("w8a8 smoothquant", "w8a8 split", "w8a8 rotation", "w4a16 awq"); weights hold the errors of single sites, too.
    remedy: the cheapest that helps W8A8, "16 bits" when none does, "" when none is needed. danger, reasons: in words.
    missing: measures that could not be computed, each with the reason.
    """

    group: str
    block: int
    role: str
    sites: tuple[str, ...]
    tokens: int
    abs_max: tuple[float, ...]
    outlier_channels: tuple[int, ...] = ()
    top_channels: tuple[ChannelOutliers, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    remedy: str = ""
    danger: Danger = "calm"
    reasons: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockOutliers:
    """One decoder block: the OWL outlier ratio of its weights, and its residual stream and attention.

    owl: percent of weights whose |w| * norm(x) is above 5 times the mean. measures: residual_abs_max,
    residual_median, residual_kurtosis, sink_heads (share of heads), no_op_heads, key_abs_max, value_abs_max, ...
    """

    block: int
    owl: float | None
    measures: Mapping[str, float] = field(default_factory=dict)
    massive: tuple[MassiveEntry, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutlierReport(Shown):
    """A whole model. outlier_features: LLM.int8() emergence, channel -> (share of layers, share of positions).

    outlier_channels: channels of the residual width that stand out in most blocks. summary: the findings in words.
    statistics: what the numbers are from. notes: what was not possible.
    """

    model: str
    fingerprint: str
    statistics: str
    seconds: float
    groups: tuple[GroupOutliers, ...]
    blocks: tuple[BlockOutliers, ...]
    outlier_features: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    outlier_channels: tuple[int, ...] = ()
    summary: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold, with the version of this layout."""
        return whole_characters({"outlier_report_version": OUTLIER_REPORT_VERSION, **asdict(self)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OutlierReport:
        """The report that `to_dict` wrote; OutlierqError when the layout is another one."""
        values = dict(values)
        version = values.pop("outlier_report_version", None)
        if version != OUTLIER_REPORT_VERSION:
            raise OutlierqError(
                f"the outlier report has layout version {version}; this program reads {OUTLIER_REPORT_VERSION}",
                hint="write it again with `outlierq detect`",
            )
        return checked(cls, values, "outlier report")
