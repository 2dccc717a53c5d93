"""`LogitSample`: the most likely next tokens at a sample of positions, to compare models by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LogitSample:
    """Final logits z of the original model at n places of the calibration text; k is the number of tokens kept.

    sequence, position: [n] int32, where. top_ids: [n, k] int32, the most likely next tokens, likeliest first.
    top_log_probs: [n, k] float32, their log-probabilities (nats). log_sum_exp: [n] float32, log sum exp z over the
    whole vocabulary, so that z = log-probability + log_sum_exp.
    """

    sequence: torch.Tensor
    position: torch.Tensor
    top_ids: torch.Tensor
    top_log_probs: torch.Tensor
    log_sum_exp: torch.Tensor

    @classmethod
    def joined(cls, samples: Sequence[LogitSample]) -> LogitSample:
        """Samples of parts of the text, in its order, as one."""
        import torch

        return cls(**{name: torch.cat([sample.tensors()[name] for sample in samples]) for name in samples[0].tensors()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by field name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
