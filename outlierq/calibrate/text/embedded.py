"""Texts that are always at hand, by the word a recipe names them with; each has a calibration and an evaluation part.

`mix` ships with outlierq: documents of several kinds and languages (data/text.md says of which sources and under which
licences; scripts/build_text.py builds it). `embedded` is the Python language reference, which every Python carries: the
default before `mix` was there, and still what recipes, reports and statistics mean that name it.
"""

from __future__ import annotations

import json
import lzma
from functools import cache
from importlib import resources

from outlierq.core.errors import StatsError

MIX, EMBEDDED = "mix", "embedded"
TITLES = {MIX: "outlierq's mix of texts", EMBEDDED: "Python language reference"}
PARTS = ("calibration", "evaluation")
HELD_OUT = 4  # every 4th topic of the Python language reference is kept for evaluation


def embedded_text(part: str, name: str = MIX) -> str:
    """The whole text of a part, "calibration" or "evaluation". The parts share no topic, work or translation of one."""
    return "\n\n".join(documents(part)) if name == MIX else "\n".join(_topics(part))


def documents(part: str) -> tuple[str, ...]:
    """The documents of a part of the mix. Every domain lies evenly over them, so a stretch of them is a fair mix."""
    return _mix()[_part(part)]


@cache
def _mix() -> dict[str, tuple[str, ...]]:
    packed = (resources.files("outlierq") / "data" / "text.jsonl.xz").read_bytes()
    rows = [json.loads(line) for line in lzma.decompress(packed).decode("utf-8").splitlines()]
    return {part: tuple(row["text"] for row in rows if row["part"] == part) for part in PARTS}


def _topics(part: str) -> list[str]:
    """Every 4th topic of the Python language reference, in alphabetical order, belongs to "evaluation"."""
    from pydoc_data.topics import topics

    held_out = _part(part) == "evaluation"
    return [topics[name] for i, name in enumerate(sorted(topics)) if (i % HELD_OUT == HELD_OUT - 1) == held_out]


def _part(part: str) -> str:
    if part not in PARTS:
        raise StatsError(f"the embedded text has the parts calibration and evaluation, not {part!r}")
    return part
