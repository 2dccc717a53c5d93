"""Is each quantized weight a rounded form of what it was made from? Judged as a whole, by rows, columns, groups, codes.

Errors are absolute: nothing is fitted before it is judged. Two measures must agree before something is called a fault:
the error beside the length of the source, and the error beside the step of the grid, since a row with one outlier may
lose all others, and that is still rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outlierq.pipeline.checking.finding import Fault, Findings

if TYPE_CHECKING:
    from outlierq.core.quant_tensor import QuantTensor

CHECK = "source"
# Relative error from which a weight is not a rounded form of its source (rounding to 2 bits gives about 0.5).
FOREIGN = 0.8
# The same of a row, a column or a group, together with a factor or a distance that rounding does not give.
FOREIGN_PART = 0.7
LEAST_FACTOR, LARGEST_FACTOR = 0.4, 1.6
# Root mean square of the error in steps: 0.29 of rounding; GPTQ moves columns that hardly count by about one.
STEPS_OF_A_ROW, STEPS_OF_A_COLUMN = 0.8, 1.6
# Largest distance of one weight from its source in steps, unless its code is at an end of the range: 0.5 of rounding.
FARTHEST_ROUNDED, FARTHEST = 0.75, 12.0
# Where this part of all weights lies this near, all went to the nearest code, but for a search that moves some by one.
MOST_OF_ALL, NEAR, FARTHEST_SEARCHED = 0.99, 0.65, 2.5
# Root mean square of a row's error in steps beside that of the usual row, as a factor and in robust deviations.
BEYOND_ROWS, STRAY_ROW, FEWEST_ROWS, FEWEST_WEIGHTS = 1.5, 14.0, 16, 1000
# Part of columns and groups that error compensation may leave without likeness to their source: a column of which few
# tokens tell goes wherever others need it. In SmolLM2-135M after 512 tokens up to 0.7 % of columns, 0.8 % of groups.
LEAST_PARTS = {"columns": 0.05, "groups": 0.02}
# Its least size, in steps.
LEAST_STRAY = 0.1
# Part of half the range by which a weight may be off after folds: their scales are told from rounded weights.
MOVED_PART = 0.08
# The same as a part of half the range, where that is more: error compensation and fitted scales move whole columns.
FARTHEST_IN_RANGE = 0.25
# Parts of half the range: where a weight is taken for clipped, and where it is put then.
NEAR_THE_END, NOT_FAR_FROM_IT = 0.9, 0.5
# Mean difference of a group from its source in steps of its scale: up to 1.19 in checkpoints of GPTQModel and
# llm-compressor. A zero point that is wrong by 2 gives 2.
LARGEST_SHIFT = 1.6
# Where no step is known: distance of one weight beside the largest of its 32 neighbours.
NEIGHBOURS, NEAREST_BESIDE, FARTHEST_BESIDE = 32, 0.3, 0.9


@dataclass(frozen=True)
class Grid:
    """What is known of how a weight was rounded. steps: [out, in] distance of neighbouring codes, None when not known.

    lowest, highest: [out, in] whether a code is the first or the last of its range, to which all beyond goes. width:
    columns of a group. rounded: each weight went to the nearest code. has_zero_points: by group. half:
    [out, in] half of the range. moved: folds came before, whose scales are told from the rounded weights.
    """

    steps: torch.Tensor | None
    lowest: torch.Tensor | None
    highest: torch.Tensor | None
    width: int
    rounded: bool
    has_zero_points: bool = False
    half: torch.Tensor | None = None
    moved: bool = False


def grid_of(quantized: QuantTensor | None, columns: int, *, rounded: bool, moved: bool = False) -> Grid:
    """The grid of a decoded weight [out, columns]; without codes, and of pairs, only neighbours are known."""
    if quantized is None or quantized.scheme.kind == "outlier-victim":
        return Grid(None, None, None, NEIGHBOURS if columns % NEIGHBOURS == 0 else columns, rounded)
    scheme, codes = quantized.scheme, quantized.codes.float()
    width = scheme.columns_per_group(columns)
    spread = _spread(quantized)
    scale = spread.abs()
    if scheme.kind == "float":
        # E2M1: neighbours are 0.5 apart below 2, then 1, from 4 on 2; E2M3: a quarter of that. E4M3: an eighth of the
        # number, 2^-9 near zero.
        coarse = torch.where(codes.abs() < 2, 0.5, torch.where(codes.abs() < 4, 1.0, 2.0))
        coarse = coarse if scheme.bits == 4 else coarse / 4
        apart = coarse if scheme.bits < 8 else (codes.abs() / 8).clamp(min=2.0**-9)
        steps = scale * apart
    else:
        steps = scale
    last = scheme.code_max
    first_code, last_code = codes <= (-last if scheme.symmetric else scheme.code_min), codes >= last
    turned = spread < 0  # a symmetric grid that reaches farther up than down
    lowest = torch.where(turned, last_code, first_code)
    highest = torch.where(turned, first_code, last_code)
    has_zero_points = quantized.zero_point is not None and quantized.super_scale is None
    half = scale * ((scheme.code_max - scheme.code_min) / 2)
    width = width if scheme.block is None else columns
    return Grid(steps, lowest, highest, width, rounded, has_zero_points, half, moved)


def _spread(quantized: QuantTensor) -> torch.Tensor:
    """[out, in] scale of each weight."""
    rows, columns = quantized.codes.shape
    scale = quantized.float_scale
    if quantized.scheme.block is not None:
        height, width = quantized.scheme.block
        return scale.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return scale.repeat_interleave(columns // scale.shape[1], 1)


def relative_error(weight: torch.Tensor, expected: torch.Tensor) -> float:
    """||weight - expected|| / ||expected||, both [out, in]; of a source of zeros 0 where the weight is zero, else 1."""
    size, error = expected.norm(), (weight - expected).norm()
    if size == 0:
        return 0.0 if error == 0 else 1.0
    return float(error / size)


def judge_weight(name: str, weight: torch.Tensor, expected: torch.Tensor, grid: Grid, findings: Findings) -> float:
    """Judge one weight, float32 [out, in] each; gives its relative error. The first kind of fault that fits is said."""
    error = relative_error(weight, expected)
    if not error <= FOREIGN and not _within(weight, expected, grid):
        findings.fault(CHECK, name, f"is not a rounded form of its source: relative error {error:.2f}")
        return error
    for look in (_wrong_shift, _wrong_parts, _wrong_codes, _stray_rows):
        fault = look(weight, expected, grid)
        if fault is not None:
            findings.fault(fault.check, name, fault.what)
            break
    return error


def _wrong_shift(weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> Fault | None:
    """Groups that lie beside their source by whole steps: their zero points are wrong."""
    if grid.steps is None or not grid.has_zero_points:
        return None
    steps = grid.steps.reshape(len(weight), -1, grid.width)[..., 0].clamp(min=1e-30)
    shift = (weight - expected).reshape(len(weight), -1, grid.width).mean(-1) / steps
    far = shift.abs() > LARGEST_SHIFT
    if not bool(far.any()):
        return None
    row, group = (int(i) for i in far.nonzero()[0])
    return Fault(
        "zero points",
        "",
        f"{int(far.sum())} of {far.numel()} groups lie beside their source by whole steps, first row {row} group "
        f"{group} by {shift[row, group]:.1f} (a wrong zero point does that)",
    )


def _within(weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> bool:
    """Whether the error is that of rounding on a coarse grid, however large beside the source."""
    if grid.steps is None:
        return False
    apart = (weight - expected).abs()
    return bool((apart <= grid.steps * FARTHEST_ROUNDED).float().mean() > 0.99) and bool(weight.any())


def _wrong_parts(weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> Fault | None:
    """The first of rows, columns and groups of which some are no rounded form of their source."""
    steps = grid.steps
    views: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]] = {
        "rows": (weight, expected, steps, STEPS_OF_A_ROW),
        "columns": (weight.T, expected.T, None if steps is None else steps.T, STEPS_OF_A_COLUMN),
    }
    if grid.width < weight.shape[1] and weight.shape[1] % grid.width == 0:
        now, then = weight.reshape(-1, grid.width), expected.reshape(-1, grid.width)
        views["groups"] = (now, then, None if steps is None else steps.reshape(-1, grid.width), STEPS_OF_A_ROW)
    compensated = not (grid.rounded or grid.steps is None) and not _is_nearest(weight, expected, grid)
    for what, (now, then, step, limit) in views.items():
        wrong = _foreign(now, then, step, limit)
        least = LEAST_PARTS.get(what, 0.0) * len(wrong) if compensated else 0
        if int(wrong.sum()) > least:
            first = int(wrong.nonzero()[0])
            factor = (now[first] @ then[first] / (then[first] @ then[first]).clamp(min=1e-30)).item()
            return Fault(
                CHECK,
                "",
                f"{int(wrong.sum())} of {len(wrong)} {what} are no rounded form of their source, first {what[:-1]} "
                f"{first} (the factor that fits best is {factor:.3g})",
            )
    return None


def _foreign(now: torch.Tensor, then: torch.Tensor, steps: torch.Tensor | None, limit: float) -> torch.Tensor:
    """[n] whether a row of `now` [n, k] is no rounded form of that of `then`."""
    apart = now - then
    size = then.norm(dim=1)
    error = apart.norm(dim=1) / size.clamp(min=1e-30)
    factor = (now * then).sum(1) / (size * size).clamp(min=1e-30)
    wrong: torch.Tensor = (error > FOREIGN_PART) & ~((factor > LEAST_FACTOR) & (factor < LARGEST_FACTOR))
    if steps is None:
        # A row that rounds to nothing beside its neighbours is told by the largest numbers of the whole.
        beside: torch.Tensor = apart.norm(dim=1) > 0.1 * size.median().clamp(min=1e-30)
        return wrong & beside
    in_steps = (apart / steps.clamp(min=1e-30)).square().mean(1).sqrt()
    return wrong & (in_steps > limit)


def _clipped(weight: torch.Tensor, expected: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """[out, in] weights beyond a range that a search made narrower; descent may leave them a little inside of it."""
    same_side = weight * expected > 0
    return same_side & (expected.abs() > NEAR_THE_END * half) & (weight.abs() > NOT_FAR_FROM_IT * half)


def _wrong_codes(weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> Fault | None:
    """Single weights that lie farther from their source than rounding brings them."""
    apart = (weight - expected).abs()
    if grid.steps is None:
        columns = weight.shape[1]
        beside = expected.abs().reshape(len(expected), -1, grid.width).amax(-1).repeat_interleave(grid.width, 1)
        most = NEAREST_BESIDE if grid.rounded else FARTHEST_BESIDE
        wrong = apart > most * beside.view(len(expected), columns) + 1e-30
        limit = f"{most:.0%} of the largest weight beside them"
    else:
        assert grid.half is not None, "a grid without codes"
        ends = _ends(weight, expected, grid)
        most = FARTHEST_ROUNDED
        if not grid.rounded:
            most = FARTHEST_SEARCHED if _is_nearest(weight, expected, grid) else FARTHEST
        allowed = most * grid.steps
        if grid.moved:
            allowed = torch.maximum(allowed, MOVED_PART * grid.half)
        if most >= FARTHEST:
            allowed = torch.maximum(allowed, FARTHEST_IN_RANGE * grid.half)
            # Error compensation moves columns that hardly count as far as others need it.
            ends = ends | ((apart / grid.steps.clamp(min=1e-30)).square().mean(0).sqrt() > STEPS_OF_A_COLUMN / 2)
        wrong = (apart > allowed + 1e-6 * expected.abs().max()) & ~ends
        limit = f"{most:.3g} steps"
    if not bool(wrong.any()):
        return None
    row, column = (int(i) for i in wrong.nonzero()[0])
    return Fault(
        CHECK,
        "",
        f"{int(wrong.sum())} of {wrong.numel()} weights lie more than {limit} from their source, first row {row} "
        f"column {column}: {weight[row, column]:.4g}, in the source {expected[row, column]:.4g}",
    )


def _ends(weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[out, in] weights whose source lies beyond the range, so that no distance from it says anything."""
    assert grid.lowest is not None and grid.highest is not None and grid.half is not None, "a grid without codes"
    ends = (grid.lowest & (expected < weight)) | (grid.highest & (expected > weight))
    return ends if grid.rounded else ends | _clipped(weight, expected, grid.half)


def _is_nearest(weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> bool:
    """Whether nearly all weights went to the nearest code: no error compensation came between."""
    assert grid.steps is not None, "a grid without codes"
    usual = ((weight - expected).abs() / grid.steps.clamp(min=1e-30))[~_ends(weight, expected, grid)]
    if usual.numel() < FEWEST_WEIGHTS:
        return False
    return usual.kthvalue(int(MOST_OF_ALL * usual.numel())).values.item() <= NEAR


def _stray_rows(weight: torch.Tensor, expected: torch.Tensor, grid: Grid) -> Fault | None:
    """Rows with another error than all others, in steps: each row is rounded by the same method."""
    if grid.steps is None or grid.moved or len(weight) < FEWEST_ROWS:
        return None  # after folds, rows differ by how well their scales are told
    if not (grid.rounded or _is_nearest(weight, expected, grid)):
        return None  # error compensation leaves to some rows four times what it leaves to others
    ends = _ends(weight, expected, grid)
    in_steps = torch.where(ends, 0.0, (weight - expected) / grid.steps.clamp(min=1e-30))
    rows = in_steps.square().mean(1).sqrt()
    usual = rows.median()
    limit = usual + STRAY_ROW * 1.4826 * (rows - usual).abs().median()
    wrong = rows > torch.maximum(limit, BEYOND_ROWS * usual).clamp(min=LEAST_STRAY)
    if not bool(wrong.any()):
        return None
    first = int(wrong.nonzero()[0])
    what = (
        f"{int(wrong.sum())} of {len(rows)} rows have another error than all others, first row {first}: "
        f"{rows[first]:.2f} steps, usually {usual:.2f}"
    )
    return Fault(CHECK, "", what)
