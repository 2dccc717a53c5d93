"""Stage 5: quantize the linears of one input group, those with the same scheme solved as one stack."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.errors import NumbersError, during
from outlierq.core.model import LinearSite
from outlierq.core.notes import collecting
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import SiteRow
from outlierq.core.scheme import QuantScheme
from outlierq.ops.errors import relative_output_error, relative_weight_error

# Weights quantized at a time without statistics: half a MiB in float32.
PIECE_WEIGHTS = 1 << 17

if TYPE_CHECKING:
    from outlierq.core.stats import InputStats
    from outlierq.registry import Method


def quantize_group(
    weights: Mapping[LinearSite, torch.Tensor],
    schemes: Mapping[LinearSite, QuantScheme],
    stats: InputStats | None,
    method: Method,
    options: Mapping[str, Any],
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """Quantize every site of `weights` ([out, in] each, one input) that has a scheme.

    Sites with one scheme are stacked along their rows: they share the hessian, so they are solved together. Without
    statistics rows have nothing in common, and are quantized piece by piece, so that a piece stays in the cache.
    """
    stacks: dict[QuantScheme, list[LinearSite]] = {}
    for site in weights:
        if site in schemes:
            stacks.setdefault(schemes[site], []).append(site)
    done: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
    for scheme, sites in stacks.items():
        with during("quantize", ", ".join(site.module for site in sites)):
            if stats is None:
                done |= {site: _quantize_pieces(site, weights[site], scheme, method, options) for site in sites}
            else:
                members = [(site, weights[site].float()) for site in sites]
                done |= _quantize_stack(members, scheme, stats, method, options)
    return {site: done[site] for site in weights if site in done}


def _quantize_pieces(
    site: LinearSite, weight: torch.Tensor, scheme: QuantScheme, method: Method, options: Mapping[str, Any]
) -> tuple[QuantTensor, SiteRow]:
    """A method that needs no statistics, on some rows at a time."""
    started = time.perf_counter()
    pieces, change, power = [], 0.0, 0.0
    with collecting() as notes:
        for rows in weight.split(max(1, PIECE_WEIGHTS // weight.shape[1])):
            rows = rows.float()
            piece = method.function(rows, None, scheme, **options)
            pieces.append(piece)
            change += (piece.dequantize().sub_(rows)).square_().sum().item()
            power += rows.square_().sum().item()
    _check_finite(site, weight, power)
    result = QuantTensor.stack(pieces)
    error = (change / power) ** 0.5 if power else 0.0
    return result, _row(site, result, method.name, None, error, time.perf_counter() - started, notes)


def _check_finite(site: LinearSite, weight: torch.Tensor, power: float) -> None:
    """NumbersError when the sum of squares shows that a weight is NaN or Inf."""
    if not math.isfinite(power):
        bad = int((~weight.isfinite()).sum())
        raise NumbersError(
            f"{site.weight} holds {bad} NaN or Inf among {weight.numel()} weights",
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
        _check_finite(site, weight, weight.square().sum().item())
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
