"""What learning on a whole block is given: its rounded linears, and how to run it on text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RoundedBlock:
    """One decoder block whose linears were rounded one by one.

    weights: [out, in] float32 by linear, before rounding. start: what a quantizer made of them, on the same device.
    batches: how many batches of text there are. run: from weights [out, in] of these linears and the number of a batch
    to the hidden states [sequences, tokens, H] that the block gives behind quantized blocks; gradients flow to the
    weights where they are enabled. asked: those that the original block gives behind original blocks.
    first_counts: how often the first token of a sequence counts, which all later ones attend to.
    """

    weights: Mapping[LinearSite, torch.Tensor]
    start: Mapping[LinearSite, QuantTensor]
    batches: int
    run: Callable[[Mapping[LinearSite, torch.Tensor], int], torch.Tensor]
    asked: Callable[[int], torch.Tensor]
    first_counts: float = 1.0
