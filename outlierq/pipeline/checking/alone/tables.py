"""Embedding, head and routers: of zeros they tell no token from another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outlierq.load.model.experts.fused import router_names
from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

CHECK = "numbers"


def check_tables(plain: Checkpoint, skeleton: Any, names: Mapping[str, str], findings: Findings) -> None:
    """skeleton, names: the model class, and where its parameters are."""
    slots = _slots(skeleton)
    for slot, name in names.items():
        if slot not in slots or name in plain.packed or name not in plain.tensors:
            continue
        if not bool(plain.read(name).any()):
            findings.fault(CHECK, name, "holds nothing but zeros")
    for router in sorted(router_names(skeleton)):
        name = names.get(f"{router}.weight", "")
        if name in plain.tensors and name not in plain.packed and not bool(plain.read(name).any()):
            findings.fault(CHECK, name, "is a router of zeros: every token gets the same experts")


def _slots(skeleton: Any) -> set[str]:
    """Parameters of the embedding and of the head."""
    tables = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            tables.append(getattr(skeleton, ask)())
        except (AttributeError, NotImplementedError, TypeError):
            continue
    weights = {id(getattr(table, "weight", None)) for table in tables if table is not None}
    return {slot for slot, parameter in skeleton.named_parameters(remove_duplicate=False) if id(parameter) in weights}
