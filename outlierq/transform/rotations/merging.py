"""Turns merged into weights: `Rewrite` of a model that computes what it did, with other channels inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outlierq.transform.rotate import Anatomy, Builder, GainPath, Linear, Norm, Rewrite, ScalePath, ValuePath
from outlierq.transform.rotations.turnable import RESIDUAL, SCALE, VALUES, Turns

Places = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Turn:
    """Orthogonal matrices on an axis. matrices: [parts, d, d] float64. places: the channels of each run of d channels,
    None for the whole axis. parts: which matrix turns each of them.
    """

    matrices: torch.Tensor
    places: Places | None = None
    parts: tuple[int, ...] = (0,)

    @property
    def held(self) -> int:
        """Elements of the matrices."""
        return self.matrices.numel()

    def __call__(self, x: torch.Tensor, read: object) -> torch.Tensor:
        """x R over the last axis of x [..., n]."""
        matrices = self.matrices.to(x)
        if self.places is None:
            return x @ matrices[0]
        places = torch.tensor(self.places, device=x.device)
        result = x.clone()
        result[..., places] = torch.einsum("...pd,pde->...pe", x[..., places], matrices[list(self.parts)])
        return result


@dataclass(frozen=True, eq=False)
class Scale:
    """A factor of each channel. factor: [K]. places: the channels [K], None for all of the axis."""

    factor: torch.Tensor
    places: tuple[int, ...] | None = None

    @property
    def held(self) -> int:
        """Elements of the factor."""
        return self.factor.numel()

    def __call__(self, x: torch.Tensor, read: object) -> torch.Tensor:
        """The channels of x [..., n], times their factors."""
        if self.places is None:
            return x * self.factor.to(x)
        result = x.clone()
        result[..., torch.tensor(self.places, device=x.device)] *= self.factor.to(x)
        return result


def residual_norms(anatomy: Anatomy) -> list[Norm]:
    """The norms inside of blocks behind which the stream can be turned; none where it cannot."""
    return [] if anatomy.residual_obstacle else [norm for norm in anatomy.norms if norm.readers[0].block is not None]


def value_name(path: ValuePath) -> str:
    """Of the rotation of a block's values."""
    return f"{VALUES}.{path.block}.{path.producer.module}"


def scale_name(owner: Norm | ValuePath | ScalePath | GainPath) -> str:
    """Of the scale on what some linears read."""
    site = owner.readers[0] if isinstance(owner, Norm) else owner.consumers[0]
    return f"{SCALE}.{site.block}.{site.module}"


def identity_turns(anatomy: Anatomy) -> Turns:
    """Every turn that the model allows, changing nothing; see `Turnable.start` for names and shapes."""

    def ones(count: int) -> torch.Tensor:
        return torch.ones(count, dtype=torch.float64)

    turns = {}
    if not anatomy.residual_obstacle:
        turns[RESIDUAL] = torch.eye(anatomy.width, dtype=torch.float64)[None]
        turns |= {scale_name(norm): ones(anatomy.width) for norm in residual_norms(anatomy)}
    for path in anatomy.values:
        heads, width = len(path.rows), len(path.rows[0])
        turns[value_name(path)] = torch.eye(width, dtype=torch.float64).expand(heads, -1, -1).clone()
        turns[scale_name(path)] = ones(heads * width)
    turns |= {scale_name(path): ones(len(path.index)) for path in anatomy.scaled}
    return turns | {scale_name(path): ones(path.channels) for path in anatomy.gains}


def merged(anatomy: Anatomy, turns: Turns, notes: tuple[str, ...] = (), *, pending: str = "") -> Rewrite:
    """The model with these turns, of `identity_turns`, merged. The gains of scaled norms should be exact as stored."""
    build = Builder(anatomy)
    if RESIDUAL in turns:
        build.residual(Turn(turns[RESIDUAL]))
        for norm in residual_norms(anatomy):
            if scale_name(norm) in turns:
                scale = turns[scale_name(norm)]
                build.scaled_norm(norm, 1 / scale - (1.0 if norm.offset else 0.0), Scale(scale))
    for path in anatomy.values:
        rows, columns = _of_values(path, turns)
        build.between(path.producer, rows, path.consumers, columns)
    for each in anatomy.scaled:
        if scale_name(each) in turns:
            scale = turns[scale_name(each)]
            build.between(each.producer, (Scale(1 / scale, each.index),), each.consumers, (Scale(scale),))
    for inner in anatomy.gains:
        if scale_name(inner) in turns:
            scale = turns[scale_name(inner)]
            build.scaled_gain(inner, Scale(1 / scale), Scale(scale))
    return Rewrite(build.changes, notes, build.untied, pending=pending)


def _of_values(path: ValuePath, turns: Turns) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
    """What is done to the rows of the producer, and to the columns of the consumers."""
    rows: list[Linear] = []
    columns: list[Linear] = []
    if scale_name(path) in turns:
        scale = turns[scale_name(path)]
        rows.append(Scale(1 / scale, tuple(row for head in path.rows for row in head)))
        columns.append(Scale(scale[scale_places(path)]))
    if value_name(path) in turns:
        matrices = turns[value_name(path)]
        rows.append(Turn(matrices, path.rows, tuple(range(len(path.rows)))))
        columns.append(Turn(matrices, path.columns, path.parts))
    return tuple(rows), tuple(columns)


def scale_places(path: ValuePath) -> list[int]:
    """For every column of the consumers, the place of its factor in the scale of the values."""
    width = len(path.rows[0])
    return [part * width + place for part in path.parts for place in range(width)]
