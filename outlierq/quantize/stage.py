"""Stage 5: quantize the linears of one input group, those with the same scheme solved as one stack."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.errors import NumbersError, during
from outlierq.core.model import LinearSite
from outlierq.core.notes import collecting
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import SiteRow
from outlierq.core.scheme import QuantScheme
from outlierq.ops.errors import RelativeErrors, relative_error_of_both, told_errors
from outlierq.ops.packing import ROWS_PER_WORD
from outlierq.ops.search.clip_search import static_scale, weighed_rows
from outlierq.ops.search.sweep import PANEL_ROWS
from outlierq.ops.solve import sharing_factors

# Weights quantized at a time without statistics: their codes, of one byte, are still in the cache when they are packed
# and read back. Half as many cost 7 % more time in Python, twice as many save nothing more.
PIECE_WEIGHTS = 1 << 21
# Panels that are in float32 at a time at least, and rows that are compared with what became of them.
LEAST_PANELS, COMPARED_ROWS = 4, 1024
# Of float16, whose smallest number is 2^-24: below, a scale has 4 bits or less. And what no method loses otherwise.
SMALL_SCALE, ABSURD_ERROR = 2.0**-20, 0.5

if TYPE_CHECKING:
    from outlierq.core.stats import InputStats
    from outlierq.registry import Method


def quantize_group(
    weights: Mapping[LinearSite, torch.Tensor],
    schemes: Mapping[LinearSite, QuantScheme],
    stats: InputStats | None,
    method: Method,
    options: Mapping[str, Any],
    *,
    clip_search: bool = True,
    most_weights: int | None = None,
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """Quantize every site of `weights` ([out, in] each, one input) that has a scheme.

    Sites with one scheme are stacked along their rows: they share the hessian, so they are solved together. Without
    statistics rows have nothing in common, and are quantized piece by piece, so that a piece stays in the cache.
    clip_search: whether the scale of a static activation scheme may clip (ops/search/clip_search.py). most_weights: of
    a stack that is solved at once, to bound memory; a larger one is solved some rows at a time (None: never). The rows
    of a weight do not depend on each other, but sums over other numbers of rows may differ in the last bit.
    """
    stacks: dict[QuantScheme, list[LinearSite]] = {}
    for site in weights:
        if site in schemes:
            stacks.setdefault(schemes[site], []).append(site)
    done: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
    for scheme, sites in stacks.items():
        with during("quantize", ", ".join(site.module for site in sites)):
            if stats is None:
                for site in sites:
                    pieces = torch.split(weights[site], rows_of_a_piece(site.in_features, scheme))
                    rows = quantize_rows(site, pieces, scheme, method, options)
                    done[site] = QuantTensor.stack(list(rows)), rows.row
            else:
                members = [(site, weights[site]) for site in sites]
                for part in _aligned(members, scheme):
                    done |= _quantize_stack(part, scheme, stats, method, options, most_weights)
    if stats is not None:
        with during("input scale", ", ".join(site.module for site in weights)):
            done = _with_activations(done, weights, stats, clip_search)
    return {site: done[site] for site in weights if site in done}


def _aligned(
    members: list[tuple[LinearSite, torch.Tensor]], scheme: QuantScheme
) -> list[list[tuple[LinearSite, torch.Tensor]]]:
    """The members of one stack; each alone where two-dimensional blocks would reach over their edges."""
    if scheme.block is not None and any(len(weight) % scheme.block[0] for _, weight in members):
        return [[member] for member in members]
    return [members]


def _with_activations(
    done: dict[LinearSite, tuple[QuantTensor, SiteRow]],
    weights: Mapping[LinearSite, torch.Tensor],
    stats: InputStats,
    clip_search: bool,
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """The results with the scales of static inputs, and with the output error of both operands.

    Sites that share an input share its scale; runtimes that fuse them into one product have room for one only.
    """
    asked = (result.scheme.activations for result, _ in done.values())
    schemes = {scheme for scheme in asked if scheme is not None}
    if not schemes:
        return done
    if stats.rows is None and all(scheme.dynamic for scheme in schemes):
        return done  # the recipe asked for no statistics of this kind: the error stays that of the weights
    rows, counts = weighed_rows(stats)
    changed = dict(done)
    for scheme in schemes:
        members = {site: pair for site, pair in done.items() if pair[0].scheme.activations == scheme}
        dense = {site: result.dequantize() for site, (result, _) in members.items()}
        scale = None
        if not scheme.dynamic:
            dtype = getattr(torch, next(iter(members.values()))[0].scheme.scale_dtype)
            stack = torch.cat(list(dense.values()))
            scale = static_scale(stack, stats, scheme, dtype, search=clip_search)
        for site, (result, row) in members.items():
            error = relative_error_of_both(
                weights[site].float(), dense[site], rows, counts, scheme, scale, result.outlier_columns
            )
            changed[site] = (replace(result, input_scale=scale), replace(row, output_error=error))
    return changed


class QuantizedRows:
    """A quantized weight some rows at a time: iterate over it once, in order. row: then, its row of the report."""

    row: SiteRow

    def __init__(self, pieces: Generator[QuantTensor, None, SiteRow]):
        self._pieces = pieces

    def __iter__(self) -> Iterator[QuantTensor]:
        self.row = yield from self._pieces

    @classmethod
    def whole(cls, quantized: QuantTensor, row: SiteRow) -> QuantizedRows:
        """All rows [out, in] in one piece."""

        def once() -> Generator[QuantTensor, None, SiteRow]:
            yield quantized
            return row

        return cls(once())


def quantize_rows(
    site: LinearSite, pieces: Iterable[torch.Tensor], scheme: QuantScheme, method: Method, options: Mapping[str, Any]
) -> QuantizedRows:
    """A method that needs no statistics, on some rows at a time, when they are asked for.

    pieces: the weight [out, in] in order, `rows_of_a_piece` rows each; a piece may be overwritten after it was used.
    NumbersError on NaN or Inf, before any row that holds one is given.
    """
    return QuantizedRows(_quantized_rows(site, iter(pieces), scheme, method, options))


def _quantized_rows(
    site: LinearSite, pieces: Iterator[torch.Tensor], scheme: QuantScheme, method: Method, options: Mapping[str, Any]
) -> Generator[QuantTensor, None, SiteRow]:
    """The pieces; returns the row of the report."""
    seconds, change, power, bits, notes = 0.0, 0.0, 0.0, 0.0, []
    for piece in pieces:
        started = time.perf_counter()
        with collecting() as said:
            at_once = method.at_once(piece, scheme, **options) if method.at_once else None
            done, squares, lost = at_once or _one_by_one(site, piece, pieces, scheme, method, options)
        notes += said
        power += squares
        change += lost
        bits += done.bits_per_weight * len(piece) / site.out_features
        seconds += time.perf_counter() - started
        yield done
    error = (change / power) ** 0.5 if power else 0.0
    return replace(_row(site, done, method.name, None, error, seconds, notes), bits_per_weight=bits)


def _one_by_one(
    site: LinearSite,
    piece: torch.Tensor,
    others: Iterator[torch.Tensor],
    scheme: QuantScheme,
    method: Method,
    options: Mapping[str, Any],
) -> tuple[QuantTensor, float, float]:
    """What `Method.at_once` gives, one step after the other. NumbersError also counts in `others`, which follow."""
    rows = piece.to(torch.float32, copy=True)
    squares = _sum_of_squares(rows)
    if not math.isfinite(squares):
        bad = sum(int((~each.isfinite()).sum()) for each in itertools.chain([rows], others))
        _check_finite(site, bad, squares)
    done = method.function(rows, None, scheme, **options)
    return done, squares, _sum_of_squares(done.dequantize().sub_(rows))


def rows_of_a_piece(columns: int, scheme: QuantScheme) -> int:
    """As many rows as stay in the cache; whole blocks where rows share scales."""
    return _whole_blocks(PIECE_WEIGHTS // columns, scheme)


def shares_over_all_rows(scheme: QuantScheme) -> bool:
    """Whether all rows of a weight share a scale of scales."""
    return scheme.kind == "float" and scheme.scales == "two-level"


def _whole_blocks(rows: int, scheme: QuantScheme) -> int:
    """About as many rows, at least one, that share no scale with others."""
    if shares_over_all_rows(scheme):
        return 1 << 62
    together = 1 if scheme.block is None else scheme.block[0]
    if not scheme.symmetric:
        together = math.lcm(together, ROWS_PER_WORD)  # zero points are packed along rows
    return max(1, rows // together) * together


def _sum_of_squares(values: torch.Tensor) -> float:
    """Sum of the squares of a float32 tensor, in one pass and without a copy."""
    flat = values.view(-1)
    return torch.dot(flat, flat).item()


def _check_rows(site: LinearSite, rows: torch.Tensor) -> None:
    """`_check_finite` of float32 rows [rows, in]."""
    squares = _sum_of_squares(rows)
    if not math.isfinite(squares):
        _check_finite(site, int((~rows.isfinite()).sum()), squares)


def _check_finite(site: LinearSite, bad: int, power: float) -> None:
    """NumbersError when the sum of squares shows that a weight is NaN, Inf or huge. bad: how many are not finite."""
    if not math.isfinite(power) and not bad:
        raise NumbersError(
            f"{site.weight} holds weights of more than 1e15, whose squares are beyond float32",
            hint="a model with such weights computes nothing; keep them as they are by quantize.ignore",
        )
    if not math.isfinite(power):
        raise NumbersError(
            f"{site.weight} holds {bad} NaN or Inf among {site.out_features * site.in_features} weights",
            hint="the source checkpoint is damaged; get it again",
        )


def _check_scales(site: LinearSite, quantized: QuantTensor, weight_error: float) -> None:
    """NumbersError when most scales are near the smallest number of float16, and little of the weight is left."""
    scale = quantized.scale if quantized.super_scale is None else quantized.super_scale
    if scale.dtype != torch.float16 or (0 < weight_error < ABSURD_ERROR):
        return
    if scale.float().median().item() < SMALL_SCALE and (weight_error or not quantized.dequantize().any()):
        raise NumbersError(
            f"the weights of {site.weight} are too small for the format's float16 scales: the relative error would be "
            f"{weight_error:.2f}",
            hint="add it to quantize.ignore, or write compressed-tensors, whose scales have the model's own dtype",
        )


def _quantize_stack(
    members: list[tuple[LinearSite, torch.Tensor]],
    scheme: QuantScheme,
    stats: InputStats,
    method: Method,
    options: Mapping[str, Any],
    most_weights: int | None,
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """The members of a stack, some rows at a time where that changes nothing or `most_weights` asks for it."""
    together = sum(weight.numel() for _, weight in members)
    piece = solved_at_once(together, members[0][0].in_features, scheme, method.factors, most_weights)
    if piece >= together:
        return _quantize_together(members, scheme, stats, method, options)
    with sharing_factors():
        return {
            site: _quantize_rows_of(site, weight, scheme, stats, method, options, piece) for site, weight in members
        }


def solved_at_once(stack: int, width: int, scheme: QuantScheme, factors: bool, most_weights: int | None) -> int:
    """How many weights of a stack of so many are in float32 at a time.

    factors: whether the method solves rows panel by panel anyway, with one factor of the hessian for all.
    """
    whole = not factors or shares_over_all_rows(scheme)
    piece = stack if whole else min(stack, rows_in_float32() * width)
    return piece if most_weights is None else min(piece, most_weights)


def rows_in_float32() -> int:
    """Rows that are in float32 at a time where a method solves panels of them: enough for all threads."""
    return PANEL_ROWS * max(LEAST_PANELS, torch.get_num_threads())


def _quantize_together(
    members: list[tuple[LinearSite, torch.Tensor]],
    scheme: QuantScheme,
    stats: InputStats,
    method: Method,
    options: Mapping[str, Any],
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """One call of the method on the stacked float32 rows, split again afterwards."""
    starts = [0, *itertools.accumulate(len(weight) for _, weight in members)]
    places = {site: slice(*ends) for (site, _), ends in zip(members, itertools.pairwise(starts), strict=True)}
    first = members[0][1]
    stack = torch.empty(starts[-1], first.shape[1], device=first.device)
    for site, weight in members:
        stack[places[site]] = weight
    for site, place in places.items():
        _check_rows(site, stack[place])
    started = time.perf_counter()
    with collecting() as notes, told_errors() as told:
        result = method.function(stack, stats, scheme, **options)
    share = (time.perf_counter() - started) / len(stack)
    done = {}
    for site, place in places.items():
        part, errors = result.rows(place.start, place.stop), RelativeErrors()
        _compare(errors, stack[place], part, stats.hessian, told.of(result, place))
        row = _row(site, part, method.name, errors.output, errors.weight, share * len(stack[place]), notes)
        done[site] = (part, row)
    return done


def _quantize_rows_of(
    site: LinearSite,
    weight: torch.Tensor,
    scheme: QuantScheme,
    stats: InputStats,
    method: Method,
    options: Mapping[str, Any],
    piece: int,
) -> tuple[QuantTensor, SiteRow]:
    """One linear, as many of its rows at a time as have `piece` weights."""
    started, done, errors = time.perf_counter(), [], RelativeErrors()
    with collecting() as notes:
        for some in torch.split(weight, _whole_blocks(piece // site.in_features, scheme)):
            rows = some.float()
            _check_rows(site, rows)
            with told_errors() as told:
                done.append(method.function(rows, stats, scheme, **options))
            _compare(errors, rows, done[-1], stats.hessian, told.of(done[-1]))
    result = QuantTensor.stack(done)
    seconds = time.perf_counter() - started
    return result, _row(site, result, method.name, errors.output, errors.weight, seconds, notes)


def _compare(
    errors: RelativeErrors,
    rows: torch.Tensor,
    quantized: QuantTensor,
    hessian: torch.Tensor | None,
    told: list[torch.Tensor],
) -> None:
    """Add what some rows [rows, in] lost, a part at a time. told: output errors and power by row, or nothing."""
    together = _whole_blocks(COMPARED_ROWS, replace(quantized.scheme, scales="plain"))
    for first in range(0, len(rows), together):
        part = slice(first, min(first + together, len(rows)))
        dense = quantized.rows(part.start, part.stop).dequantize()
        errors.add(rows[part], dense, hessian, [each[part] for each in told])


def _row(
    site: LinearSite,
    quantized: QuantTensor,
    method: str,
    output_error: float | None,
    weight_error: float,
    seconds: float,
    notes: list[str],
) -> SiteRow:
    """The report row of one site. NumbersError when the weights are too small for the format's scales."""
    scheme = quantized.scheme
    _check_scales(site, quantized, weight_error)
    return SiteRow(
        site=site.module,
        method=method,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        output_error=output_error,
        weight_error=weight_error,
        bits_per_weight=quantized.bits_per_weight,
        seconds=seconds,
        note="; ".join(dict.fromkeys(notes)),
        numbers=scheme.numbers,
    )
