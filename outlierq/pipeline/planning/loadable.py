"""Experts that nobody could load stay in 16 bits, unless they are named: a class may take them in one tensor only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from outlierq.pipeline.planning.mixture import mixture
from outlierq.recipe.patterns import matches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from outlierq.core.model import StudiedModel
    from outlierq.pipeline.planning.plan import SitePlan
    from outlierq.recipe import Quantize


# Recipes that write experts as the programs read them which know them in one tensor only: name, settings, and of whom.
OTHERS = (
    ("mxfp4", ("export.format=mxfp4",), "transformers and vLLM"),
    ("gguf-q4_k_m", (), "llama.cpp"),
)


def loadable_experts(
    sites: list[SitePlan], model: StudiedModel, quantize: Quantize, holds: Callable[[str, Sequence[str]], bool]
) -> list[SitePlan]:
    """The plan with experts kept that no program is known to load apart, and that no override names.

    holds: whether all experts are quantized by a recipe with these settings.
    """
    experts = mixture(model, {})
    if experts.is_read:
        return sites
    others = [f"{_command(name, settings)} for {of}" for name, settings, of in OTHERS if holds(name, settings)]
    offered = f"; what quantizes them: {', '.join(others)}" if others else ""
    reason = (
        f"kept in 16 bits: transformers and vLLM read the experts of {experts.architecture} from one tensor, which "
        f"holds no such codes{offered}; an override that names them quantizes them all the same, for outlierq's own "
        "commands"
    )
    return [replace(each, scheme=None, reason=reason) if _is_unnamed(each, quantize) else each for each in sites]


def _command(name: str, settings: Sequence[str]) -> str:
    """How a recipe is asked for."""
    return "`" + " ".join([f"-r {name}", *(f"--set {setting}" for setting in settings)]) + "`"


def _is_unnamed(planned: SitePlan, quantize: Quantize) -> bool:
    """Whether a linear is an expert's, quantized, and no override names it."""
    if planned.site.expert is None or planned.scheme is None:
        return False
    return not any(matches(planned.site.module, override.match) for override in quantize.overrides)
