"""Codes of formats whose runtime does more with them than their decoder says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint


def codes_of_rows(plain: Checkpoint, name: str) -> QuantTensor | None:
    """Codes [out, in] of LLM.int8() and a scale for each row, whatever columns a call takes out; None of any other."""
    members = plain.linears[name].members
    if "SCB" not in members:
        return None
    stored = plain.original  # type: ignore[attr-defined]
    scale = stored.read(members["SCB"]).float().view(-1, 1) / 127
    return QuantTensor(stored.read(members["weight"]), scale, None, QuantScheme(8, None, scale_dtype="float32"))
