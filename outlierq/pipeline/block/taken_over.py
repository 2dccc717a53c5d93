"""Codes of a compressed source that are written as they are."""

from __future__ import annotations

import time

from outlierq.core.model import Checkpoint, LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import STORED, SiteRow


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
