"""`Findings`: faults, and what could not be judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SHOWN = 3


@dataclass(frozen=True)
class Fault:
    """Something that is wrong. check: which check found it. tensor: where, "" for the checkpoint as a whole."""

    check: str
    tensor: str
    what: str


@dataclass
class Findings:
    """What was found so far. notes: what could not be checked, and why."""

    faults: list[Fault] = field(default_factory=list, kw_only=True)
    notes: list[str] = field(default_factory=list, kw_only=True)

    def fault(self, check: str, tensor: str, what: str) -> None:
        """Add a fault."""
        self.faults.append(Fault(check, tensor, what))

    def of(self, check: str) -> list[Fault]:
        """The faults that a check has found."""
        return [fault for fault in self.faults if fault.check == check]

    def note(self, text: str) -> None:
        """Add a note."""
        self.notes.append(text)


def listed(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
