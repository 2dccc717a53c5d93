"""Stage 5: quantize the linears of one input group, those with the same scheme solved as one stack."""

from __future__ import annotations

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
    """Quantize every site of `weights` ([out, in] float32 each, one input) that has a scheme.

    Sites with one scheme are stacked along their rows: they share the hessian, so they are solved together.
    """
    stacks: dict[QuantScheme, list[LinearSite]] = {}
    for site in weights:
        if site in schemes:
            stacks.setdefault(schemes[site], []).append(site)
    done = {}
    for scheme, sites in stacks.items():
        with during("quantize", ", ".join(site.module for site in sites)):
            done |= _quantize_stack([(site, weights[site]) for site in sites], scheme, stats, method, options)
    return {site: done[site] for site in weights if site in done}


def _quantize_stack(
    members: list[tuple[LinearSite, torch.Tensor]],
    scheme: QuantScheme,
    stats: InputStats | None,
    method: Method,
    options: Mapping[str, Any],
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """One call of the method on the stacked rows, split again afterwards."""
    for site, weight in members:
        if not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise NumbersError(
                f"{site.weight} holds {bad} NaN or Inf among {weight.numel()} weights",
                hint="the source checkpoint is damaged; get it again",
            )
    started = time.perf_counter()
    stack = torch.cat([weight for _, weight in members]) if len(members) > 1 else members[0][1]
    with collecting() as notes:
        result = method.function(stack, stats, scheme, **options)
    share = (time.perf_counter() - started) / len(stack)
    hessian = stats.hessian if stats is not None else None
    done = {}
    start = 0
    for site, weight in members:
        part = result.rows(start, start + len(weight))
        start += len(weight)
        row = _row(site, weight, part, hessian, method.name, share * len(weight), "; ".join(notes))
        done[site] = (part, row)
    return done


def _row(
    site: LinearSite,
    weight: torch.Tensor,
    quantized: QuantTensor,
    hessian: torch.Tensor | None,
    method: str,
    seconds: float,
    note: str,
) -> SiteRow:
    """The report row of one site, with its errors measured on the dequantized weight."""
    scheme = quantized.scheme
    dense = quantized.dequantize()
    return SiteRow(
        site=site.module,
        method=method,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        output_error=None if hessian is None else relative_output_error(weight, dense, hessian),
        weight_error=relative_weight_error(weight, dense) ** 0.5,
        bits_per_weight=quantized.bits_per_weight,
        seconds=seconds,
        note=note,
    )
