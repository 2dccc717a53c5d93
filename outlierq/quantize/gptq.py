"""GPTQ: rounding with error compensation. Frantar et al. 2022, arXiv:2210.17323."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt

from outlierq.core.errors import NumbersError
from outlierq.core.machine.threads import each_alone
from outlierq.core.notes import note
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.errors import tell
from outlierq.ops.grid import Grid, code_dtype, from_groups, in_groups, joined, minmax_grid, to_quant_tensor
from outlierq.ops.search.columns import ColumnGrid, check_compiled
from outlierq.ops.search.level_fit import fits_levels, refit_levels
from outlierq.ops.search.power import OutputPower
from outlierq.ops.search.refine import refine
from outlierq.ops.search.scale_search import group_blocks, improved, rows_of
from outlierq.ops.search.sweep import panel_rows, residuals, squared_errors, sweep
from outlierq.ops.search.vectors import descend_vectors, sweep_vectors, vector_order
from outlierq.ops.solve import Factor, factored
from outlierq.registry import quantizer


@quantizer("gptq", needs=("hessian",), copies=2, factors=True, paper="arXiv:2210.17323")
def gptq(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    damp: Annotated[float, Gt(0)] = 0.01,
    order: Literal["none", "activation", "group-aware"] = "activation",
    scale_search: Literal["minmax", "hessian"] = "hessian",
    refine_passes: Annotated[int, Ge(0)] = 2,
) -> QuantTensor:
    """Round column by column; push each column's error onto the columns still to come.

    Minimises tr((Q - W) H (Q - W)^T) (Eq. 1). U is the upper Cholesky factor of H^-1 (Step 3).
    w: [out, in] float32. stats.hessian: [in, in]. damp: fraction of mean(diag H) added to the diagonal.
    order: `activation` visits columns by falling diag H with the scales of their original groups (static groups: no
    g_idx); `group-aware` (arXiv:2505.14638) sorts columns inside groups, then the groups. scale_search: `hessian` takes
    for each group the scale with the least output error, `minmax` the one that just holds it. refine_passes: passes of
    coordinate descent and scale refitting after the sweep, each of which can only lower the error; 0 is plain GPTQ.
    """
    hessian = stats.need("hessian")
    start = minmax_grid(w, scheme)
    blocks = group_blocks(hessian, scheme) if scale_search == "hessian" else None
    factor = _factor(hessian, damp, visiting_order(hessian, order, scheme))
    if factor is None:
        grid = start if blocks is None else improved(w, start, blocks)
        return to_quant_tensor(from_groups(grid.encode(in_groups(w, scheme)), w.shape[1]), grid)
    check_compiled()
    solver = _Solver(w, start, blocks, hessian, factor, refine_passes)
    with each_alone(on_cpu=w.device.type == "cpu") as together:
        together(solver.solve, range(0, len(w), solver.rows))
    result = to_quant_tensor(solver.codes, solver.grid())
    if scheme.vector == 1:
        tell(result, solver.errors, solver.power)
    return result


class _Solver:
    """One weight, solved panel by panel: rows do not depend on each other, and a panel needs little memory.

    codes: [out, in] as they are stored. errors, power: [out] float64, (W - Q) H (W - Q)^T and W H W^T of every row;
    not where codes stand for several weights.
    """

    def __init__(
        self,
        w: torch.Tensor,
        start: Grid,
        blocks: torch.Tensor | None,
        hessian: torch.Tensor,
        factor: Factor,
        passes: int,
    ):
        self.w, self.start, self.blocks, self.hessian = w, start, blocks, hessian
        self.factor, self.passes, self.scheme = factor, passes, start.scheme
        self.inverse = factor.inverse() if self.scheme.vector > 1 else None
        self.output_power = OutputPower(hessian, factor)
        self.rows = panel_rows(self.scheme) if w.device.type == "cpu" else len(w)
        self.codes = torch.empty(w.shape, dtype=code_dtype(self.scheme), device=w.device)
        self.errors, self.power = torch.empty(2, len(w), dtype=torch.float64, device=w.device)
        self._grids: dict[int, Grid] = {}

    def solve(self, first: int) -> None:
        """The panel that starts at row `first`."""
        part = slice(first, first + self.rows)
        grid = rows_of(self.start, part)
        if self.blocks is not None:
            grid = improved(self.w[part], grid, self.blocks)
        if self.inverse is not None:
            self.codes[part], self._grids[first] = self._by_vectors(self.w[part], grid, self.inverse)
        else:
            codes, self._grids[first] = self._by_columns(part, grid)
            self.codes[part] = codes.T

    def grid(self) -> Grid:
        """That of all panels, when they are solved."""
        parts = [self._grids[first] for first in sorted(self._grids)]
        whole = joined(parts)
        return whole if self.start.units is None or self.start.units.dim() > 1 else replace(whole, units=parts[0].units)

    def _by_columns(self, part: slice, grid: Grid) -> tuple[torch.Tensor, Grid]:
        """Codes [in, rows] float32 and grid of some rows."""
        values = self.w[part].T[self.factor.order]
        self.power[part] = self.output_power.of(values)
        columns = ColumnGrid.of(grid, self.w.shape[1])
        codes, errors = sweep(values, columns, self.factor)
        self.errors[part] = squared_errors(values, errors, self.factor)
        if not self.passes:
            return codes, grid
        if fits_levels(self.scheme):
            return codes, self._refine_levels(part, codes, grid)
        left = residuals(values, errors, self.factor)
        del values, errors
        self.errors[part] -= refine(left, codes, columns, self.hessian, passes=self.passes)
        return codes, columns.by_rows()

    def _refine_levels(self, part: slice, codes: torch.Tensor, grid: Grid) -> Grid:
        """The refined grid of a type of GGUF; `codes` [in, rows] are overwritten."""
        w = self.w[part]
        for _ in range(self.passes):
            grid = refit_levels(w, codes.T.contiguous(), grid, self.hessian)
            change = w.T - from_groups(grid.decode(in_groups(codes.T.contiguous(), self.scheme)), w.shape[1]).T
            left = self.hessian @ change
            columns = ColumnGrid.of(grid, w.shape[1])
            self.errors[part] = (left * change).sum(0).double()
            self.errors[part] -= refine(left, codes, columns, self.hessian, passes=1, refits=False)
        return grid

    def _by_vectors(self, w: torch.Tensor, grid: Grid, inverse: torch.Tensor) -> tuple[torch.Tensor, Grid]:
        """Codes [rows, in] float32 and grid where one code stands for several weights."""
        codes = sweep_vectors(w, grid, inverse, self.factor.order)
        for _ in range(self.passes):
            grid = refit_levels(w, codes, grid, self.hessian)
            codes = descend_vectors(w, codes, grid, self.hessian, self.factor.order)
        return codes, grid


def visiting_order(hessian: torch.Tensor, order: str, scheme: QuantScheme) -> torch.Tensor:
    """Permutation in which columns are rounded, those of a vector together."""
    columns = column_order(hessian.diagonal(), order, scheme.columns_per_group(len(hessian)))
    return columns if scheme.vector == 1 else vector_order(hessian.diagonal(), columns, scheme.together)


def _factor(hessian: torch.Tensor, damp: float, order: torch.Tensor) -> Factor | None:
    """What `factored` gives, or None when no damping helps; anything but the asked damping is noted."""
    try:
        factor = factored(hessian, damp, order)
    except NumbersError as error:
        note(f"rounded to nearest: {error.what}")
        return None
    if factor.level > damp:
        note(f"damping raised from {damp:g} to {factor.level:g} of the mean diagonal")
    return factor


def column_order(importance: torch.Tensor, order: str, columns: int) -> torch.Tensor:
    """Permutation in which columns are rounded. importance: [in] diag H; columns: width of a group."""
    if order == "activation":
        return torch.argsort(importance, descending=True, stable=True)
    if order == "group-aware":
        missing = -len(importance) % columns  # the last block may be narrower
        grouped = torch.nn.functional.pad(importance, (0, missing), value=float("-inf")).view(-1, columns)
        inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
        groups = torch.argsort(grouped.amax(1), descending=True, stable=True)
        places = (inside + torch.arange(len(grouped), device=inside.device)[:, None] * columns)[groups].flatten()
        return places[places < len(importance)]
    return torch.arange(len(importance), device=importance.device)
