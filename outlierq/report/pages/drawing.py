"""Small pictures as SVG: maps whose cells are the pixels of an image inside, points over blocks, in the page's colours.

One drawing serves the page, where colours are CSS variables and follow the theme, and PNG files, where they are fixed.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from outlierq.core.machine.printable import printable

WIDTH = 340  # of a panel, in the units of its text: as wide as a telephone shows it
LEFT, RIGHT, TOP, BOTTOM = 38, 6, 8, 22  # around what is drawn, for its axes
TEXT = 11
LEVELS = 64
# From a channel like the others to one that stands out: light to dark on paper, dark to light on a dark screen.
LIGHT = ((243, 241, 238), (240, 200, 164), (206, 96, 46), (104, 22, 12))
DARK = ((29, 31, 36), (96, 50, 30), (226, 120, 66), (255, 240, 222))


@dataclass(frozen=True)
class Theme:
    """Colours of lines and text; ramps: of maps, each with the class under which the page shows or hides it."""

    ink: str
    muted: str
    rule: str
    accent: str
    paper: str
    ramps: tuple[tuple[str, Sequence[tuple[int, int, int]]], ...]


PAGE = Theme(
    "var(--ink)",
    "var(--muted)",
    "var(--rule)",
    "var(--accent)",
    "var(--paper)",
    (("on-light", LIGHT), ("on-dark", DARK)),
)
PAPER = Theme("#1c1f24", "#5a616b", "#d9dce1", "#b23c17", "#ffffff", (("", LIGHT),))


def ramp(stops: Sequence[tuple[int, int, int]], levels: int = LEVELS) -> np.ndarray:
    """uint8 [levels, 3], evenly between the stops."""
    places = np.linspace(0, len(stops) - 1, levels)
    channels = [np.interp(places, np.arange(len(stops)), [stop[c] for stop in stops]) for c in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def png(cells: np.ndarray, palette: np.ndarray) -> bytes:
    """A PNG file, a pixel for each of uint8 [rows, columns], which are numbers of a colour in the palette, [n, 3]."""
    rows, columns = cells.shape
    lines = b"".join(b"\0" + cells[row].tobytes() for row in range(rows))
    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, *zip(*chunks, strict=True)))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def image(cells: np.ndarray, box: tuple[float, float, float, float], theme: Theme) -> str:
    """The cells, uint8 [rows, columns] below `LEVELS`, stretched over a box (x, y, width, height)."""
    x, y, width, height = box
    drawn = ""
    for name, stops in theme.ramps:
        data = base64.b64encode(png(cells, ramp(stops))).decode()
        drawn += (
            f'<image{f" class={chr(34)}{name}{chr(34)}" if name else ""} x="{x}" y="{y}" width="{width}" '
            f'height="{height}" preserveAspectRatio="none" image-rendering="pixelated" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
        )
    return drawn


def text(x: float, y: float, content: object, colour: str, anchor: str = "start", *, bold: bool = False) -> str:
    """Escaped text, its baseline at y."""
    weight = ' font-weight="600"' if bold else ""
    words = escape(printable(str(content)))
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{weight}>{words}</text>'


def upright(x: float, y: float, content: str, colour: str) -> str:
    """Text that runs upwards, its middle at y."""
    return f'<g transform="rotate(-90 {x:.1f} {y:.1f})">{text(x, y, content, colour, "middle")}</g>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    """A thin line."""
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{pattern}/>'


def titled(element: str, tag: str, title: str) -> str:
    """An element `<tag .../>` that says what it is when the mouse is over it."""
    return f"{element}<title>{escape(printable(title))}</title></{tag}>"


def svg(
    height: float, inside: str, alt: str = "", *, width: float = WIDTH, at: tuple[float, float] | None = None
) -> str:
    """A drawing. alt: what it shows, in words; empty where something beside it says so. at: its place in another."""
    named = f'role="img" aria-label="{escape(printable(alt), quote=True)}"' if alt else 'aria-hidden="true"'
    place = f'x="{at[0]}" y="{at[1]}" width="{width}" height="{height:.0f}"' if at else named
    family = "system-ui, 'Liberation Sans', Arial, sans-serif"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" {place} font-size="{TEXT}" '
        f'font-family="{family}">{inside}</svg>'
    )


def powers(bounds: tuple[float, float], y: Callable[[float], float], wide: float, theme: Theme) -> str:
    """Powers of ten as percentages at the side, a thin line across for each.

    bounds: logarithms of the least and the largest value. y: where a value lies.
    """
    drawn = ""
    for power in range(math.ceil(bounds[0]), math.floor(bounds[1]) + 1):
        height = y(10.0**power)
        drawn += text(LEFT - 5, height + 4, f"{100 * 10.0**power:g}%", theme.muted, "end")
        drawn += line(LEFT, height, LEFT + wide, height, theme.rule)
    return drawn


def ticks(values: Sequence[int], most: int = 4) -> list[int]:
    """Places in a sequence that get a label: both ends and some evenly between, or all of a few."""
    count = len(values) if len(values) <= most + 3 else most
    return sorted({round(place) for place in np.linspace(0, len(values) - 1, count)}) if values else []


@dataclass(frozen=True)
class Panel:
    """One drawing. title, remark: above it. alt: what it shows. height: in its own units. cells: for a page that reads
    them out: "blocks", "columns", "width" (channels in a column), "top" (ratio of 255), "levels" (base64).
    """

    title: str
    remark: str
    alt: str
    drawing: str
    height: float
    cells: dict[str, object] | None = None

    @property
    def svg(self) -> str:
        """As an element of a page."""
        return svg(self.height, self.drawing, self.alt)


@dataclass(frozen=True)
class Picture:
    """Panels under one heading. name: for files and anchors. lead: how to read it. absent: why there are no panels."""

    name: str
    title: str
    lead: str
    panels: tuple[Panel, ...]
    absent: str = ""
