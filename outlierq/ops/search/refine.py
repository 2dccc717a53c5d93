"""Refine a rounded weight: coordinate descent on the codes, closed-form refitting of the scales.

Both steps minimise the same objective as GPTQ, tr((Q - W) H (Q - W)^T), and neither can raise it: a code is changed
only to the best value given all others (the coordinate descent of QuantEase, Behdin et al. 2023, arXiv:2309.01885),
and a scale to the best one given all codes and all other scales, if what can be stored of it errs less.

Both need H (W - Q)^T only, which is brought up to date when a block of columns is looked at: one product with all the
changes so far. (Solving for all scales of a row at once needs a product for each group of columns, three times as much
as everything else here, and gains nothing that the next steps would not find.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from outlierq.ops.grid import Grid, from_groups, in_groups
from outlierq.ops.search.columns import ColumnGrid, descend_block

# Columns of which the residuals are brought up to date together: as many whole groups as fit, or one that is no wider.
BLOCK, WIDEST = 128, 512


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


class _Refinement:
    """Some rows while they are refined. moved: [in, rows], what Q moved by when each block was last looked at."""

    def __init__(self, residuals: torch.Tensor, codes: torch.Tensor, grid: ColumnGrid, hessian: torch.Tensor):
        self.residuals, self.codes, self.grid, self.hessian = residuals, codes, grid, hessian
        self.moved = torch.empty_like(codes)
        self.gains = torch.zeros(codes.shape[1], dtype=torch.float64, device=codes.device)
        self.size = grid.scheme.columns_per_group(len(codes))
        self.refits = grid.scheme.block is None  # the scales of a block belong to many rows, which are not solved here

    def make_pass(self, *, first: bool) -> None:
        """Refit the scales of a block and descend on its codes, block after block; a scale of wider groups before."""
        everything = slice(0, len(self.codes))
        wide = self.size > WIDEST
        if wide and self.refits:
            if not first:
                self._catch_up()
            self.refit(everything, self.residuals, torch.zeros_like(self.moved))
        for block in blocks(len(self.codes), self.size):
            self._update(block, everywhere=not first and not (wide and self.refits))
            local, moved = self.residuals[block].clone(), self.moved[block].zero_()
            if self.refits and not wide:
                self.refit(block, local, moved)
            corner = self.hessian[block, block]
            descend_block(self.grid.part(block), self.codes[block], local, moved, self.gains, corner)

    def _update(self, block: slice, *, everywhere: bool) -> None:
        """The residuals of a block after all that moved since they were last looked at.

        Before it `moved` holds what moved in this pass; from it on what did in the last one, where `everywhere` is set.
        """
        columns = slice(0, len(self.codes) if everywhere else block.start)
        self.residuals[block].addmm_(self.hessian[block, columns], self.moved[columns], alpha=-1)

    def _catch_up(self) -> None:
        """The residuals of all blocks after the last pass."""
        for block in blocks(len(self.codes), self.size):
            later = slice(block.start, len(self.codes))
            self.residuals[block].addmm_(self.hessian[block, later], self.moved[later], alpha=-1)

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
