"""What the source's tensors must have become: the recipe's rewrites repeated, its folds and orders done again.

A rewrite is repeated from the recipe, as in the run. Of a fold the report keeps who took part; its scale is told from
the result: exactly where a norm absorbed it (the quotient of its gains), by least squares where a linear did, once from
the columns of the consumers and once from the rows of the producer, which must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.move import numbers_of
from outlierq.pipeline.checking.finding import Findings
from outlierq.transform.gather_outliers import last_in_runs

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint, TensorInfo

CHECK = "folds"
# A column is fit well when this part of it, by length, is told by its source; 4-bit codes leave about 0.1.
WELL = 0.5
# Product of a consumer's and a producer's scale, of which one undoes the other: 1 to a few per cent in 4 bits.
LARGEST_PRODUCT = 1.5


class Expected:
    """The tensors of a source as a result must hold them, before they were rounded.

    reference: the source, with the recipe's rewrites. result: the decoded checkpoint. transforms: rows of the report.
    findings: get what contradicts itself between a fold's producer and its consumers.
    """

    def __init__(
        self, reference: Checkpoint, result: Checkpoint, transforms: Iterable[Mapping[str, Any]], findings: Findings
    ):
        self.reference, self.result, self.findings = reference, result, findings
        self._steps: dict[int, list[Mapping[str, Any]]] = {}
        self._block_of: dict[str, int] = {}
        for row in transforms:
            trace, block = row.get("trace"), row.get("block")
            if isinstance(trace, Mapping) and isinstance(block, int):
                self._steps.setdefault(block, []).append(trace)
                self._block_of |= dict.fromkeys(_tensors_of(trace), block)
        self._at, self._moved = -1, dict[str, "torch.Tensor"]()
        self._judged: set[int] = set()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers by name."""
        return self.reference.tensors

    def __contains__(self, name: str) -> bool:
        return name in self.reference.tensors

    def is_moved(self, name: str) -> bool:
        """Whether a fold or an order changed the tensor."""
        return name in self._block_of

    @property
    def moved(self) -> list[str]:
        """Every tensor that a fold or an order changed."""
        return list(self._block_of)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the shape of its header, as stored, or in float32 where it was moved.

        SourceError when a trace does not fit the source.
        """
        if name not in self._block_of:
            return self.reference.read(name)
        block = self._block_of[name]
        if self._at != block:
            self._moved, self._at = self._block(block), block
        return self._moved[name]

    def _block(self, index: int) -> dict[str, torch.Tensor]:
        """Every moved tensor of a block. What contradicts itself is said once."""
        findings = Findings() if index in self._judged else self.findings
        self._judged.add(index)
        names = [name for name, block in self._block_of.items() if block == index]
        lost = [name for name in names if name not in self.reference.tensors or name not in self.result.tensors]
        if lost:
            raise SourceError(f"the report says that {lost[0]} was changed, which is not in the source and here")
        tensors = {name: self.reference.read(name).float() for name in names}
        for trace in self._steps[index]:
            try:
                _Step(trace, tensors, self.result, findings).repeat()
            except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
                raise SourceError(f"a fold in the report does not fit the source: {error}") from error
        return tensors


def _tensors_of(trace: Mapping[str, Any]) -> list[str]:
    """Every tensor that a move changed."""
    biases = trace.get("shift") or trace.get("kind") == "order"
    producers = [name for weight, bias, _ in trace["producers"] for name in (weight, bias) if name]
    sites = [name for weight, bias, _ in trace["sites"] for name in (weight, bias if biases and bias else None) if name]
    return [*producers, *sites] if trace["kind"] != "order" else [*producers, *(w for w, _, _ in trace["sites"])]


class _Step:
    """One move of a block's tensors, float32, which are changed."""

    def __init__(
        self, trace: Mapping[str, Any], tensors: dict[str, torch.Tensor], result: Checkpoint, findings: Findings
    ):
        import torch

        self.trace, self.tensors, self.result, self.findings = trace, tensors, result, findings
        self.index = torch.tensor(numbers_of(trace["index"]))
        self.sites: Sequence[tuple[str, str | None, bool]] = trace["sites"]

    def repeat(self) -> None:
        """Do it again."""
        if self.trace["kind"] == "order":
            self._reorder()
        else:
            self._fold()

    def _reorder(self) -> None:
        """Rows of the producers and columns of the consumers change places."""
        import torch

        orders = last_in_runs(torch.tensor(self.trace["columns"], dtype=torch.long), self.index, self.trace["width"])
        if orders is None:
            raise ValueError("its runs are not those of the producer")
        channels, order = orders
        for weight, bias, transposed in self.trace["producers"]:
            matrix = _matrix(self.tensors[weight], transposed)
            rows = torch.cat([order, torch.arange(len(order), len(matrix))])
            self.tensors[weight] = _matrix(matrix[rows], transposed)
            if bias:
                self.tensors[bias] = self.tensors[bias][rows]
        for weight, _, transposed in self.sites:
            self.tensors[weight] = _matrix(_matrix(self.tensors[weight], transposed)[:, channels], transposed)

    def _fold(self) -> None:
        """The producer is divided by a scale for each of its channels, the consumers' columns are multiplied."""
        weight, bias, transposed = self.trace["producers"][0]
        is_linear = self.trace["kind"] == "linear"
        scale = self._of_linear(weight, transposed) if is_linear else self._of_norm(weight)
        columns = scale[self.index]
        if bias:
            self._biases(bias, scale, columns)
        for name, _, is_transposed in self.sites:
            matrix = _matrix(self.tensors[name], is_transposed) * columns
            self.tensors[name] = _matrix(matrix, is_transposed)

    def _biases(self, bias: str, scale: torch.Tensor, columns: torch.Tensor) -> None:
        """The producer's bias loses shift and scale, the consumers' get what the shift was worth."""
        before, after = self.tensors[bias], self.result.read(bias).float()
        if not self.trace["shift"]:
            self.tensors[bias] = before / scale
            return
        shift = before[self.index] - after[self.index] * columns
        self.tensors[bias] = after
        for name, own, is_transposed in self.sites:
            if own is None:
                raise ValueError(f"what {name} reads was shifted, and it has no bias")
            self.tensors[own] = self.tensors[own] + _matrix(self.tensors[name], is_transposed) @ shift

    def _of_norm(self, weight: str) -> torch.Tensor:
        """[channels] quotient of the gains before and after. A gain that changed its sign, or vanished, is a fault."""
        import torch

        offset = 1.0 if self.trace["kind"] == "offset-norm" else 0.0
        before, after = self.tensors[weight] + offset, self.result.read(weight).float() + offset
        if before.shape != after.shape:
            raise ValueError(f"{weight} is {list(after.shape)}, in the source {list(before.shape)}")
        wrong = (before.sign() != after.sign()) | ~after.isfinite()
        if bool(wrong.any()):
            what = f"{int(wrong.sum())} of {len(wrong)} gains have lost the sign of their source: no scale does that"
            self.findings.fault(CHECK, weight, what)
        usable = ~wrong & (after != 0)
        self.tensors[weight] = torch.where(usable, after, before) - offset
        return torch.where(usable, before / torch.where(usable, after, torch.ones_like(after)), torch.ones_like(after))

    def _of_linear(self, weight: str, transposed: bool) -> torch.Tensor:
        """[rows] scale of each row of the producer, from the consumers' columns or from the row, whichever is clearer;
        a fault where both are clear and one does not undo the other.
        """
        import torch

        before = _matrix(self.tensors[weight], transposed)
        row, row_is_clear = fitted(_matrix(self.result.read(weight).float(), transposed).T, before.T)
        stacks = [(self.result.read(name).float(), self.tensors[name], flag) for name, _, flag in self.sites]
        now = torch.cat([_matrix(stored, flag) for stored, _, flag in stacks])
        then = torch.cat([_matrix(source, flag) for _, source, flag in stacks])
        column, column_is_clear = fitted(now, then, self.index, len(before))
        both = row_is_clear & column_is_clear
        product = torch.where(both, row * column, torch.ones_like(row))
        apart = both & ~((product > 1 / LARGEST_PRODUCT) & (product < LARGEST_PRODUCT))
        if bool(apart.any()):
            first = int(apart.nonzero()[0])
            what = (
                f"{int(apart.sum())} of its {len(apart)} rows and the columns of {self.sites[0][0]} do not undo each "
                f"other, first row {first}: {row[first]:.3g} x {column[first]:.3g}"
            )
            self.findings.fault(CHECK, weight, what)
        ones = torch.ones_like(row)
        from_row = torch.where(row_is_clear & (row > 0), 1 / torch.where(row > 0, row, ones), ones)
        scale = torch.where(column_is_clear & (column > 0), column, from_row)
        self.tensors[weight] = _matrix(before / scale[:, None], transposed)
        return scale


def fitted(
    now: torch.Tensor, then: torch.Tensor, index: torch.Tensor | None = None, count: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor of each column of `then` [n, k] that brings it nearest to `now`, and whether it is told well by it.

    index, count: columns with one number share a factor, of `count`.
    """
    import torch

    sums = [(now * then).sum(0), (then * then).sum(0), (now * now).sum(0)]
    if index is not None:
        sums = [torch.zeros(count).index_add(0, index, each) for each in sums]
    across, old, new = sums
    factor = across / old.clamp(min=1e-30)
    # Of the squared length of a column: what is left of it when the fitted part is taken off.
    left = new - factor * across
    return factor, (new > 0) & (old > 0) & (left <= WELL**2 * new)


def _matrix(stored: torch.Tensor, transposed: bool) -> torch.Tensor:
    """[out, in] of a stored tensor, and back."""
    return stored.T.contiguous() if transposed else stored
