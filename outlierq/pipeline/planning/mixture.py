"""A model as other programs see it: its class, and whether any of them loads its experts when they are packed apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.export.clients import Mixture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outlierq.core.model import LinearSite, StudiedModel
    from outlierq.core.scheme import QuantScheme


def architecture(model: StudiedModel) -> str:
    """The class that config.json names, or the one that is built."""
    named = model.checkpoint.config.get("architectures")
    return str(named[0] if isinstance(named, list) and named else type(model.skeleton).__name__)


def mixture(model: StudiedModel, experts: Mapping[LinearSite, QuantScheme | None]) -> Mixture:
    """Of a studied model. experts: their linears with the scheme of each, None for 16 bits."""
    from outlierq.load import unmerged_experts

    by_block: dict[int | None, set[QuantScheme | None]] = {}
    for site, scheme in experts.items():
        by_block.setdefault(site.block, set()).add(scheme)
    is_mixed = any(len(schemes) > 1 for schemes in by_block.values())
    is_biased = any(site.bias is not None for site in experts)
    return Mixture(architecture(model), not unmerged_experts(model.skeleton), is_mixed, is_biased)
