"""Who takes part in `outlierq study methods`: the table of `data/contenders.json`, and what a user asks of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from outlierq.core.errors import ArgumentError, nearest


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    method: a quantizer or an approximation, with options; or recipe: a shipped one. settings: of the recipe, or of that
    whose schemes a method takes.
    bits: at which it exists, empty for all. rounded_inputs: whether it learns against them, and needs some. budget:
    `owl` or `farms` for sparsities by block. importance: whether it asks what weights cost at the end of the model, on
    one text or on two. integers: whether it rounds to nothing else. loads_in: which programs load it.
    """

    name: str
    method: str = ""
    recipe: str = ""
    settings: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: Sequence[int] = ()
    rounded_inputs: bool = False
    budget: str = ""
    importance: bool = False
    integers: bool = False
    loads_in: str = ""


def contenders(only: Sequence[str], bits: int, *, rounded_inputs: bool = True) -> list[Contender]:
    """All that exist at these bits, with inputs rounded or not, or those of these names.

    ArgumentError for a name that there is not.
    """
    text = (resources.files("outlierq") / "data" / "contenders.json").read_text(encoding="utf-8")
    known = {values["name"]: Contender(**values) for values in json.loads(text)}
    for name in only:
        if name not in known:
            close = nearest(name, list(known))
            raise ArgumentError(
                f"there is no {name!r}; " + (f"did you mean {close!r}?" if close else f"known: {'; '.join(known)}"),
                argument="only",
            )
    asked = [known[name] for name in only] if only else list(known.values())
    apt = [each for each in asked if rounded_inputs or not each.rounded_inputs]
    return list(asked) if only else [each for each in apt if not each.bits or bits in each.bits]
