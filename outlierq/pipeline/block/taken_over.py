"""Codes that are written as they are: of a compressed source, or of an earlier result that was made in the same way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from outlierq.core.model import Checkpoint, LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import STORED, SiteRow
from outlierq.core.scheme import QuantScheme
from outlierq.load import open_checkpoint, report_beside, result_in, unpacked


def taken_over(checkpoint: Checkpoint, site: LinearSite) -> tuple[QuantTensor, SiteRow]:
    """One weight as it is stored, and its row of the report: no error, as nothing was rounded."""
    started = time.perf_counter()
    stored = checkpoint.quantized(site.weight)
    scheme, seconds = stored.scheme, time.perf_counter() - started
    row = SiteRow(
        site.module,
        STORED,
        scheme.bits,
        scheme.group_size,
        scheme.symmetric,
        None,
        0.0,
        stored.bits_per_weight,
        seconds,
        numbers=scheme.numbers,
    )
    return stored, row


def taken_from(
    folder: Path, schemes: Mapping[LinearSite, QuantScheme]
) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
    """Weights [out, in] as an earlier result holds them, with their rows of its report; none when not all are there in
    these schemes.
    """
    report, result = report_beside(folder), unpacked(open_checkpoint(str(result_in(folder))))
    rows = {} if report is None else {row.site: row for row in report.rows}
    for site, scheme in schemes.items():
        if site.module not in rows or site.weight not in result.linears or result.code_scheme(site.weight) != scheme:
            return {}
    return {site: (result.quantized(site.weight), rows[site.module]) for site in schemes}
