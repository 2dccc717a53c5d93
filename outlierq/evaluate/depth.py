"""Where in a model a difference arises: how far the hidden states after each block are from those of a reference.

Both models run on the same tokens. The reference's states of one batch are kept until the other model has run, whose
states are compared as they come. Only blocks that a forward calls are seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class HiddenDifference:
    """Sums over batches, inside `watching`. The reference has to run first on every batch."""

    def __init__(self) -> None:
        self._states: list[torch.Tensor] = []  # of the reference, for the batch at hand
        self._sums: list[tuple[float, float]] = []  # by block, of squared differences and of the reference's power
        self._at = 0  # the block that runs next
        self._alike = True

    @contextmanager
    def watching(self, model: torch.nn.Module, reference: torch.nn.Module) -> Iterator[None]:
        """Inside, the outputs of the blocks of both models are noted."""
        seen = [(reference, self._keep), (model, self._compare)]
        handles = [block.register_forward_hook(hook) for module, hook in seen for block in blocks_of(module)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, block: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A block of the reference has run."""
        self._states.append(_hidden(output))

    def _compare(self, block: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A block of the model has run: add what its states differ by."""
        at, hidden = self._at, _hidden(output)
        self._at += 1
        self._alike &= at < len(self._states) and self._states[at].shape == hidden.shape
        if not self._alike:
            return
        expected = self._states[at].float()
        change = float((hidden.to(expected.device).float() - expected).square().sum())
        power = float(expected.square().sum())
        if at == len(self._sums):
            self._sums.append((0.0, 0.0))
        self._sums[at] = self._sums[at][0] + change, self._sums[at][1] + power

    def batch_done(self) -> None:
        """Both have run on a batch."""
        self._alike &= self._at == len(self._states)
        self._states.clear()
        self._at = 0

    @property
    def relative(self) -> tuple[float, ...]:
        """After each block, squared difference over the power of the reference's states.

        Empty where blocks were not seen, or are not alike.
        """
        sums = self._sums if self._alike else []
        return tuple(change / power if power > 0 else 0.0 for change, power in sums)


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder blocks, in order, and those of any tower with as many, which no text calls; empty when not known."""
    from torch.nn import ModuleList

    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    lists = [part for part in model.modules() if isinstance(part, ModuleList) and count and len(part) == count]
    inside = {id(part) for one in lists for block in one for part in block.modules()}
    return [block for one in lists if id(one) not in inside for block in one]


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states in what a block returned."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden.detach()
