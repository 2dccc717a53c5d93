"""A model on a text as methods that turn it see it: `Turnable`, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.calibrate.end_loss import EndLoss
from outlierq.calibrate.runner import BlockRunner, Spill
from outlierq.core.errors import NumbersError
from outlierq.core.model import Checkpoint, StudiedModel, as_matrix
from outlierq.core.scheme import ActivationScheme
from outlierq.pipeline.asked.events import Event, Listener
from outlierq.pipeline.remodel.rewritten import RewrittenCheckpoint
from outlierq.pipeline.turning.hooks import TurnedInput, Turning
from outlierq.pipeline.turning.parts import Parts, Remembered

if TYPE_CHECKING:
    import torch

    from outlierq.transform.rotate import Anatomy, GainPath, Norm, ScalePath, ValuePath
    from outlierq.transform.rotations.turnable import Turnable, Turns


@dataclass(frozen=True)
class Way:
    """How the model runs. batch_size: windows in a batch. work: a folder for what spills."""

    batch_size: int
    device: str
    work: Path
    listen: Listener


@contextmanager
def turnable(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    possible: Turns,
    schemes: Mapping[str, ActivationScheme],
    ids: torch.Tensor,
    way: Way,
) -> Iterator[Turnable]:
    """The model on windows [sequences, tokens]. possible: the turns that it allows. schemes: how the inputs of linears
    are rounded, by module.
    """
    import torch

    from outlierq.load import study
    from outlierq.transform.rotations.turnable import Turnable

    base = _gains_merged(checkpoint, anatomy, possible)
    original, changed = study(base), study(base)
    weights = Remembered(base)
    hooks = Turning(changed.skeleton, turned_inputs(anatomy, possible, schemes))

    def runner(model: StudiedModel) -> BlockRunner:
        parts = Parts(model, torch.float32, way.device, weights).weights
        return BlockRunner(
            model.skeleton,
            model.structure,
            parts,
            device=way.device,
            dtype=torch.float32,
            batch_size=way.batch_size,
            spill=Spill(way.work),
        )

    def told(index: int, share: float) -> None:
        blocks = original.structure.blocks
        way.listen(Event("original", index, len(blocks), blocks[index].name, step="what it gives", share=share))

    with EndLoss(runner(original), runner(changed), ids, lambda name, part: None) as end:
        batches = end.start(told)
        seen = _Seen(hooks, end, batches)
        yield Turnable(
            start=possible,
            keeps_mean=any(norm.centred for norm in anatomy.norms),
            rounds=bool(schemes),
            batches=batches,
            loss=seen.loss,
            gradient=seen.gradient,
            moments=seen.moments,
            weights=lambda name: reader_weights(base, anatomy, name),
        )


def _gains_merged(checkpoint: Checkpoint, anatomy: Anatomy, possible: Turns) -> Checkpoint:
    """The checkpoint with the gains of norms in their readers where the stream can be turned, so that these read what
    turns.
    """
    from outlierq.transform.rotations.merging import merged
    from outlierq.transform.rotations.turnable import RESIDUAL

    if anatomy.residual_obstacle:
        return checkpoint
    one = {RESIDUAL: possible[RESIDUAL]} if RESIDUAL in possible else {}
    return RewrittenCheckpoint(checkpoint, merged(anatomy, one), "gains") if one else checkpoint


class _Seen:
    """What is asked of the model, with turns [parts, n, n] and scales [K] in float64 outside, and float32 inside."""

    def __init__(self, hooks: Turning, end: EndLoss, batches: int):
        self.hooks, self.end, self.batches = hooks, end, batches
        self._moments: Mapping[str, torch.Tensor] | None = None

    def loss(self, turns: Turns, batches: Sequence[int]) -> float:
        """Mean KL of some batches."""
        self.hooks.turns = {name: each.float() for name, each in turns.items()}
        return self.end.value(batches)

    def gradient(self, turns: Turns, batches: Sequence[int]) -> tuple[float, Turns]:
        """The same, and its gradient by the turns, in their shapes."""
        leaves = {name: each.float().requires_grad_() for name, each in turns.items()}
        self.hooks.turns = leaves
        loss = self.end.gradient(batches)
        idle = [name for name, leaf in leaves.items() if leaf.grad is None]
        if len(idle) == len(leaves):
            raise NumbersError("no turn takes part in the model")
        return loss, {n: leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}

    def moments(self, name: str) -> torch.Tensor:
        """Sums of x x^T of what a rotation sees, in its shape; the model runs once for all of them."""
        if self._moments is None:
            self.hooks.moments = {}
            self.end.value(range(self.batches))
            self._moments, self.hooks.moments = self.hooks.moments, None
        return self._moments[name]


def turned_inputs(anatomy: Anatomy, possible: Turns, schemes: Mapping[str, ActivationScheme]) -> dict[str, TurnedInput]:
    """By module, how its input is turned and rounded: every linear that is turned, or rounded without a turn."""
    from outlierq.transform.rotations.merging import residual_norms, scale_name, scale_places, value_name
    from outlierq.transform.rotations.turnable import RESIDUAL

    def known(name: str) -> str | None:
        return name if name in possible else None

    inputs = {name: TurnedInput(scheme) for name, scheme in schemes.items()}
    for norm in residual_norms(anatomy):
        for site in norm.readers:
            how = TurnedInput(schemes.get(site.module), known(RESIDUAL), known(scale_name(norm)))
            inputs[site.module] = how
    for path in anatomy.values:
        for site in path.consumers:
            inputs[site.module] = TurnedInput(
                schemes.get(site.module),
                known(value_name(path)),
                known(scale_name(path)),
                path.parts,
                tuple(scale_places(path)),
                scale_first=True,
            )
    by_channel: list[ScalePath | GainPath] = [*anatomy.scaled, *anatomy.gains]
    for each in by_channel:
        for site in each.consumers:
            inputs[site.module] = TurnedInput(schemes.get(site.module), scale=known(scale_name(each)))
    return inputs


def reader_weights(base: Checkpoint, anatomy: Anatomy, name: str) -> torch.Tensor:
    """W^T W summed over the linears that read what a rotation turns, [parts, d, d], each over its number of rows."""
    from outlierq.transform.rotations.merging import residual_norms, value_name
    from outlierq.transform.rotations.turnable import RESIDUAL

    if name == RESIDUAL:
        return _gram_of_norms(base, residual_norms(anatomy))
    return _gram_of_values(base, next(path for path in anatomy.values if value_name(path) == name))


def _gram_of_norms(base: Checkpoint, norms: Sequence[Norm]) -> torch.Tensor:
    """Of the readers of norms without gain, [1, n, n]."""
    import torch

    grams = []
    for site in (site for norm in norms for site in norm.readers):
        weight = as_matrix(site, base.read(site.weight)).double()
        grams.append(weight.T @ weight / len(weight))
    return torch.stack(grams).sum(0, keepdim=True)


def _gram_of_values(base: Checkpoint, path: ValuePath) -> torch.Tensor:
    """Of the columns by key-value head, [heads, d, d]."""
    import torch

    total = torch.zeros(len(path.rows), len(path.rows[0]), len(path.rows[0]), dtype=torch.float64)
    for site in path.consumers:
        weight = as_matrix(site, base.read(site.weight)).double()
        for part, columns in zip(path.parts, path.columns, strict=True):
            piece = weight[:, list(columns)]
            total[part] += piece.T @ piece / len(weight)
    return total
