"""Gains of norms that lost their sign: single ones among many that are positive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.pipeline.checking.finding import Findings
from outlierq.pipeline.checking.plain import is_norm, offset_of

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

CHECK = "numbers"
# Training leaves small negative gains. One this large beside the median of its norm was turned, where few are negative.
LEAST_SIZE, MOST_NEGATIVE = 0.25, 0.002


def check_gains(plain: Checkpoint, skeleton: Any, names: Mapping[str, str], findings: Findings) -> None:
    """skeleton, names: the model class, and where its parameters are."""
    large, negative, count = dict[str, int](), 0, 0
    for name, gain in _gains(plain, skeleton, names):
        below = gain < 0
        negative, count = negative + int(below.sum()), count + gain.numel()
        far = below & (gain.abs() > LEAST_SIZE * gain.abs().median())
        if bool(far.any()):
            large[name] = int(far.sum())
    if large and negative <= MOST_NEGATIVE * count:
        name, turned = next(iter(large.items()))
        findings.fault(CHECK, name, f"{turned} gains are negative and large, where nearly all of {count} are positive")


def _gains(plain: Checkpoint, skeleton: Any, names: Mapping[str, str]) -> list[tuple[str, torch.Tensor]]:
    """Name and gain, float32, of every norm."""
    found = []
    for slot, name in names.items():
        if slot.endswith(".weight") and is_norm(slot) and name in plain.tensors and len(plain.tensors[name].shape) == 1:
            try:
                gain = plain.read(name).float()
            except SourceError:
                continue  # said where it was read first
            found.append((name, gain + offset_of(skeleton.get_submodule(slot.removesuffix(".weight")))))
    return found
