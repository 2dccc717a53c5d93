"""Stage 5: quantize the linears of one input group, those with the same scheme solved as one stack."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.errors import NumbersError, during
from outlierq.core.model import LinearSite
from outlierq.core.notes import collecting
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import SiteRow
from outlierq.core.scheme import QuantScheme
from outlierq.ops.clip_search import static_scale, weighed_rows
from outlierq.ops.errors import relative_error_of_both, relative_output_error, relative_weight_error

# Weights quantized at a time without statistics: 2 MiB in float32. Smaller pieces fit the cache better, but threads
# side by side then wait for each other between many short operations (2.8 s with a quarter of it, 2.2 s with this).
PIECE_WEIGHTS = 1 << 19

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
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """Quantize every site of `weights` ([out, in] each, one input) that has a scheme.

    Sites with one scheme are stacked along their rows: they share the hessian, so they are solved together. Without
    statistics rows have nothing in common, and are quantized piece by piece, so that a piece stays in the cache.
    clip_search: whether the scale of a static activation scheme may clip (ops/clip_search.py).
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
                    pieces = weights[site].split(rows_of_a_piece(site.in_features, scheme))
                    done[site] = quantize_rows(site, pieces, scheme, method, options)
            else:
                members = [(site, weights[site].float()) for site in sites]
                for part in _aligned(members, scheme):
                    done |= _quantize_stack(part, scheme, stats, method, options)
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
    schemes = {result.scheme.activations for result, _ in done.values()} - {None}
    if not schemes:
        return done
    if stats.rows is None and all(scheme.dynamic for scheme in schemes):
        return done  # the recipe asked for no statistics of this kind: the error stays that of the weights
    rows, counts = weighed_rows(stats)
    changed = dict(done)
    for scheme in schemes:
        members = {site: found for site, found in done.items() if found[0].scheme.activations == scheme}
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


def quantize_rows(
    site: LinearSite, pieces: Iterable[torch.Tensor], scheme: QuantScheme, method: Method, options: Mapping[str, Any]
) -> tuple[QuantTensor, SiteRow]:
    """A method that needs no statistics, on some rows at a time.

    pieces: the weight [out, in] in order, `rows_of_a_piece` rows each; a piece may be overwritten after it was used.
    """
    started = time.perf_counter()
    done, change, power, bad = [], 0.0, 0.0, 0
    with collecting() as notes:
        for piece in pieces:
            rows = piece.to(torch.float32, copy=True)
            squares = _sum_of_squares(rows)
            if not math.isfinite(squares):
                bad += int((~rows.isfinite()).sum())
            power += squares
            done.append(method.function(rows, None, scheme, **options))
            change += _sum_of_squares(done[-1].dequantize().sub_(rows))
    _check_finite(site, bad, power)
    result = QuantTensor.stack(done)
    error = (change / power) ** 0.5 if power else 0.0
    return result, _row(site, result, method.name, None, error, time.perf_counter() - started, notes)


def rows_of_a_piece(columns: int, scheme: QuantScheme) -> int:
    """As many rows as stay in the cache; whole blocks where rows share scales."""
    rows = max(1, PIECE_WEIGHTS // columns)
    return rows if scheme.block is None else max(1, rows // scheme.block[0]) * scheme.block[0]


def _sum_of_squares(values: torch.Tensor) -> float:
    """Sum of the squares of a float32 tensor, in one pass and without a copy."""
    flat = values.view(-1)
    return torch.dot(flat, flat).item()


def _check_finite(site: LinearSite, bad: int, power: float) -> None:
    """NumbersError when the sum of squares shows that a weight is NaN or Inf. bad: how many are."""
    if not math.isfinite(power):
        raise NumbersError(
            f"{site.weight} holds {bad} NaN or Inf among {site.out_features * site.in_features} weights",
            hint="the source checkpoint is damaged; get it again",
        )


def _quantize_stack(
    members: list[tuple[LinearSite, torch.Tensor]],
    scheme: QuantScheme,
    stats: InputStats,
    method: Method,
    options: Mapping[str, Any],
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """One call of the method on the stacked float32 rows, split again afterwards."""
    for site, weight in members:
        _check_finite(site, int((~weight.isfinite()).sum()), weight.square().sum().item())
    started = time.perf_counter()
    stack = torch.cat([weight for _, weight in members]) if len(members) > 1 else members[0][1]
    with collecting() as notes:
        result = method.function(stack, stats, scheme, **options)
    share = (time.perf_counter() - started) / len(stack)
    done = {}
    start = 0
    for site, weight in members:
        part = result.rows(start, start + len(weight))
        start += len(weight)
        dense = part.dequantize()
        output = None if stats.hessian is None else relative_output_error(weight, dense, stats.hessian)
        error = relative_weight_error(weight, dense) ** 0.5
        done[site] = (part, _row(site, part, method.name, output, error, share * len(weight), notes))
    return done


def _row(
    site: LinearSite,
    quantized: QuantTensor,
    method: str,
    output_error: float | None,
    weight_error: float,
    seconds: float,
    notes: list[str],
) -> SiteRow:
    """The report row of one site."""
    scheme = quantized.scheme
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
    )
