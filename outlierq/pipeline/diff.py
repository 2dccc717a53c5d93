"""`outlierq diff`: the tensors that two checkpoints do not share, and by how much the others differ, decoded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.report import Shown
from outlierq.pipeline.asked.events import Event, Listener, silent

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint


@dataclass(frozen=True)
class Change:
    """A tensor whose values differ. relative_error: ||b - a|| / ||a||. largest: largest difference of a value.

    Both are None when the shapes differ. shapes: in a and in b.
    """

    name: str
    relative_error: float | None
    largest: float | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Difference(Shown):
    """added: tensors of b alone. removed: of a alone. changed: largest error first. config: keys that differ."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[Change, ...]
    equal: int
    config: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def diff(a: Checkpoint, b: Checkpoint, listen: Listener = silent) -> Difference:
    """Compare every tensor of two checkpoints by its decoded values; SourceError when one cannot be decoded."""
    from outlierq.load import unpacked

    first, second = unpacked(a), unpacked(b)
    common = [name for name in first.tensors if name in second.tensors]
    changed, equal = [], 0
    for number, name in enumerate(common):
        listen(Event("diff", number, len(common), name))
        change = _change(first, second, name)
        equal += change is None
        changed += [] if change is None else [change]
    ordered = sorted(changed, key=lambda change: -(change.relative_error or float("inf")))
    keys = sorted(a.config.keys() | b.config.keys())
    return Difference(
        added=tuple(name for name in second.tensors if name not in first.tensors),
        removed=tuple(name for name in first.tensors if name not in second.tensors),
        changed=tuple(ordered),
        equal=equal,
        config=tuple(key for key in keys if a.config.get(key) != b.config.get(key)),
    )


def _change(first: Checkpoint, second: Checkpoint, name: str) -> Change | None:
    """How one tensor differs; None when its values are equal, however they are stored."""
    import torch

    one, other = first.read(name), second.read(name)
    shapes = tuple(one.shape), tuple(other.shape)
    if shapes[0] != shapes[1]:
        return Change(name, None, None, shapes)
    wide = torch.promote_types(one.dtype, other.dtype) if one.dtype != other.dtype else one.dtype
    one, other = one.to(wide), other.to(wide)
    if torch.equal(one, other):
        return None
    one, other = one.float(), other.float()
    difference = (other - one).abs()
    error = difference.norm() / one.norm().clamp(min=1e-30)
    return Change(name, error.item(), difference.max().item(), shapes)
