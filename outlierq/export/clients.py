"""What the word-packed formats have in common, and which programs load a format: facts kept as data, with a date."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutputError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme

if TYPE_CHECKING:
    import torch


@cache
def table() -> dict[str, Any]:
    """The content of data/clients.json."""
    return json.loads((resources.files("outlierq") / "data" / "clients.json").read_text(encoding="utf-8"))


def client_facts(form: str, schemes: Collection[QuantScheme]) -> list[str]:
    """One line per client: what it does with these schemes in the format, "not tried" where the table says nothing."""
    clients = table()["formats"][form]
    return [f"{name}: {'; '.join(_said(facts, schemes))}" for name, facts in clients.items()]


def _said(facts: list[dict[str, Any]], schemes: Collection[QuantScheme]) -> list[str]:
    """The first fact that fits each scheme, without repetition."""
    found = {}
    for scheme in sorted(schemes, key=str):
        fact = next((fact for fact in facts if _fits(fact.get("when", {}), scheme)), None)
        found[fact["what"] if fact else f"{scheme}: not tried"] = True
    return list(found) or ["loads"]


def _fits(when: dict[str, Any], scheme: QuantScheme) -> bool:
    """Whether a scheme has all the properties that a fact names."""
    known = {"bits": scheme.bits, "symmetric": scheme.symmetric, "per_channel": scheme.group_size is None}
    return all(known[key] in (value if isinstance(value, list) else [value]) for key, value in when.items())


def one_scheme(form: str, found: Collection[object], key: str) -> str | None:
    """Why a format whose config says `key` once for the whole model cannot hold what was found, or None."""
    if len(found) < 2:
        return None
    shown = ", ".join(sorted("channel" if value is None else str(value) for value in found))
    return f"{form} has one {key} for the whole model, and this plan has {shown}"


def unsigned(site: LinearSite, quantized: QuantTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uint8 codes [out, in] and zero points [out, groups]: those of a symmetric weight are moved by 2^(bits - 1)."""
    import torch

    if quantized.outlier_columns is not None:
        raise OutputError(f"{site.module}: this format has no place for outlier columns")
    if quantized.zero_point is not None:
        return quantized.codes.to(torch.uint8), quantized.zero_point.to(torch.uint8)
    middle = 1 << (quantized.scheme.bits - 1)
    # Wraps at 256: signed codes become unsigned.
    codes = quantized.codes.to(torch.int8).view(torch.uint8) + middle
    return codes, torch.full_like(quantized.scale, middle, dtype=torch.uint8)
