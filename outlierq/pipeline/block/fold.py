"""One input group's transform: choose a move, make it storable, fold its inverse into the producer, and check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.folds import apply_fold
from outlierq.core.errors import NumbersError
from outlierq.core.model import Checkpoint, Fold, InputGroup, as_matrix, from_matrix
from outlierq.core.move import UNCHANGED, Move, trace_of_fold
from outlierq.core.notes import collecting
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.load.source.shards import torch_dtype
from outlierq.transform.stage import choose_move, storable_scale, storable_shift

if TYPE_CHECKING:
    import torch

    from outlierq.registry import Method


@dataclass(frozen=True)
class Choice:
    """What the transforms chose for a group, and what they said about it."""

    move: Move
    notes: tuple[str, ...]


def choose(
    group: InputGroup,
    stats: InputStats,
    scheme: QuantScheme,
    tensors: Mapping[str, torch.Tensor],
    steps: Sequence[tuple[Method, dict[str, Any]]],
    checkpoint: Checkpoint,
) -> Choice | None:
    """The move of one group's input; None without a fold. Nothing is changed.

    Reads the weights of the group's sites, [out, in] or as a Conv1D stores them, and what `_producer_read` names.
    """
    import torch

    fold = group.fold
    if fold is None:
        return None
    weights = [as_matrix(s, tensors[s.weight].float()) for s in group.sites]
    tie = torch.tensor(fold.index, device=weights[0].device)
    with collecting() as notes:
        move = choose_move(torch.cat(weights), stats, scheme, tie, steps, group.name, shiftable=fold.shift)
    producer = {n: tensors[n].float() for n in _producer_read(fold)}
    move = _storable(move, fold, producer, tie, torch_dtype(checkpoint.tensors[fold.weight].dtype))
    return Choice(move, tuple(notes))


def carry_out(
    group: InputGroup,
    choice: Choice | None,
    tensors: dict[str, torch.Tensor],
    steps: Sequence[tuple[Method, dict[str, Any]]],
) -> dict[str, Any]:
    """Rewrite the weights of one group so that its input is moved; `InputStats.moved` keeps statistics consistent.

    tensors: the block's tensors; the dict gets new float32 tensors of the same shape for producer and consumers.
    Returns a row for the report; its "folded" names every tensor that changed.
    """
    row: dict[str, Any] = {"group": group.name, "method": "+".join(m.name for m, _ in steps), "note": group.fold_note}
    if choice is None:
        return {**row, "fold": None, "folded": []}
    fold, move = group.admitted, choice.move
    weights = {s: as_matrix(s, tensors[s.weight].float()) for s in group.sites}
    producer = {n: tensors[n].float() for n in (fold.weight, fold.bias) if n}
    changed = apply_fold(producer, fold, move.scale, move.shift)
    changed |= {s.weight: from_matrix(s, w * move.scale) for s, w in weights.items()}
    if move.shift is not None:
        changed |= {s.known_bias: tensors[s.known_bias].float() + w @ move.shift for s, w in weights.items()}
    check_move(group, move, tensors, changed)
    tensors |= changed
    if any(method.shifts for method, _ in steps):
        row["note"] += f"; {fold.shift_note}"
    spread = {"scale_min": move.scale.min().item(), "scale_max": move.scale.max().item()}
    if move.shift is not None:
        spread["shift_max"] = move.shift.abs().max().item()
    said = {"choice": "; ".join(choice.notes)} if choice.notes else {}
    trace = trace_of_fold(group, shift=move.shift is not None)
    return {**row, "fold": fold.weight, "folded": list(changed), **said, **spread, "trace": trace}


def waves(groups: Sequence[InputGroup]) -> list[list[InputGroup]]:
    """The groups in waves: choices of one wave may be made side by side, and then carried out in order.

    The result is the same as of one group after another. A group waits for an earlier one that changes what its choice
    reads; it is not carried out before one that changes the same tensors, or that still has to read them.
    """
    by_number: list[list[InputGroup]] = []
    reading: dict[str, int] = {}  # by tensor name: the last wave in which a choice reads it, or it is changed
    changing: dict[str, int] = {}
    for group in groups:
        fold = group.fold
        if fold is None:
            reads, changes = set(), set()
        else:
            weights, biases = {s.weight for s in group.sites}, {s.bias for s in group.sites if s.bias}
            reads = weights | _producer_read(fold)
            changes = weights | {n for n in (fold.weight, fold.bias) if n} | (biases if fold.shift else set())
        after = [changing[n] + 1 for n in reads if n in changing]
        after += [wave[n] for n in changes for wave in (changing, reading) if n in wave]
        number = max(after, default=0)
        for names, wave in ((reads, reading), (changes, changing)):
            wave.update({n: max(number, wave.get(n, 0)) for n in names})
        by_number += [[] for _ in range(number + 1 - len(by_number))]
        by_number[number].append(group)
    return by_number


def _producer_read(fold: Fold) -> set[str]:
    """The producer's tensors that `_storable` looks at."""
    return {n for n in (fold.weight, fold.bias) if n} if fold.kind != "linear" or fold.shift else set()


def _storable(
    move: Move, fold: Fold, producer: Mapping[str, torch.Tensor], tie: torch.Tensor, dtype: torch.dtype
) -> Move:
    """The nearby move that the producer's 16-bit gain and bias can hold without rounding.

    The weight of a linear is rounded anyway: its scale is taken as it is.
    """
    if fold.kind != "linear":
        offset = 1.0 if fold.kind == "offset-norm" else 0.0
        gain = (producer[fold.weight] + offset)[tie]
        move = replace(move, scale=storable_scale(gain, move.scale, dtype, offset))
    if move.shift is not None:
        assert fold.bias is not None, "a shift is taken off by the producer's bias"
        move = replace(move, shift=storable_shift(producer[fold.bias][tie], move.shift, move.scale, dtype))
    return move


def check_move(
    group: InputGroup, move: Move, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> None:
    """NumbersError unless producer and consumers, moved back in float32, are what they were, in the same shape.

    This needs no forward pass: that the fold itself changes nothing was proved when the statistics were made.
    """
    fold = group.admitted
    offset = 1.0 if fold.kind == "offset-norm" else 0.0
    rows, scale = list(fold.index), move.scale
    shift = 0 if move.shift is None else move.shift

    def fed(tensor: torch.Tensor) -> torch.Tensor:
        """The producer's rows as the group's channels see them."""
        return (tensor.float().T if fold.transposed else tensor.float())[rows]

    restored = fed(after[fold.weight]) + offset
    restored = restored * (scale[:, None] if restored.dim() == 2 else scale)
    _compare(group, fold.weight, restored, fed(before[fold.weight]) + offset)
    if fold.bias:
        back = after[fold.bias].float()[rows] * scale + shift
        _compare(group, fold.bias, back, before[fold.bias].float()[rows])
    for site in group.sites:
        weight = as_matrix(site, before[site.weight].float())
        _compare(group, site.weight, as_matrix(site, after[site.weight]) / scale, weight)
        if move.shift is not None:
            bias = site.known_bias
            _compare(group, bias, after[bias] - weight @ move.shift, before[bias].float())


def _compare(group: InputGroup, name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NumbersError when the largest difference is not small beside the largest value."""
    largest = max(expected.abs().max().item(), 1e-30)
    change = (actual - expected).abs().max().item() / largest
    if not change <= UNCHANGED:
        raise NumbersError(
            f"moving the input of {group.name} changed {name} by {change:.2e}, more than {UNCHANGED:g}",
            hint="this is a fault of outlierq; remove the `transform` section and report it",
        )
