"""`outlierq diff`: the tensors that two checkpoints do not share, and by how much the others differ, decoded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError
from outlierq.core.report import Shown
from outlierq.load import report_beside
from outlierq.pipeline.asked.events import Event, Listener, silent
from outlierq.pipeline.checking.finding import Findings
from outlierq.pipeline.checking.source.against import remade
from outlierq.pipeline.checking.source.expected import Expected
from outlierq.pipeline.remodel.rewrite import original_of

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

# Relative error of a tensor that was computed again and stored in bfloat16: 2e-3 and less.
ROUNDED = 4e-3


@dataclass(frozen=True)
class Change:
    """A tensor whose values differ. relative_error: ||b - a|| / ||a||. largest: largest difference of a value.

    Both are None when the shapes differ. shapes: in a and in b.
    """

    name: str
    relative_error: float | None
    largest: float | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is no more than a dtype of 16 bits makes of a number that was computed."""
        return self.relative_error is not None and self.relative_error < ROUNDED


@dataclass(frozen=True)
class Difference(Shown):
    """added: tensors of b alone. removed: of a alone. changed: largest error first. config: keys that differ.

    moved: tensors of which one is the other after the folds and rotations that a report says, which change nothing of
    what the model computes; those that were rounded as well are in `changed`, with the error after the folds.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[Change, ...]
    equal: int
    config: tuple[str, ...]
    moved: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def diff(a: Checkpoint, b: Checkpoint, listen: Listener = silent) -> Difference:
    """Compare every tensor of two checkpoints by its decoded values; SourceError when one cannot be decoded.

    Where one was made from the other by a run whose report is beside it, its folds and rotations are done to the other
    first: what they change is no difference.
    """
    from outlierq.load import unpacked

    first, second = unpacked(a), unpacked(b)
    seen_first, seen_second = _seen(first, second)
    common = [name for name in seen_first.tensors if name in seen_second.tensors]
    changed, moved, equal = [], [], 0
    for number, name in enumerate(common):
        listen(Event("diff", number, len(common), name))
        change = _change(seen_first, seen_second, name)
        if change is not None and (seen_first.is_moved(name) or seen_second.is_moved(name)) and change.is_rounding:
            moved.append(name)
        elif change is not None:
            changed.append(change)
        elif not _is_plainly_equal(first, second, name):
            moved.append(name)
        else:
            equal += 1
    ordered = sorted(changed, key=lambda change: -(change.relative_error or float("inf")))
    keys = sorted(a.config.keys() | b.config.keys())
    return Difference(
        added=tuple(name for name in seen_second.tensors if name not in seen_first.tensors),
        removed=tuple(name for name in seen_first.tensors if name not in seen_second.tensors),
        changed=tuple(ordered),
        equal=equal,
        config=tuple(key for key in keys if a.config.get(key) != b.config.get(key)),
        moved=tuple(moved),
    )


def _seen(first: Checkpoint, second: Checkpoint) -> tuple[Expected, Expected]:
    """Both checkpoints, one of them as the other's run would have moved it, where it was made from it."""
    for source, result, is_second in ((first, second, True), (second, first, False)):
        try:
            report = report_beside(result.path)
            made_of = None if report is None else remade(source, report, result.path)
        except OutlierqError:  # of another model, or of a recipe that is not known here
            continue
        if report is not None and made_of is not None and report.fingerprint == original_of(made_of).fingerprint:
            moved = Expected(made_of, result, report.transforms, Findings())
            own = Expected(result, result, (), Findings())
            return (moved, own) if is_second else (own, moved)
    return Expected(first, first, (), Findings()), Expected(second, second, (), Findings())


def _is_plainly_equal(first: Checkpoint, second: Checkpoint, name: str) -> bool:
    """Whether a tensor is the same in both, before anything is done to one."""
    if name not in first.tensors or name not in second.tensors:
        return False
    one, other = first.read(name), second.read(name)
    return one.shape == other.shape and _is_equal(one, other, is_served=_is_served(first, second, name))


def _is_equal(one: torch.Tensor, other: torch.Tensor, *, is_served: bool) -> bool:
    """Whether two tensors of a shape hold the same values. is_served: also where one is the other rounded to its
    dtype: a plain copy of what a compressed checkpoint serves is no other weight.
    """
    import torch

    wide = torch.promote_types(one.dtype, other.dtype)
    if torch.equal(one.to(wide), other.to(wide)):
        return True
    return is_served and (torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one))


def _is_served(first: Checkpoint, second: Checkpoint, name: str) -> bool:
    """Whether one stores a tensor compressed and the other plain."""
    return (name in first.packed) != (name in second.packed)


def _change(first: Expected, second: Expected, name: str) -> Change | None:
    """How one tensor differs; None when its values are equal, however they are stored."""
    one, other = first.read(name), second.read(name)
    shapes = tuple(one.shape), tuple(other.shape)
    if shapes[0] != shapes[1]:
        return Change(name, None, None, shapes)
    if _is_equal(one, other, is_served=_is_served(first.reference, second.reference, name)):
        return None
    one, other = one.float(), other.float()
    difference = (other - one).abs()
    error = difference.norm() / one.norm().clamp(min=1e-30)
    return Change(name, error.item(), difference.max().item(), shapes)
