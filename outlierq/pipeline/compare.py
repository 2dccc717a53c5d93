"""`outlierq compare`: two checkpoints side by side from headers, and their divergence when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from outlierq.core.model import Checkpoint
from outlierq.evaluate.comparison import Comparison, compare_checkpoints
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.measuring import models

if TYPE_CHECKING:
    from outlierq.evaluate.divergence import Divergence


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    quality: bool = False,
    text: str | None = None,
    windows: int | None = 24,
    resources: Resources = USUAL,
) -> Comparison:
    """Sizes, bits per weight and changed tensors. quality: also measure b against a, on windows of 512 tokens."""
    from outlierq.load import presented

    compared = compare_checkpoints(presented(a), presented(b))
    return replace(compared, divergence=_divergence(a, b, text, windows, resources)) if quality else compared


def _divergence(
    a: Checkpoint, b: Checkpoint, text: str | None, windows: int | None, resources: Resources
) -> Divergence:
    """How far b is from a on a text."""
    from outlierq.load import load_tokenizer

    content, _ = models.evaluation_text(text)
    sampled = models.checked_windows(b, load_tokenizer(b), content, windows=windows, reference=(a, load_tokenizer(a)))
    model, reference = (models.load_for_evaluation(each, device=resources.device) for each in (b, a))
    return models.measure_windows(model, sampled, reference=reference, listen=resources.listen)
