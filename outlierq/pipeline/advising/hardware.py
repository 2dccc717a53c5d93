"""Cards by name: their memory and what a client's kernels run on them, from data/hardware.json."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from outlierq.core.errors import ArgumentError, nearest
from outlierq.recipe import parse_size

CPU = "cpu"


@dataclass(frozen=True)
class Card:
    """Where the result will run. memory: bytes, None where that is not known. runs: words of data/hardware.json for
    the kinds of weights and products that vLLM has kernels for there. remark: what its facts do not cover.
    """

    name: str
    words: str
    memory: int | None
    runs: frozenset[str]
    remark: str = ""

    @property
    def is_cpu(self) -> bool:
        """Whether it is no GPU."""
        return self.name == CPU


@cache
def table(name: str) -> dict[str, Any]:
    """The content of a file of facts, data/NAME.json."""
    facts: dict[str, Any] = json.loads((resources.files("outlierq") / "data" / f"{name}.json").read_text("utf-8"))
    return facts


def card_of(name: str | None) -> Card:
    """The card of a name, in any spelling ("rtx 4090"); None: what all NVIDIA GPUs of some years have in common.

    ArgumentError for an unknown name, with the nearest known one.
    """
    facts = table("hardware")
    if name is None:
        return Card("any GPU", facts["any"]["words"], None, frozenset(facts["any"]["runs"]))
    names = {_plain(each): each for each in (*facts["cards"], CPU)}
    known = names.get(_plain(name))
    if known is None:
        close = nearest(_plain(name), list(names))
        advice = f"did you mean {names[close]}?" if close else f"choose {', '.join(names.values())}"
        raise ArgumentError(f"{name!r} is not a card that is known; {advice}", argument="gpu")
    if known == CPU:
        return Card(CPU, facts["cpu"]["words"], _memory_here(), frozenset(facts["cpu"]["runs"]))
    held = facts["cards"][known]
    return Card(known, held["words"], parse_size(held["memory"]), frozenset(held["runs"]), held.get("remark", ""))


def smallest_card(needed: int, share: float) -> str | None:
    """The GPU with the least memory of which `share` holds so many bytes; None when none does.

    Only those count that run what all GPUs of some years have in common.
    """
    facts = table("hardware")
    alike = {name: held for name, held in facts["cards"].items() if {*held["runs"]} >= {*facts["any"]["runs"]}}
    sizes = sorted((parse_size(held["memory"]), name) for name, held in alike.items())
    return next((name for memory, name in sizes if needed <= share * memory), None)


def _plain(name: str) -> str:
    """A name without what people write in several ways."""
    return re.sub(r"^(nvidia|amd|geforce|instinct|tesla)+|[\s_-]", "", re.sub(r"[\s_-]", "", name.lower()))


def _memory_here() -> int | None:
    """Bytes of this machine's memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
