"""A mixture as other programs see it: whether any of them loads its experts when they are packed apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.export.clients import Mixture

if TYPE_CHECKING:
    from outlierq.core.model import StudiedModel


def mixture(model: StudiedModel) -> Mixture:
    """Of a studied model."""
    from outlierq.load import unmerged_experts

    named = model.checkpoint.config.get("architectures")
    name = named[0] if isinstance(named, list) and named else type(model.skeleton).__name__
    return Mixture(str(name), not unmerged_experts(model.skeleton))
