"""`Report`: what a run did and what it cost, one row per site. Units are in the names; JSON round trip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from outlierq.core.errors import OutlierqError
from outlierq.core.machine.untrusted import checked

REPORT_NAME = "outlierq.json"
REPORT_VERSION = 1


@dataclass(frozen=True)
class SiteRow:
    """One quantized linear site.

    bits: 2..8. group_size: None is per channel. output_error: tr(dW H dW^T) / tr(W H W^T), None when data-free; where
    inputs are quantized as well, the same for both operands on the kept rows: ||Q(x) Q(W)^T - x W^T||^2 / ||x W^T||^2.
    weight_error: ||dW|| / ||W|| (Frobenius). bits_per_weight: stored, with scales and zero points.
    note: a fallback or anything unusual at this site. numbers: what the codes are (int4, fp8, nvfp4), "" when unknown.
    """

    site: str
    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    output_error: float | None
    weight_error: float
    bits_per_weight: float
    seconds: float
    note: str = ""
    numbers: str = ""


@dataclass(frozen=True)
class Report:
    """One compression run.

    model, recipe: as the user wrote them; out: its absolute path. settings: every key of the recipe as it was followed.
    fingerprint: of the source checkpoint. versions: package -> version.
    seeds: what was seeded -> seed. machine: what it ran on ("cpu", "threads", "device", ...).
    transforms: one dict per input group (block, group, method, fold, note). notes: every fallback and warning.
    bits_per_weight: of the whole output; quantized_bits_per_weight: of the quantized weights, None when there is none;
    source_bits_per_weight: of the whole source, None when it was not counted.
    seconds: stage -> wall time. peak_bytes: largest resident memory, None where the system does not tell.
    evaluation: what was measured on the output, None when nothing was; "divergence" holds `Divergence.to_dict()` and
    "tasks" the result of `run_tasks`.
    """

    model: str
    recipe: str
    settings: dict[str, Any]
    out: str
    fingerprint: str
    versions: dict[str, str]
    seeds: dict[str, int]
    machine: dict[str, Any]
    rows: tuple[SiteRow, ...]
    transforms: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    quantized_bits_per_weight: float | None
    source_bits_per_weight: float | None
    seconds: dict[str, float]
    peak_bytes: int | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def size_ratio(self) -> float:
        """Source bytes over output bytes: 4.0 is a quarter of the size."""
        return self.source_bytes / self.output_bytes

    @property
    def total_seconds(self) -> float:
        """Wall time of all stages."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON can hold, with the version of this layout."""
        values = asdict(self)
        lists = {name: list(values[name]) for name in ("rows", "transforms", "notes")}
        return {"report_version": REPORT_VERSION, **values, **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote; OutlierqError when the layout is another one."""
        values = dict(values)
        version = values.pop("report_version", None)
        if version != REPORT_VERSION:
            raise OutlierqError(
                f"the report has layout version {version}; this program reads {REPORT_VERSION}",
                hint="write the report again with this version of outlierq",
            )
        _check_keys(cls, values, "report")
        rows = values["rows"] if isinstance(values["rows"], list | tuple) else ()
        for row in rows:
            if isinstance(row, Mapping):
                _check_keys(SiteRow, row, "report row")
        return checked(cls, values, "report")


def _check_keys(kind: type, values: Mapping[str, Any], what: str) -> None:
    """Exactly the fields of `kind`: a missing or unknown key is named."""
    known = {field.name for field in fields(kind)}
    missing, unknown = sorted(known - values.keys()), sorted(values.keys() - known)
    if missing or unknown:
        raise OutlierqError(f"the {what} has missing keys {missing} and unknown keys {unknown}")
