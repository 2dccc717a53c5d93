"""A linear's inputs in the original model beside those behind quantized blocks or as they are rounded, token by token.

Asymmetric calibration (GPTAQ, Li et al. 2025, arXiv:2504.02692) asks for the output of the original layer on its
original inputs. Both inputs of a token are only there together while a block runs twice, so their product is summed
then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Pair:
    """Running sum of (x0 - x) x^T of one input group; x0: in the original model, x: as the linears see it."""

    def __init__(self) -> None:
        self._original: torch.Tensor | None = None
        self._cross: torch.Tensor | None = None
        self._first: list[torch.Tensor] = []
        self._broken = False

    @property
    def remembers(self) -> bool:
        """Whether the inputs of a batch wait for their counterparts."""
        return self._original is not None

    def remember(self, inputs: torch.Tensor) -> None:
        """The inputs of a batch in the original model, any shape."""
        self._original = inputs.clone()

    def add(self, sequences: torch.Tensor, skip: int, *, routed: bool, alone: bool = False) -> None:
        """The same batch behind quantized blocks [sequences, tokens, K], of which `skip` first tokens do not count.

        Routed tokens may go to other experts in one of both runs: such an input has no pairs. alone: there is one run,
        and the batch is rounded.
        """
        import torch

        original, self._original = self._original, None
        lost = original is None or original.numel() != sequences.numel()
        self._broken |= lost or (routed and not alone)
        if self._broken or original is None:
            return
        change = original.view_as(sequences).float() - sequences.float()
        if not skip and not routed:
            self._first.append(change[:, 0].cpu())
        rows, change = (each[:, 0 if routed else skip :].flatten(0, 1) for each in (sequences.float(), change))
        if self._cross is None:
            with torch.inference_mode(False):
                self._cross = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self._cross.addmm_(change.T, rows)

    def follow(self, other: Pair, factor: float) -> None:
        """Begin with the sum of `other` over other tokens, times a factor; it is taken over and changed."""
        self._cross = None if other._cross is None else other._cross.mul_(factor)
        self._broken |= other._broken

    def finish(self, tokens: int) -> dict[str, torch.Tensor]:
        """`cross` [K, K] and `first_change` of `InputStats`; none where tokens had no counterparts."""
        import torch

        if self._broken or self._cross is None:
            return {}
        first = {"first_change": torch.cat(self._first)} if self._first else {}
        return {"cross": self._cross.div_(tokens), **first}
