"""An outlier report as one HTML file that needs nothing else, and its pictures as PNG files.

Everything that comes from outside (names, tokens, sentences) goes through Jinja's escaping; as a second lock the page's
Content-Security-Policy runs only the two scripts whose hashes it names and lets nothing load from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from outlierq import __version__
from outlierq.core.errors import OutputError
from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.own_files import write_atomically
from outlierq.core.machine.printable import over_texts, printable
from outlierq.core.measured.outliers import GroupOutliers, OutlierReport
from outlierq.report.pages.outlier_charts import PREFERRED_SCHEME, Picture, error_after, main_scheme, pictures, schemes

if TYPE_CHECKING:
    from markupsafe import Markup

T = TypeVar("T")
UNKNOWN = "–"
CHANNELS_NAMED = 12  # channel numbers written out before "and n more"
PNG_SCALE = 2
_DANGER_ORDER = {"dangerous": 0, "watch": 1, "calm": 2}


def write_page(report: OutlierReport, path: Path) -> None:
    """Write the report as one self-contained HTML file; OutputError when that is not possible.

    The file is there with all its bytes or not at all. Its folder is made if need be.
    """
    _write(path, page(report).encode())


def write_pictures(report: OutlierReport, folder: Path) -> list[Path]:
    """Write every picture that the report has data for as `outliers-NAME.png`, at twice its size in pixels.

    The background is white, so that a picture can be read on any model card. Returns the paths, in reading order.
    """
    needs_extra("vl_convert")
    import vl_convert

    paths = []
    for picture in pictures(report):
        if picture.spec is None:
            continue
        title = {"text": picture.title, "subtitle": report.model, "fontSize": 17, "subtitleFontSize": 13, "offset": 16}
        specification = {**picture.spec, "background": "white", "padding": 16, "title": title}
        path = folder / f"outliers-{picture.name}.png"
        _write(path, vl_convert.vegalite_to_png(page_json(specification), scale=PNG_SCALE))
        paths.append(path)
    return paths


def page(report: OutlierReport) -> str:
    """The HTML text of the report."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    drawn = pictures(report)
    library, script = _library(), _part("js")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=printable_value
    )
    environment.filters["breakable"] = _breakable
    specifications = element_json({picture.name: picture.spec for picture in drawn if picture.spec})
    return environment.from_string(_part("html")).render(
        **_content(report, drawn),
        version=__version__,
        css=Markup(_part("css")),
        specifications=Markup(specifications),
        library=Markup(library),
        script=Markup(script),
        script_hashes=Markup(f"{policy_hash(library)} {policy_hash(script)}"),
    )


# Content


def _content(report: OutlierReport, drawn: tuple[Picture, ...]) -> dict[str, Any]:
    """All that the template writes."""
    scheme, every = main_scheme(report.groups), schemes(report.groups)
    ordered = sorted(report.groups, key=lambda g: (_DANGER_ORDER[g.danger], -_finite(g.errors.get(scheme))))
    rows = [_row(group, every) for group in ordered]
    headline, *findings = report.summary or (f"Outliers in {report.model}",)
    features = sorted(report.outlier_features.items(), key=lambda item: (-item[1][0], -item[1][1]))
    return {
        "report": report,
        "headline": headline,
        "findings": findings,
        "cards": [_danger_card(report), _channel_card(report), _massive_card(report), _error_card(report, scheme)],
        "pictures": drawn,
        "schemes": every,
        "alarming": [row for row in rows if row["danger"] != "calm"],
        "calm": [row for row in rows if row["danger"] == "calm"],
        "features": [
            {"channel": channel, "layers": percent(layers), "positions": percent(positions)}
            for channel, (layers, positions) in features
        ],
        "notes": _notes(report),
        "seconds": f"{report.seconds:.1f} seconds",
    }


def _row(group: GroupOutliers, every: tuple[str, ...]) -> dict[str, Any]:
    """One line of the table, in words."""
    errors = [{"before": percent(group.errors.get(scheme)), "after": _after(group, scheme)} for scheme in every]
    return {
        "danger": group.danger,
        "group": group.group,
        "role": group.role,
        "block": group.block,
        "readers": ", ".join(site.rsplit(".", 1)[-1] for site in group.sites),
        "largest": figure(max(group.abs_max, default=None)),
        "channels": _listed(group.outlier_channels),
        "errors": errors,
        "remedy": group.remedy or UNKNOWN,
        "reasons": "; ".join(group.reasons) or UNKNOWN,
    }


def _after(group: GroupOutliers, scheme: str) -> str:
    """The error with the group's remedy; for a scheme which that is not for, the best of its own, with its name."""
    after = error_after(group, scheme)
    if after is not None:
        return percent(after)
    own = {key.removeprefix(f"{scheme} "): e for key, e in group.errors.items() if key.startswith(f"{scheme} ")}
    best = min(own, key=own.__getitem__, default=None)
    if scheme == PREFERRED_SCHEME or best is None or not own[best] < group.errors.get(scheme, math.inf):
        return ""
    return f"{percent(own[best])} {best}"


def _danger_card(report: OutlierReport) -> dict[str, Any]:
    dangerous = [group for group in report.groups if group.danger == "dangerous"]
    watched = sum(group.danger == "watch" for group in report.groups)
    readers = sum(len(group.sites) for group in dangerous)
    remark = f"of {len(report.groups)}" + (f", read by {readers} linears" if readers else "") + f"; {watched} to watch"
    return {"label": "Dangerous inputs", "figure": len(dangerous), "remark": remark, "alarm": bool(dangerous)}


def _channel_card(report: OutlierReport) -> dict[str, Any]:
    channels = report.outlier_channels
    remark = (
        f"{'channel' if len(channels) == 1 else 'channels'} {_listed(channels)}, in most blocks"
        if channels
        else "none stands out in most blocks"
    )
    return {"label": "Outlier channels", "figure": len(channels), "remark": remark, "alarm": False}


def _massive_card(report: OutlierReport) -> dict[str, Any]:
    entries = [entry for block in report.blocks for entry in block.massive]
    tokens = {(entry.sequence, entry.position) for entry in entries}
    remark = "in the residual stream"
    if entries:
        top = max(entries, key=lambda entry: abs(entry.value))
        remark = f"largest {figure(top.value)} after block {top.block}, channel {top.channel}, on token {top.text!r}"
    return {"label": "Massive tokens", "figure": len(tokens), "remark": remark, "alarm": False}


def _error_card(report: OutlierReport, scheme: str) -> dict[str, Any]:
    label = f"Worst predicted {scheme.upper()} error" if scheme else "Worst predicted error"
    known = [group for group in report.groups if math.isfinite(group.errors.get(scheme, math.nan))]
    if not known:
        return {"label": label, "figure": UNKNOWN, "remark": "no errors were predicted", "alarm": False}
    worst = max(known, key=lambda group: group.errors[scheme])
    after = error_after(worst, scheme)
    remedy = f"{percent(after)} with {worst.remedy}; " if after is not None else ""
    alarm = worst.danger == "dangerous"
    return {
        "label": label,
        "figure": percent(worst.errors[scheme]),
        "remark": f"{remedy}at {worst.group}",
        "alarm": alarm,
    }


def _notes(report: OutlierReport) -> list[str]:
    """The report's notes, then what is missing: one line for every reason, with the places it holds for."""
    places: dict[str, list[str]] = {}
    for group in report.groups:
        for reason in group.missing:
            places.setdefault(reason, []).append(group.group)
    for block in report.blocks:
        for reason in block.missing:
            places.setdefault(reason, []).append(f"block {block.block}")
    return [*report.notes, *(f"{reason} ({_listed(where, 4)})" for reason, where in places.items())]


# Words and figures


def figure(value: float | None) -> str:
    """Three significant digits, thousands set apart; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share of 1 as a percentage with two significant digits; a dash for what is not known."""
    if share is None or not math.isfinite(share):
        return UNKNOWN
    value = 100 * share
    return f"{value:,.0f}\u202f%" if abs(value) >= 10 else f"{value:.2g}\u202f%"


def _listed(values: Iterable[Any], most: int = CHANNELS_NAMED) -> str:
    """Values in a row; a long row ends in how many more there are."""
    values = [str(value) for value in values]
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more if values else UNKNOWN


def _breakable(name: str) -> Markup:
    """A dotted name that may be broken after a dot."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(printable(part)) for part in name.split("."))


def printable_value(value: T) -> T:
    """What the template writes: our own markup as it is, any other text without characters that act."""
    return cast("T", printable(str(value))) if type(value) is str else value


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


# Files


def _part(ending: str) -> str:
    return files("outlierq.report.pages").joinpath(f"outlier_page.{ending}").read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; putting it together takes a second."""
    needs_extra("vl_convert")
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def page_json(values: Any) -> str:
    """JSON in one line, without characters that act."""
    return json.dumps(over_texts(values, printable), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def element_json(values: Any) -> str:
    """The same for a script element: "<" can be written as an escape, so that no value ends the element."""
    return page_json(values).replace("<", "\\u003c")


def policy_hash(script: str) -> str:
    """The hash by which a Content-Security-Policy names an inline script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _write(path: Path, content: bytes) -> None:
    """The whole file or none of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({len(content)} bytes): {error.strerror or error}") from error
