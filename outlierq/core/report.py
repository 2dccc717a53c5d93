"""`Report`: what a run did and what it cost, one row per site, and `Evaluation`: what was measured. JSON round trip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError
from outlierq.core.limits import GateRow, raise_if_failed
from outlierq.core.machine.printable import whole_characters
from outlierq.core.machine.untrusted import checked

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

REPORT_NAME = "outlierq.json"
REPORT_VERSION = 1
STORED = "stored"  # the method of a weight whose codes were taken over as they were
# By the name of a value's class: what makes HTML of it. Empty until `outlierq.report.notebook` is imported.
DRAWN: dict[str, Callable[[Any], str]] = {}


class Shown:
    """A value that a notebook shows as a table."""

    def _repr_html_(self) -> str | None:
        """HTML for a notebook; None, which lets it fall back on `repr`, where nobody draws this kind of value."""
        draw = DRAWN.get(type(self).__name__)
        return None if draw is None else draw(self)


def report_of_file(file: Path) -> Path:
    """Where the report of a result stands that is one file and no folder."""
    return file.with_name(f"{file.name}.{REPORT_NAME}")


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


class Evaluation(dict[str, Any], Shown):
    """One measurement: the values that `outlierq.json` holds under "evaluation", and what they say as attributes.

    A figure is None where it was not measured (KL and top-1 need a reference). The keys: "divergence" holds
    `Divergence.to_dict()`, "tasks" and "reference_tasks" the results of `run_tasks`, "conditions" and "versions" what
    it depends on, "gate" the limits as rows, "passed" the verdict.
    """

    @property
    def perplexity(self) -> float | None:
        """Of the model on the text."""
        return self._figure("perplexity")

    @property
    def reference_perplexity(self) -> float | None:
        """Of the original on the same windows."""
        return self._figure("reference_perplexity")

    @property
    def kl(self) -> float | None:
        """Mean KL divergence per token from the original, in nats."""
        return self._figure("kl_per_token")

    @property
    def kl_standard_error(self) -> float | None:
        """Of `kl`, over windows."""
        return self._figure("kl_standard_error")

    @property
    def top1(self) -> float | None:
        """Share of positions with the original's most likely token, 0..1."""
        return self._figure("top1_agreement")

    @property
    def scores(self) -> dict[str, float]:
        """ "task/metric" -> value, of every named task and its parts."""
        rows = self.get("tasks", {}).get("rows", ())
        return {f"{row['task']}/{row['metric']}": row["value"] for row in rows}

    @property
    def gate_rows(self) -> tuple[GateRow, ...]:
        """The limits as they were judged; empty without limits."""
        return tuple(GateRow(r["name"], r["value"], r["relation"], r["limit"]) for r in self.get("gate", ()))

    @property
    def passed(self) -> bool | None:
        """Whether every limit was kept; None without limits."""
        verdict: bool | None = self.get("passed")
        return verdict

    def raise_if_failed(self) -> None:
        """GateError with the table of all limits when one of them was passed."""
        raise_if_failed(self.gate_rows)

    def _figure(self, name: str) -> float | None:
        """A figure of the text, None when it was not measured."""
        value: float | None = self.get("divergence", {}).get(name)
        return value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        """Plain values are read as a dict and become one of these."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(cls, handler(dict[str, Any]))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint before and after."""

    before: int
    after: int

    @property
    def ratio(self) -> float:
        """Before over after: 4.0 is a quarter of the size."""
        return self.before / self.after


@dataclass(frozen=True)
class Report(Shown):
    """One compression run.

    model, recipe: as the user wrote them; out: its absolute path. settings: every key of the recipe as it was followed.
    fingerprint: of the source checkpoint. versions: package -> version.
    seeds: what was seeded -> seed. machine: what it ran on ("cpu", "threads", "device", ...).
    transforms: one dict per input group (block, group, method, fold, note). notes: every fallback and warning.
    bits_per_weight: of the whole output; quantized_bits_per_weight: of the quantized weights, None when there is none;
    source_bits_per_weight: of the whole source, None when it was not counted. quantized_share: of the weights of linear
    layers, without towers, routers and the head, 0..1; None in reports of versions that did not count it.
    seconds: stage -> wall time. peak_bytes: largest resident memory, None where the system does not tell.
    evaluation: what was measured on the output, None when nothing was.
    record: what was written, to the byte (`core/machine/record.py`), None in reports of versions that kept none.
    clients: which programs load it, one line each; empty in reports of versions that kept none.
    cache: what `study cache --record` measured of keys and values in fewer bits, None when nothing was.
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
    evaluation: Evaluation | None = None
    record: dict[str, Any] | None = None
    quantized_share: float | None = None
    clients: tuple[str, ...] = ()
    cache: dict[str, Any] | None = None

    @property
    def size(self) -> Sizes:
        """Bytes of the source and of the output."""
        return Sizes(self.source_bytes, self.output_bytes)

    @property
    def is_conversion(self) -> bool:
        """Whether codes and scales were taken over as they were stored."""
        return {row.method for row in self.rows} == {STORED}

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
        lists = {name: list(values[name]) for name in ("rows", "transforms", "notes", "clients")}
        return whole_characters({"report_version": REPORT_VERSION, **values, **lists})

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
    """The fields of `kind`, of which only those with a default may be missing: keys that are not so are named."""
    known = {field.name: field.default is MISSING for field in fields(kind)}
    missing = sorted(name for name, needed in known.items() if needed and name not in values)
    unknown = sorted(values.keys() - known.keys())
    if missing or unknown:
        raise OutlierqError(f"the {what} has missing keys {missing} and unknown keys {unknown}")
