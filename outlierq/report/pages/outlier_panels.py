"""The panels of an outlier report's pictures in Vega-Lite: rows of values in, specifications out.

Colours tell apart in all common forms of colour blindness: inferno for magnitudes, the set of Okabe and Ito
(jfly.uni-koeln.de/color, 2008) for names. Text and lines take the colours `INK`, which are parameters of a picture, so
that a page can follow the reader's theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from outlierq.core.measured.outliers import GroupOutliers

Spec = dict[str, Any]

INK = {"ink": "#1c1f24", "muted": "#5a616b", "rule": "#d9dce1"}  # on white; contrast of ink and muted is above 6
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
DANGER_COLOURS = {"calm": "#7f8794", "watch": "#c07f00", "dangerous": "#d6423a"}
CHANNEL_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
REMEDY_COLOUR = "#3b82c4"

WIDTH = 1000  # pixels of a picture; two panels beside each other share it
PANEL_WIDTH, PANEL_HEIGHT = 430, 220  # leaves room for labels of five digits


def framed(spec: Spec) -> Spec:
    """A whole picture: theme colours as parameters, a transparent background, fonts and lines."""
    params = [{"name": name, "value": value} for name, value in INK.items()]
    return {"background": "transparent", "padding": 4, "params": params, "config": _config(), **spec}


def magnitude_colour(low: float, high: float) -> Spec:
    """The colour of a heat map cell from its field `shade`, with the scale's legend."""
    return {
        "field": "shade",
        "type": "quantitative",
        "scale": {"type": "log", "scheme": "inferno", "domain": [low, high], "clamp": True},
        "legend": {
            "title": "largest |x|, log scale",
            "orient": "top",
            "direction": "horizontal",
            "gradientLength": 280,
            "gradientThickness": 10,
            "values": _ticks(low, high),
            "format": "~g",
        },
    }


def channel_panel(
    role: str, groups: Sequence[GroupOutliers], rows: list[dict[str, Any]], blocks: list[int], colour: Spec
) -> Spec:
    channels, width = max(row["k"] for row in rows), max(row["w"] for row in rows)
    title = _panel_title(role, groups, f"{channels} channels" + (f", {width} in a column" if width > 1 else ""))
    floor = colour["scale"]["domain"][0]
    # A cell reaches under its right neighbour: without that, hairlines of the background show between them.
    return {
        "title": title,
        "width": WIDTH,
        "height": {"step": max(2, min(6, 180 // len(blocks)))},
        "data": {"values": rows},
        "transform": [
            {"flatten": ["v", "c", "n"], "as": ["value", "channel", "n"]},
            {"calculate": "floor(datum.channel / datum.w) * datum.w", "as": "from"},
            {"calculate": "min(datum.from + datum.w, datum.k)", "as": "to"},
            {"calculate": "min(datum.from + 1.4 * datum.w, datum.k)", "as": "edge"},
            {"calculate": f"max(datum.value, {floor!r})", "as": "shade"},
            {"calculate": "datum.names[datum.n || 0]", "as": "group"},
            {
                "calculate": "datum.channel + (datum.w > 1 ? "
                "' (largest of ' + datum.from + '–' + (datum.to - 1) + ')' : '')",
                "as": "where",
            },
        ],
        "mark": "rect",
        "encoding": {
            "x": _axis("from", "channel", scale={"domain": [0, channels], "nice": False}, axis={"format": "d"}),
            "x2": {"field": "edge"},
            "y": _block_axis(blocks, every=5),
            "color": colour,
            "tooltip": _tooltip(("where", "channel"), ("value", "largest |x|"), ("b", "block"), ("group", "input")),
        },
    }


def sorted_panel(role: str, rows: list[dict[str, Any]], domain: list[float], widest: int) -> Spec:
    colour = {
        "field": "danger",
        "type": "nominal",
        "scale": {"domain": list(DANGER_COLOURS), "range": list(DANGER_COLOURS.values())},
        "legend": {"title": None, "orient": "top", "symbolType": "stroke", "symbolStrokeWidth": 3},
    }
    weight = [
        {"test": f"datum.danger === '{name}'", "value": wide} for name, wide in (("dangerous", 2), ("watch", 1.4))
    ]
    ranks = {"type": "log", "domain": [1, max(widest, 2)], "nice": False}
    sizes = {"type": "log", "domain": domain, "nice": False, "clamp": True}
    tooltip = (("channel", "channel"), ("value", "largest |x|"), ("rank", "rank"), ("b", "block"))
    return {
        "title": _panel_title(role),
        "width": PANEL_WIDTH,
        "height": PANEL_HEIGHT,
        "data": {"values": rows},
        "transform": [{"flatten": ["rank", "channel", "value"]}],
        "encoding": {
            "x": _axis("rank", "rank of the channel", scale=ranks, axis={"values": _ticks(1, widest)}),
            "y": _axis("value", "largest |x|", scale=sizes, axis={"values": _ticks(*domain)}),
            "color": colour,
            "detail": {"field": "group"},
        },
        "layer": [
            {
                "mark": {"type": "line", "opacity": 0.75},
                "encoding": {"strokeWidth": {"condition": weight, "value": 0.8}},
            },
            {
                # Nothing to see, but a target to hover over.
                "mark": {"type": "circle", "size": 60, "opacity": 0},
                "encoding": {"tooltip": _tooltip(*tooltip, ("danger", "danger"), ("group", "input"))},
            },
        ],
    }


def massive_panel(rows: list[dict[str, Any]], blocks: list[int]) -> Spec:
    last = max(15, *(row["position"] for row in rows)) * 1.1
    ticks = [0] + [step * 10**power for power in range(7) for step in (1, 2, 5) if step * 10**power <= last]
    names = list(dict.fromkeys(row["colour"] for row in rows if row["colour"] != "other"))
    colours = [*CHANNEL_COLOURS[: len(names)], DANGER_COLOURS["calm"]]
    largest = max(row["size"] for row in rows)
    position = {"type": "symlog", "domain": [-0.3, last], "nice": False}
    tooltip = (("text", "token"), ("position", "position"), ("b", "block"), ("channel", "channel"), ("value", "value"))
    return {
        "width": WIDTH - 110,
        "height": {"step": max(4, min(11, 400 // len(blocks)))},
        "data": {"values": rows},
        "mark": {"type": "circle", "opacity": 0.85, "stroke": _ink("ink"), "strokeWidth": 0.6},
        "encoding": {
            "x": _axis(
                "position",
                "position of the token in its sequence",
                scale=position,
                axis={"values": ticks, "format": "d"},
            ),
            "y": _block_axis(blocks, every=1 if len(blocks) <= 16 else 5, grid=True),
            "size": {
                "field": "size",
                "type": "quantitative",
                "scale": {"domain": [0, largest], "range": [6, 260]},
                "legend": {
                    "title": "|value|",
                    "values": _ticks(largest / 12, largest),
                    "symbolFillColor": _ink("muted"),
                },
            },
            "color": {
                "field": "colour",
                "type": "nominal",
                "scale": {"domain": [*names, "other"][: len({row["colour"] for row in rows})], "range": colours},
                "legend": {"title": "channel", "symbolOpacity": 1},
            },
            "tooltip": _tooltip(*tooltip, ("ratio", "times the median"), ("sequences", "sequences")),
        },
    }


def error_panel(role: str, rows: list[dict[str, Any]], domain: list[float], blocks: list[int]) -> Spec:
    y = {"type": "quantitative", "scale": {"type": "log", "domain": domain, "nice": False}}
    axis = {"title": "relative output error", "format": ".1~p", "values": _ticks(*domain), "grid": True}
    states = {"domain": [*DANGER_COLOURS, "with the remedy"], "range": [*DANGER_COLOURS.values(), REMEDY_COLOUR]}
    colour = {"type": "nominal", "scale": states, "legend": {"title": None, "orient": "top", "symbolOpacity": 1}}
    before, after = (("before", "error", ".2~p"), ("after", "error with it", ".2~p"))
    tooltip = _tooltip(("group", "input"), ("b", "block"), before, ("remedy", "remedy"), after, ("danger", "danger"))
    has_after = [{"filter": "isValid(datum.after)"}]
    return {
        "title": _panel_title(role),
        "width": PANEL_WIDTH,
        "height": PANEL_HEIGHT - 40,
        "data": {"values": rows},
        "encoding": {"x": _block_axis(blocks, every=5, labelAngle=0), "tooltip": tooltip},
        "layer": [
            {
                "transform": has_after,
                "mark": {"type": "rule", "strokeWidth": 1.2, "color": _ink("muted"), "opacity": 0.7},
                "encoding": {"y": {"field": "before", **y, "axis": axis}, "y2": {"field": "after"}},
            },
            {
                "mark": {"type": "point", "filled": False, "size": 46, "strokeWidth": 1.6, "opacity": 1},
                "encoding": {"y": {"field": "before", **y, "axis": axis}, "color": {"field": "danger", **colour}},
            },
            {
                "transform": has_after,
                "mark": {"type": "point", "filled": True, "size": 46, "opacity": 1},
                "encoding": {
                    "y": {"field": "after", **y, "axis": axis},
                    "color": {"datum": "with the remedy", **colour},
                },
            },
        ],
    }


def log_domain(values: Sequence[float]) -> list[float]:
    """From a little under the smallest to a little over the largest."""
    return [min(values) / 1.2, max(values) * 1.2]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade between the two, only 1 when there are many decades."""
    steps = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _config() -> Spec:
    text = {"labelColor": _ink("muted"), "titleColor": _ink("ink"), "titleFontWeight": "normal"}
    sizes = {"labelFontSize": 11, "titleFontSize": 12}
    lines = {"gridColor": _ink("rule"), "domainColor": _ink("rule"), "tickColor": _ink("rule")}
    return {
        "font": FONT,
        "axis": {**text, **sizes, **lines, "labelOverlap": "greedy"},
        "legend": {**text, **sizes, "titleFontWeight": "normal"},
        "title": {
            "color": _ink("ink"),
            "subtitleColor": _ink("muted"),
            "fontSize": 13,
            "fontWeight": 600,
            "subtitleFontSize": 12,
            "anchor": "start",
            "frame": "group",
            "offset": 8,
        },
        "view": {"stroke": _ink("rule")},
    }


def _ink(name: str) -> Spec:
    return {"expr": name}


def _axis(field: str, title: str, **parts: Any) -> Spec:
    """A quantitative channel with few ticks and no grid."""
    axis = {"title": title, "grid": False, "tickCount": 6, "format": "~g", **parts.pop("axis", {})}
    return {"field": field, "type": "quantitative", "axis": axis, **parts}


def _block_axis(blocks: list[int], every: int, **axis: Any) -> Spec:
    """Blocks as bands, the first at the top or left, with a label on one of `every`."""
    shown = {"title": "block", "values": [block for block in blocks if block % every == 0], "ticks": False, **axis}
    return {"field": "b", "type": "ordinal", "scale": {"domain": blocks}, "axis": shown}


def _panel_title(role: str, groups: Sequence[GroupOutliers] = (), more: str = "") -> Spec:
    readers = ", ".join(dict.fromkeys(site.rsplit(".", 1)[-1] for group in groups for site in group.sites))
    subtitle = "   ·   ".join(part for part in (f"read by {readers}" if readers else "", more) if part)
    return {"text": f"input of {role}", **({"subtitle": subtitle} if subtitle else {})}


def _tooltip(*fields: tuple[str, ...]) -> list[Spec]:
    """(field, title) or (field, title, number format)."""
    keys = ("field", "title", "format")
    return [
        {**dict(zip(keys, field, strict=False)), "type": "nominal" if len(field) < 3 else "quantitative"}
        for field in fields
    ]
