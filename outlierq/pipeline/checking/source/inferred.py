"""Folds that no report tells of, found in what they left: gains that changed, rows and columns that undo each other.

Each becomes a trace like those of a report (`core/move.py`), to be repeated by `Expected`. A fold is inferred where it
brings a linear nearer to the result than its source is; what is wrong with the result beside it stays to be judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.move import runs
from outlierq.pipeline.checking.plain import is_norm
from outlierq.pipeline.checking.source.expected import fitted
from outlierq.pipeline.checking.source.ordered import inferred_orders

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

# A norm's consumers come nearer by its quotient, however little where rounding is coarse; another takes them farther.
NEARER = 0.999
# Correlation of log row and log column from which one undoes the other (by chance 0.1 in 100 channels); channels that
# it takes; least deviation of a fold; median of the product, since searched scales make weights smaller; part of the
# channels that need not be told.
LEAST_OPPOSED, FEWEST_CHANNELS, LEAST_MOVED, SHRUNK, MOST_UNCLEAR = -0.5, 32, 0.005, 0.2, 0.2
# What is left of the change of a bias that a shift explains.
EXPLAINED = 0.3


def inferred_folds(plain: Checkpoint, reference: Checkpoint) -> list[dict[str, Any]]:
    """Rows with block and trace, like those of a report. plain: the decoded result. reference: its source."""
    blocks: dict[str, list[str]] = {}
    for name in plain.tensors:
        match = re.match(r"(.*?\.\d+)\.", name)
        if match and name in reference.tensors and plain.tensors[name].shape == reference.tensors[name].shape:
            blocks.setdefault(match.group(1), []).append(name)
    rows = []
    for number, names in enumerate(blocks.values()):
        try:
            rows += [{"block": number, "trace": trace} for trace in _Block(plain, reference, names).traces()]
        except SourceError:
            continue  # said where the tensor was read first
    return rows


class _Block:
    """now, then: weights [out, in] of its linears as they are, and as the source has them after folds found so far."""

    def __init__(self, plain: Checkpoint, reference: Checkpoint, names: list[str]):
        self.plain, self.reference, self.names = plain, reference, set(names)
        linears = [name for name in names if name in plain.packed and len(plain.tensors[name].shape) == 2]
        self.now = {name: plain.read(name).float() for name in linears}
        self.then = {name: reference.read(name).float() for name in linears}

    def traces(self) -> Iterator[dict[str, Any]]:
        """Norms first: a linear may be a consumer of one and a producer for another."""
        yield from self._of_norms()
        linears = self.plain.linears
        split = [name for name in self.now if name in linears and "outlier_columns" in linears[name].members]
        if split:
            for trace in inferred_orders(self.now, self.then, split, _heads(self.plain.config)):
                sides = {
                    side: [[name, self._bias(name), flag] for name, _, flag in trace[side]]
                    for side in ("producers", "sites")
                }
                yield {**trace, **sides}
        else:
            yield from self._of_linears()

    def _of_norms(self) -> Iterator[dict[str, Any]]:
        """Each linear is behind the norm whose quotient brings it nearest, if any does."""
        quotients = dict(self._quotients())
        behind: dict[tuple[str, str], list[str]] = {}
        for linear, then in self.then.items():
            fitting = {key: q for key, q in quotients.items() if len(q) == then.shape[1]}
            best = min(fitting, key=lambda key: _left(self.now[linear], then * fitting[key]), default=None)
            if best is not None and self._is_nearer(linear, fitting[best]):
                behind.setdefault(best, []).append(linear)
        for (name, kind), linears in behind.items():
            other = behind.get((name, "norm" if kind == "offset-norm" else "offset-norm"), [])
            if (len(linears), kind) < (len(other), "norm" if kind == "offset-norm" else "offset-norm"):
                continue  # a gain is of one kind
            for linear in linears:
                self.then[linear] = self.then[linear] * quotients[name, kind]
            yield self._trace(kind, name, linears, list(range(len(quotients[name, kind]))))

    def _quotients(self) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
        """By name and kind of each norm that changed: [channels] its gains before over those after."""
        import torch

        for name in sorted(self.names):
            if len(self.plain.tensors[name].shape) != 1 or not is_norm(name) or not name.endswith(".weight"):
                continue
            before, after = self.reference.read(name).float(), self.plain.read(name).float()
            if not torch.equal(before, after):
                yield (name, "norm"), _quotient(before, after)
                yield (name, "offset-norm"), _quotient(before + 1, after + 1)

    def _is_nearer(self, linear: str, quotient: torch.Tensor) -> bool:
        """Whether a quotient brings a linear nearer. Rows are fitted for one that is a producer, too; not fitted for a
        quotient that is nearly even, which rows could stand for.
        """
        now, then = self.now[linear], self.then[linear]
        plain = float((now - then * quotient).norm()) < NEARER * float((now - then).norm())
        return plain or _left(now, then * quotient) < NEARER * _left(now, then)

    def _of_linears(self) -> Iterator[dict[str, Any]]:
        import torch

        from outlierq.calibrate.folds import index_maps

        for consumer in sorted(self.then):
            pairs = (
                (producer, torch.tensor(index))
                for producer in sorted(self.then)
                if producer != consumer
                for index in index_maps(len(self.now[producer]), self.now[consumer].shape[1], _heads(self.plain.config))
            )
            for producer, index in pairs:
                scale = self._scale(producer, consumer, index)
                is_shifted = self._is_shifted(producer, consumer, index, scale)
                if scale is None and not is_shifted:
                    continue
                trace = self._trace("linear", producer, [consumer], index.tolist())
                yield trace | {"shift": is_shifted}
                if scale is not None:
                    self._move(producer, consumer, index, scale)
                break

    def _scale(self, producer: str, consumer: str, index: torch.Tensor) -> torch.Tensor | None:
        """[rows] what the consumer's columns were multiplied by, where the producer's rows undo it; else None."""
        import torch

        column, is_clear = fitted(self.now[consumer], self.then[consumer], index, len(self.now[producer]))
        row, row_is_clear = fitted(self.now[producer].T, self.then[producer].T)
        both = is_clear & row_is_clear & (column > 0) & (row > 0)
        if both.float().mean() < 1 - MOST_UNCLEAR or int(both.sum()) < FEWEST_CHANNELS:
            return None
        columns, rows = column[both].log(), row[both].log()
        if columns.std() < LEAST_MOVED or (columns + rows).median().abs() > SHRUNK:
            return None
        opposed = torch.corrcoef(torch.stack([columns, rows]))[0, 1]
        return column.where(both, torch.ones_like(column)) if opposed < LEAST_OPPOSED else None

    def _is_shifted(self, producer: str, consumer: str, index: torch.Tensor, scale: torch.Tensor | None) -> bool:
        """Whether what the producer's bias lost is what the consumer's bias got."""
        import torch

        name, own_name = self._bias(producer), self._bias(consumer)
        if name is None or own_name is None:
            return False
        before, after = self.reference.read(name).float(), self.plain.read(name).float()
        own, now = self.reference.read(own_name).float(), self.plain.read(own_name).float()
        if torch.equal(own, now):
            return False
        columns = torch.ones(len(index)) if scale is None else scale[index]
        shift = before[index] - after[index] * columns
        left = now - own - self.then[consumer] @ shift
        return bool(left.norm() < EXPLAINED * (now - own).norm())

    def _move(self, producer: str, consumer: str, index: torch.Tensor, scale: torch.Tensor) -> None:
        """Both as the fold leaves them."""
        self.then[consumer] = self.then[consumer] * scale[index]
        self.then[producer] = self.then[producer] / scale[:, None]

    def _trace(self, kind: str, producer: str, sites: list[str], index: list[int]) -> dict[str, Any]:
        """As `core.move.trace_of_fold` writes it."""
        return {
            "kind": kind,
            "producers": [[producer, self._bias(producer), False]],
            "sites": [[site, self._bias(site), False] for site in sites],
            "index": runs(index),
            "shift": False,
        }

    def _bias(self, weight: str) -> str | None:
        bias = f"{weight.removesuffix('weight')}bias"
        return bias if bias in self.names else None


def _quotient(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """[channels] before / after, 1 where a sign was lost."""
    import torch

    usable = (before.sign() == after.sign()) & (after != 0) & after.isfinite()
    return torch.where(usable, before / torch.where(usable, after, torch.ones_like(after)), torch.ones_like(after))


def _left(now: torch.Tensor, then: torch.Tensor) -> float:
    """What is left of `now` [out, in] beside the multiple of each row of `then` that comes nearest, as a length."""
    factor = (now * then).sum(1, keepdim=True) / then.square().sum(1, keepdim=True).clamp(min=1e-30)
    return float((now - factor * then).norm())


def _heads(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(attention heads, key-value heads), where config.json tells both."""
    for part in (config, config.get("text_config") or {}):
        heads = part.get("num_attention_heads")
        groups = part.get("num_key_value_heads", heads)
        if isinstance(heads, int) and isinstance(groups, int) and heads > 0 and groups > 0 and heads % groups == 0:
            return [(heads, groups)]
    return []
