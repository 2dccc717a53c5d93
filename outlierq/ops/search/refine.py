"""Refine a rounded weight: coordinate descent on the codes, closed-form refitting of the scales.

Both steps minimise the same objective as GPTQ, tr((Q - W) H (Q - W)^T), and neither can raise it: a code is changed
only to the best value given all others (the coordinate descent of QuantEase, Behdin et al. 2023, arXiv:2309.01885),
and a scale to the best one given all codes and all other scales, if what can be stored of it errs less.

Both need H (W - Q)^T only, which is brought up to date when a block of columns is looked at: by a product with all
that moved far from it, of bfloat16 operands where the processor has them, then by one with what moved near it. (Solving
for all scales of a row at once needs a product for each group of columns, three times as much as everything else here,
and gains nothing that the next steps would not find.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from outlierq.ops.grid import Grid, from_groups, in_groups
from outlierq.ops.precision import Operand
from outlierq.ops.search.columns import ColumnGrid, descend_block

# Columns of which the residuals are brought up to date together: as many whole groups as fit, or one that is no wider.
BLOCK, WIDEST = 128, 512
# Columns of blocks that are brought up to date together after what moved far from them, by one product.
WIDE = 512
# Rounds inside a block before the next one, which take no wide product. Output error after one pass, a model of 0.94 M
# parameters in 4 bits: 1.316e-3 with one, 1.283e-3 with two, 1.270e-3 with three; 1.310e-3 with all scales at once.
ROUNDS = 2


def refine(
    residuals: torch.Tensor,
    codes: torch.Tensor,
    grid: ColumnGrid,
    hessian: torch.Tensor,
    *,
    passes: int,
    refits: bool = True,
) -> torch.Tensor:
    """`passes` rounds of scale refitting and coordinate descent; gives by how much the error of each row fell.

    residuals: H (W - Q)^T; codes: float32; both [in, rows], and overwritten as the scales of `grid` are.
    hessian: [in, in]. refits: False leaves the scales as they are. The result is float64 [rows].
    """
    state = _Refinement(residuals, codes, grid, hessian)
    state.refits = refits and state.refits
    for number in range(passes):
        state.make_pass(first=number == 0)
    return state.gains


def refit_scales(w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, times: int = 2) -> Grid:
    """The scales of all groups refitted in turn, so many times, and no code changed. w, codes: [out, in]."""
    columns, turned = ColumnGrid.of(grid, w.shape[1]), codes.T.contiguous()
    change = w - from_groups(grid.decode(in_groups(codes, grid.scheme)), w.shape[1])
    state = _Refinement(hessian @ change.T, turned, columns, hessian)
    for _ in range(times):
        state.refit(slice(0, len(turned)), state.residuals, torch.zeros_like(turned))
    return columns.by_rows()


def blocks(width: int, size: int) -> Iterator[slice]:
    """Blocks of whole groups of `size` columns, or parts of a group that is too wide."""
    step = BLOCK // size * size if size <= BLOCK else size if size <= WIDEST else BLOCK
    return (slice(start, min(start + step, width)) for start in range(0, width, step))


def together(width: int, size: int) -> Iterator[list[slice]]:
    """The blocks of `blocks`, about 512 columns of them together."""
    several: list[slice] = []
    for block in blocks(width, size):
        if several and block.stop - several[0].start > WIDE:
            yield several
            several = []
        several.append(block)
    if several:
        yield several


class _Refinement:
    """Some rows while they are refined. moved: [in, rows], what Q moved by when each block was last looked at."""

    def __init__(self, residuals: torch.Tensor, codes: torch.Tensor, grid: ColumnGrid, hessian: torch.Tensor):
        self.residuals, self.codes, self.grid, self.hessian = residuals, codes, grid, hessian
        self.moved = torch.empty_like(codes)
        self.operand = Operand(self.moved, len(codes))
        self.gains = torch.zeros(codes.shape[1], dtype=torch.float64, device=codes.device)
        self.size = grid.scheme.columns_per_group(len(codes))
        self.refits = grid.scheme.block is None  # the scales of a block belong to many rows, which are not solved here

    def make_pass(self, *, first: bool) -> None:
        """Refit the scales of a block and descend on its codes, block after block; a scale of wider groups before."""
        if self.size > WIDEST and self.refits:
            if not first:
                self._catch_up()
            self.refit(slice(0, len(self.codes)), self.residuals, torch.zeros_like(self.moved))
            first = True
        for wide in together(len(self.codes), self.size):
            start, stop = wide[0].start, wide[-1].stop
            self._update(slice(start, stop), slice(0, start))
            if not first:
                self._update(slice(start, stop), slice(stop, len(self.codes)))
            for block in wide:
                near = slice(start, block.start if first else stop)
                self.residuals[block].addmm_(self.hessian[block, near], self.moved[near], alpha=-1)
                self._improve(block)
            self.operand.renew(slice(start, stop))

    def _improve(self, block: slice) -> None:
        """Some rounds of refitting and descent in a block whose residuals are up to date."""
        corner, moved = self.hessian[block, block], self.moved[block].zero_()
        for _ in range(ROUNDS):
            local = torch.addmm(self.residuals[block], corner, moved, alpha=-1)
            if self.refits and self.size <= WIDEST:
                self.refit(block, local, moved)
            descend_block(self.grid.part(block), self.codes[block], local, moved, self.gains, corner)

    def _update(self, block: slice, columns: slice) -> None:
        """The residuals of a block after what moved in some columns since they were last looked at.

        Before it that is what moved in this pass, from it on what did in the last one.
        """
        self.residuals[block] -= self.operand.times(self.hessian[block, columns], columns)

    def _catch_up(self) -> None:
        """The residuals of all blocks after the last pass."""
        for wide in together(len(self.codes), self.size):
            for block in wide:
                near = slice(block.start, wide[-1].stop)
                self.residuals[block].addmm_(self.hessian[block, near], self.moved[near], alpha=-1)
            self._update(slice(wide[0].start, wide[-1].stop), slice(wide[-1].stop, len(self.codes)))

    def refit(self, block: slice, residuals: torch.Tensor, moved: torch.Tensor) -> None:
        """Refit the scales of the groups in a block, one after the other.

        residuals, moved: the block's, [columns, rows]; both follow what changes.
        """
        for start in range(block.start, block.stop, self.size):
            inside = slice(start - block.start, start - block.start + self.size)
            self._refit_group(start // self.size, inside, block, residuals, moved)

    def _refit_group(
        self, number: int, inside: slice, block: slice, residuals: torch.Tensor, moved: torch.Tensor
    ) -> None:
        """The best change of one scale, given all else, is (c r) / (c H c), c being its centred codes.

        It is made where the change that can be stored lowers the error.
        """
        columns = slice(block.start + inside.start, block.start + inside.stop)
        codes = self.grid.centred(self.codes[columns], number)
        power = (codes * (self.hessian[columns, columns] @ codes)).sum(0)
        best = self.grid.scale[number] + (codes * residuals[inside]).sum(0) / power
        other = self.grid.with_scale(number, torch.where(power > 0, best, self.grid.scale[number]))
        change = other.values(self.codes[columns], 0) - self.grid.values(self.codes[columns], number)
        pulled = self.hessian[block, columns] @ change
        gain = (change * (residuals[inside] * 2 - pulled[inside])).sum(0)
        better = gain > 0
        self.grid.take(number, other, better)
        moved[inside] += change * better
        residuals -= pulled * better
        self.gains += torch.where(better, gain, 0.0)
