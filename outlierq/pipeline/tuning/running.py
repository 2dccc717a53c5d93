"""A packed checkpoint and its original on the same text, as `quantize.tune` asks for it: losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.calibrate.end_loss import EndLoss
from outlierq.calibrate.runner import BlockRunner, Spill
from outlierq.core.errors import NumbersError
from outlierq.core.model import StudiedModel
from outlierq.pipeline.asked.events import Event, Listener
from outlierq.pipeline.tuning.moving import Moving
from outlierq.pipeline.turning.parts import Parts, Remembered

if TYPE_CHECKING:
    import torch

    from outlierq.quantize.tune import Changes, Tunable


@dataclass(frozen=True)
class How:
    """How the two run. batch_size: windows in a batch. dtype: in which blocks run. work: a folder for what spills."""

    batch_size: int
    dtype: str
    device: str
    work: Path
    listen: Listener


class _Tuned:
    """The packed model while it is tuned: what its numbers are, and the gradients that were had."""

    def __init__(self, model: StudiedModel, moving: Mapping[str, Moving], dtype: torch.dtype, device: str):
        self.moving = moving
        self.by_part: dict[str, list[Moving]] = {}
        for each in moving.values():
            self.by_part.setdefault(each.part, []).append(each)
        self.changes: Changes = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.loss: EndLoss | None = None
        self.parts = Parts(model, dtype, device, Remembered(model.checkpoint), self._change)

    def _change(self, name: str, part: torch.nn.Module) -> None:
        """Put the present changes into a part; while learning, gradients are wanted by what moves."""
        for each in self.by_part.get(name, ()) if self.changes else ():
            parameter = _parameter(part, name, each)
            change = self.changes[each.name].to(parameter.device)
            parameter.data = each.applied(parameter.data, change).to(parameter.dtype)
            parameter.requires_grad_(self.loss is not None and self.loss.learning)

    def take(self, name: str, part: torch.nn.Module) -> None:
        """Keep the gradients of a part; what no gradient has reached has none."""
        for each in self.by_part.get(name, ()):
            parameter, change = _parameter(part, name, each), self.changes[each.name]
            if parameter.grad is None:
                self.gradients[each.name] = change.new_zeros(change.shape)
                continue
            values = (parameter.data.float(), parameter.grad.float(), change.to(parameter.device))
            self.gradients[each.name] = each.gradient(*values).cpu()


def _parameter(part: torch.nn.Module, name: str, moving: Moving) -> torch.nn.Parameter:
    """The parameter of a moving tensor in the part of that name."""
    return part.get_parameter(moving.slot.removeprefix(f"{name}.") if name else moving.slot)


@contextmanager
def tunable(
    original: StudiedModel,
    packed: StudiedModel,
    moving: Mapping[str, Moving],
    ids: torch.Tensor,
    how: How,
) -> Iterator[Tunable]:
    """The two on windows [sequences, tokens], in batches."""
    import torch

    from outlierq.quantize.tune import Tunable

    number, device = getattr(torch, how.dtype), how.device
    tuned = _Tuned(packed, moving, number, device)

    def runner(model: StudiedModel, parts: Parts) -> BlockRunner:
        return BlockRunner(
            model.skeleton,
            model.structure,
            parts.weights,
            device=device,
            dtype=number,
            batch_size=how.batch_size,
            spill=Spill(how.work),
        )

    def told(index: int, share: float) -> None:
        blocks = original.structure.blocks
        how.listen(Event("original", index, len(blocks), blocks[index].name, step="what it gives", share=share))

    def loss(changes: Changes, batches: Sequence[int]) -> float:
        tuned.changes = changes
        return end.value(batches)

    def gradient(changes: Changes, batches: Sequence[int]) -> tuple[float, Changes]:
        tuned.changes, tuned.gradients = changes, {}
        value = end.gradient(batches)
        if tuned.gradients.keys() != moving.keys():
            raise NumbersError("some of what is tuned takes no part in the model")
        return value, tuned.gradients

    def rounded(changes: Changes) -> Changes:
        return {name: moving[name].left(change) for name, change in changes.items()}

    packed.checkpoint.install(packed.skeleton, packed.names)
    first = runner(original, Parts(original, number, device, original.checkpoint))
    with EndLoss(first, runner(packed, tuned.parts), ids, tuned.take) as end:
        tuned.loss = end
        batches = end.start(told)
        yield Tunable({name: each.start for name, each in moving.items()}, batches, loss, gradient, rounded)
