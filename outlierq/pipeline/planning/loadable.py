"""Experts that nobody could load stay in 16 bits, unless they are named: a class may take them in one tensor only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from outlierq.pipeline.planning.mixture import mixture
from outlierq.recipe.patterns import matches

if TYPE_CHECKING:
    from outlierq.core.model import StudiedModel
    from outlierq.pipeline.planning.plan import SitePlan
    from outlierq.recipe import Quantize


def loadable_experts(sites: list[SitePlan], model: StudiedModel, quantize: Quantize) -> list[SitePlan]:
    """The plan with experts kept that no program is known to load apart, and that no override names."""
    experts = mixture(model, {})
    if experts.is_read:
        return sites
    reason = (
        f"kept in 16 bits: transformers and vLLM read the experts of {experts.architecture} from one tensor, which "
        "holds no codes; an override that names them quantizes them all the same, for outlierq's own commands"
    )
    return [replace(each, scheme=None, reason=reason) if _is_unnamed(each, quantize) else each for each in sites]


def _is_unnamed(planned: SitePlan, quantize: Quantize) -> bool:
    """Whether a linear is an expert's, quantized, and no override names it."""
    if planned.site.expert is None or planned.scheme is None:
        return False
    return not any(matches(planned.site.module, override.match) for override in quantize.overrides)
