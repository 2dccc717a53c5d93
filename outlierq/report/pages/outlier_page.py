"""An outlier report as one HTML file that needs nothing else, and its pictures as PNG files.

In ten seconds it says where outliers are, how bad that is, and what to run; everything below is there to check it.
Pictures and text are in the file itself: scripts only copy, sort and read out.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlierq.core.machine.installed import needs_extra
from outlierq.core.measured.outliers import GroupOutliers, OutlierReport
from outlierq.detect.verdict import ERRORS, SHAPES, level
from outlierq.report.pages.drawing import PAPER, TEXT, WIDTH, Picture, svg, text
from outlierq.report.pages.outlier_pictures import (
    PREFERRED_SCHEME,
    by_role,
    error_after,
    main_scheme,
    percent,
    pictures,
    schemes,
    times,
)
from outlierq.report.pages.page import model_name, render, write

UNKNOWN = "–"
CHANNELS_NAMED = 8  # channel numbers written out before "and n more"
BLOCKS_NAMED = 12
PNG_SCALE = 2
GAP = 18  # between the panels of a PNG file
LINE, LETTER = 14, 5.9  # of its text: from line to line, and the width of a letter on average
ORDER = {"dangerous": 0, "watch": 1, "calm": 2}
NUMBER = re.compile(r"\d[\d.,]*")


@dataclass(frozen=True)
class Remedy:
    """One way to quantize whose error detection predicts. key: in `GroupOutliers.errors`. recipe: what does it."""

    key: str
    recipe: str
    title: str
    what: str


REMEDIES = (
    Remedy("w8a8", "w8a8-dynamic", "W8A8", "int8 weights and inputs, as they are"),
    Remedy("w8a8 smoothquant", "smoothquant-w8a8", "W8A8, smoothed", "scales folded into the layer before"),
    Remedy("w8a8 split", "int8-split", "W8A8, outlier columns apart", "those columns stay in 16 bits"),
    Remedy("w8a8 rotation", "rotate-w8a8", "W8A8, rotated", "a Hadamard rotation folded into the weights"),
    Remedy("w4a16", "gptq-w4", "W4A16", "int4 weights; GPTQ ends below this figure"),
    Remedy("w4a16 awq", "awq-gptq-w4", "W4A16, scaled", "AWQ's scales, then GPTQ, which ends below this figure"),
    Remedy("nvfp4", "nvfp4-w4a4", "NVFP4", "4-bit floats, weights and inputs"),
    Remedy("mxfp4", "mxfp4-w4a4", "MXFP4", "4-bit floats, weights and inputs"),
)


def write_page(report: OutlierReport, path: Path) -> None:
    """Write the report as one self-contained HTML file; OutputError when that is not possible.

    The file is there with all its bytes or not at all. Its folder is made if need be.
    """
    write(path, page(report).encode())


def write_pictures(report: OutlierReport, folder: Path) -> list[Path]:
    """Write every picture that the report has data for as `outliers-NAME.png`, at twice its size in pixels.

    The background is white, so that a picture can be read on any model card. Returns the paths, in reading order.
    """
    needs_extra("vl_convert")
    import vl_convert

    paths = []
    for picture in pictures(report, PAPER):
        if picture.panels:
            path = folder / f"outliers-{picture.name}.png"
            drawn = vl_convert.svg_to_png(sheet(picture, model_name(report.model)), scale=PNG_SCALE)
            write(path, drawn)
            paths.append(path)
    return paths


def sheet(picture: Picture, model: str) -> str:
    """The panels of a picture, two in a row, below a heading, as one SVG."""
    columns = min(2, len(picture.panels))
    width = columns * WIDTH + (columns + 1) * GAP
    inside, top = _headed(GAP, 28.0, picture.title, model, columns * WIDTH)
    top += TEXT
    for start in range(0, len(picture.panels), columns):
        row = picture.panels[start : start + columns]
        places = [GAP + number * (WIDTH + GAP) for number in range(len(row))]
        headed = [_headed(x, top + TEXT, each.title, each.remark) for x, each in zip(places, row, strict=True)]
        top = max(below for _, below in headed)
        inside += "".join(words for words, _ in headed)
        inside += "".join(svg(each.height, each.drawing, at=(x, top)) for x, each in zip(places, row, strict=True))
        top += max(panel.height for panel in row) + GAP
    white = f'<rect width="{width}" height="{top:.0f}" fill="{PAPER.paper}"/>'
    return svg(top, white + inside, picture.lead, width=width)


def _headed(x: float, y: float, title: str, remark: str, wide: float = WIDTH) -> tuple[str, float]:
    """A title and what is said of it, in as many lines as they need, and where what follows may begin.

    y: baseline of the first line.
    """
    most = int(wide / LETTER)
    lines = [(line, PAPER.ink, True) for line in textwrap.wrap(title, most)]
    lines += [(line, PAPER.muted, False) for line in textwrap.wrap(remark, most)]
    drawn = [text(x, y + place * LINE, words, colour, bold=bold) for place, (words, colour, bold) in enumerate(lines)]
    return "".join(drawn), y + len(lines) * LINE - TEXT / 2


def page(report: OutlierReport) -> str:
    """The HTML text of the report."""
    return render("outlier_page", **_content(report))


# Content


def _content(report: OutlierReport) -> dict[str, Any]:
    """All that the template writes."""
    features = sorted(report.outlier_features.items(), key=lambda item: (-item[1][0], -item[1][1]))
    headline, *findings = report.summary or (f"{len(report.groups)} inputs were measured.",)
    rows = [row for row in (_remedy_row(report, remedy) for remedy in REMEDIES) if row]
    owner, _, name = model_name(report.model).rpartition("/")
    return {
        "report": report,
        "name": name,
        "owner": owner,
        "headline": headline,
        "findings": findings,
        "answers": [_where(report), _how_bad(report), _channels(report)],
        "advice": _advice(report, rows),
        "pictures": pictures(report),
        "remedies": rows,
        "schemes": schemes(report.groups),
        "roles": _roles(report),
        "features": [
            {"channel": channel, "layers": percent(layers), "positions": percent(positions)}
            for channel, (layers, positions) in features
        ],
        "limits": _limits(),
        "notes": _notes(report),
        "seconds": f"{report.seconds:.1f} seconds",
    }


def _where(report: OutlierReport) -> dict[str, Any]:
    """The kind of input with most danger, and its blocks."""
    groups = [group for group in report.groups if group.danger == "dangerous"]
    alarm, groups = bool(groups), groups or [group for group in report.groups if group.danger == "watch"]
    if not groups:
        return {"question": "Where", "figure": "nowhere", "remark": "Every input is calm.", "alarm": False}
    roles = sorted(by_role(groups).items(), key=lambda item: -len(item[1]))
    first, some = roles[0]
    others = f"; also {listed((role for role, _ in roles[1:]), 3)}" if len(roles) > 1 else ""
    share = f"{len(some)} of these {len(groups)}, " if others else ""
    blocks = ranges(group.block for group in some)
    return {"question": "Where", "figure": first, "remark": f"{share}in {blocks}{others}", "alarm": alarm}


def _how_bad(report: OutlierReport) -> dict[str, Any]:
    """The worst predicted error, and what its remedy leaves."""
    scheme = main_scheme(report.groups)
    known = [group for group in report.groups if math.isfinite(group.errors.get(scheme, math.nan))]
    if not known:
        return {"question": "How bad", "figure": "unknown", "remark": "no errors were predicted", "alarm": False}
    worst = max(known, key=lambda group: group.errors[scheme])
    after = error_after(worst, scheme)
    remark = f"of the output would be error in plain {scheme.upper()} at {place_of(worst)}"
    remark += f"; {percent(after)} with {worst.remedy}" if after is not None else ""
    alarm = worst.danger == "dangerous"
    return {"question": "How bad", "figure": percent(worst.errors[scheme]), "remark": remark, "alarm": alarm}


def _channels(report: OutlierReport) -> dict[str, Any]:
    """Channels that stand out everywhere, and the largest single value."""
    entries = [entry for block in report.blocks for entry in block.massive]
    count = len(report.outlier_channels)
    figure = f"{count} channel{'' if count == 1 else 's'}" if count else "no channel"
    remark = f"({listed(report.outlier_channels)}) stand out in most blocks" if count else "stands out in most blocks"
    if entries:
        top = max(entries, key=lambda entry: abs(entry.value))
        spelled = repr(top.text).replace(" ", "\N{NO-BREAK SPACE}")  # a space at its start is part of it
        token = f"token {spelled}" if top.text else f"token {top.token}"
        remark += f". Largest single value: {figure_of(top.value)} after block {top.block}, on {token}"
    return {"question": "What stands out", "figure": figure, "remark": remark, "alarm": False}


def _errors(report: OutlierReport, key: str) -> dict[str, float]:
    """The predicted error of every input by its name; of one that the remedy is not for, the plain one."""
    plain = key.partition(" ")[0]
    values = {group.group: group.errors.get(key, group.errors.get(plain, math.nan)) for group in report.groups}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _remedy_row(report: OutlierReport, remedy: Remedy) -> dict[str, Any] | None:
    """What a remedy would leave over all inputs, in words; None when it was predicted nowhere."""
    predicted = sum(remedy.key in group.errors for group in report.groups)
    errors = _errors(report, remedy.key)
    if not predicted or not errors:
        return None
    place = max(errors, key=errors.__getitem__)
    limit = ERRORS.get(remedy.key.partition(" ")[0], ERRORS["w4a16"])
    few = (
        ""
        if predicted == len(report.groups) or " " not in remedy.key
        else f"; fits {predicted} of {len(errors)} inputs"
    )
    return {
        "key": remedy.key,
        "title": remedy.title,
        "what": remedy.what + few,
        "median": percent(statistics.median(errors.values())),
        "worst": percent(errors[place]),
        "worst_error": errors[place],
        "danger": ("calm", "watch", "dangerous")[level(errors[place], limit)],
        "place": next(place_of(group) for group in report.groups if group.group == place),
        "dangerous": sum(level(error, limit) == 2 for error in errors.values()),
        "command": command(report.model, remedy.recipe),
    }


def command(model: str, recipe: str) -> str:
    """A command that can be pasted."""
    out = f"{model_name(model).rpartition('/')[2]}-{recipe}"
    return shlex.join(["outlierq", "quantize", model, "-r", recipe, "-o", out])


def _advice(report: OutlierReport, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The least intrusive way to W8A8 that is nowhere dangerous; else int4 weights, which leave inputs alone, where
    those are not; else what is dangerous least often.
    """
    ladder = [row for row in rows if row["key"].startswith(PREFERRED_SCHEME)]
    weights = [row for row in rows if row["key"].startswith("w4a16")]
    fitting = [row for row in [*ladder, *weights] if not row["dangerous"]]
    if not ladder and not weights:
        return None
    row = fitting[0] if fitting else min([*ladder, *weights], key=lambda each: each["dangerous"])
    why = f"{row['title']} ({row['what']}) leaves an error of {row['median']} at the median input, "
    why += f"{row['worst']} at worst."
    if row["key"] == PREFERRED_SCHEME and fitting:
        why = f"As they are, no input is dangerous in W8A8: nothing has to be moved. {why}"
    elif row in weights and ladder:
        least = min(each["dangerous"] for each in ladder)
        why = f"With every remedy for W8A8 {least} inputs stay dangerous, so inputs better stay in 16 bits. {why}"
    elif not fitting:
        why += (
            f" {row['dangerous']} inputs stay dangerous: keep their linears in 16 bits (an override with keep: true)."
        )
    return {"why": why, "command": row["command"]}


def _roles(report: OutlierReport) -> list[dict[str, Any]]:
    """Inputs by kind, the most dangerous kind first, with the reasons that many blocks share said once."""
    scheme, every = main_scheme(report.groups), schemes(report.groups)

    def rank(group: GroupOutliers) -> tuple[int, float]:
        return ORDER[group.danger], -_finite(group.errors.get(scheme))

    roles = []
    for role, groups in by_role(report.groups).items():
        ordered = sorted(groups, key=rank)
        count: Counter[str] = Counter(group.danger for group in groups)
        said = ", ".join(f"{count[danger]} {danger}" for danger in ORDER if count[danger])
        readers = listed(dict.fromkeys(site.rsplit(".", 1)[-1] for group in groups for site in group.sites), 6)
        roles.append(
            {
                "name": role,
                "rank": rank(ordered[0]),
                "danger": ordered[0].danger,
                "open": ordered[0].danger == "dangerous" and len(groups) <= BLOCKS_NAMED,
                "count": f"{said}; read by {readers}",
                "reasons": _reasons(ordered),
                "rows": [_row(group, every) for group in ordered],
            }
        )
    return sorted(roles, key=lambda role: role["rank"])


def _reasons(groups: Sequence[GroupOutliers]) -> list[dict[str, str]]:
    """Each reason once, as it is at its worst, and in which blocks. Two are the same when only numbers differ."""
    same: dict[str, list[tuple[GroupOutliers, str]]] = {}
    for group in groups:
        for reason in group.reasons:
            same.setdefault(NUMBER.sub("#", reason), []).append((group, reason))
    reasons = []
    for cases in same.values():
        group, reason = cases[0]
        blocks = ranges(each.block for each, _ in cases)
        where = blocks if len(cases) == 1 else f"at worst, in block {group.block}; so in {blocks}"
        reasons.append({"text": reason, "where": where})
    return reasons


def _row(group: GroupOutliers, every: tuple[str, ...]) -> dict[str, Any]:
    """One line of the table, in words."""
    largest, ratio = max(group.abs_max, default=None), group.measures.get("channel_ratio")
    return {
        "danger": group.danger,
        "order": -ORDER[group.danger],
        "group": group.group,
        "block": group.block,
        "largest": {"value": _finite(largest), "text": figure_of(largest)},
        "ratio": {"value": _finite(ratio), "text": UNKNOWN if ratio is None else times(ratio)},
        "channels": listed(group.outlier_channels),
        "errors": [
            {
                "value": _finite(group.errors.get(scheme)),
                "before": percent(group.errors.get(scheme)),
                "after": _after(group, scheme),
            }
            for scheme in every
        ],
        "remedy": group.remedy or "not needed" if group.danger == "calm" else group.remedy or UNKNOWN,
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


def _limits() -> list[dict[str, str]]:
    """Every threshold, with what it is from."""
    errors = [
        {
            "name": f"predicted error in {name.upper()}",
            "watch": percent(limit.watch),
            "dangerous": percent(limit.dangerous),
            "source": _source(limit.source),
        }
        for name, limit in ERRORS.items()
    ]
    shapes = [
        {
            "name": name.replace("_", " "),
            "watch": f"{limit.watch:g}",
            "dangerous": f"{limit.dangerous:g}",
            "source": _source(limit.source),
        }
        for name, limit in SHAPES.items()
    ]
    return errors + shapes


def _source(source: str) -> str:
    return "measured for outlierq" if source == "ours" else source


def _notes(report: OutlierReport) -> list[str]:
    """The report's notes, then what is missing: one line for every reason, with the places it holds for."""
    places: dict[str, list[str]] = {}
    for group in report.groups:
        for reason in group.missing:
            places.setdefault(reason, []).append(group.group)
    for block in report.blocks:
        for reason in block.missing:
            places.setdefault(reason, []).append(f"block {block.block}")
    return [*report.notes, *(f"not measured: {reason} ({listed(where, 4)})" for reason, where in places.items())]


# Words and figures


def figure_of(value: float | None) -> str:
    """Three significant digits, thousands set apart; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def listed(values: Iterable[Any], most: int = CHANNELS_NAMED) -> str:
    """Values in a row; a long row ends in how many more there are."""
    values = [str(value) for value in values]
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more if values else UNKNOWN


def place_of(group: GroupOutliers) -> str:
    """An input in words that fit a narrow column."""
    return f"{group.role} in block {group.block}"


def ranges(blocks: Iterable[int]) -> str:
    """Block numbers in words: block 3; blocks 0 to 4, 7."""
    numbers = sorted(set(blocks))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    said = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{'block' if len(numbers) == 1 else 'blocks'} {listed(said, BLOCKS_NAMED)}"


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0
