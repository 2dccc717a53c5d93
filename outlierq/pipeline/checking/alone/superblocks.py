"""Superblocks of Q4_K: two units and eight small scales and minima each, which bind one another.

A unit is the largest scale of its superblock over 63, so one of the eight is 63; the same of minima. Both are positive.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    import torch

CHECK = "scales"
LARGEST = 63
# Of superblocks, those that may have no scale of 63: none where llama.cpp or outlierq rounded them.
MOST_WITHOUT = 0.001
# A unit this many times the next smaller one and the median of its linear.
LONELY, FAR_FROM_MEDIAN = 8.0, 16.0


def check_file(path: Path, findings: Findings) -> None:
    """Every tensor of a GGUF file that is stored as Q4_K, by its name in the file."""
    import numpy as np
    import torch

    from outlierq.load import decode_rows, read_gguf_header

    scheme = QuantScheme(4, 32, symmetric=False, scale_dtype="float16", scales="two-level")
    for tensor in read_gguf_header(path).tensors.values():
        if tensor.type == "Q4_K":
            raw = torch.from_numpy(np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.start))
            rows, columns = tensor.nbytes // tensor.row_bytes, tensor.row_bytes // 144 * 256
            parts = {"weight": raw.view(rows, -1), "heads": torch.tensor(0)}
            quantized = decode_rows("gguf", parts, scheme, (rows, columns), 0, rows)
            assert isinstance(quantized, QuantTensor)
            check_superblocks(tensor.name, quantized, findings)


def check_superblocks(name: str, quantized: QuantTensor, findings: Findings) -> None:
    """One weight [out, in] with two-level scales and minima; any other is let through."""
    units = quantized.super_scale
    if units is None or units.ndim != 3 or quantized.zero_point is None:
        return
    scales = quantized.scale.view(*units.shape[:2], -1)
    minima = quantized.zero_point.view(*units.shape[:2], -1)
    for what, unit, counts in (("scales", units[..., 0].float(), scales), ("minima", units[..., 1].float(), minima)):
        if bool((unit < 0).any()):
            findings.fault(CHECK, name, f"{int((unit < 0).sum())} of {unit.numel()} units of {what} are negative")
            continue
        _check_largest(name, what, unit, counts, findings)
        _check_lonely(name, what, unit, findings)


def _check_largest(name: str, what: str, unit: torch.Tensor, counts: torch.Tensor, findings: Findings) -> None:
    """Some count of each superblock is the largest there can be, unless the unit is 0."""
    without = (unit > 0) & (counts.amax(-1) < LARGEST)
    empty = (unit > 0) & (counts.amax(-1) == 0)
    if bool(empty.any()) or 0 < without.float().mean() < MOST_WITHOUT:
        row, block = (int(i) for i in (empty if bool(empty.any()) else without).nonzero()[0])
        which = f"{int(without.sum())} of {unit.numel()} superblocks, first row {row} block {block}"
        findings.fault(CHECK, name, f"the largest of the {what} is below {LARGEST} in {which}")


def _check_lonely(name: str, what: str, unit: torch.Tensor, findings: Findings) -> None:
    """One unit far above all others."""
    ordered = unit.flatten().sort().values
    if len(ordered) < 16 or ordered[len(ordered) // 2] == 0:
        return
    last, before, middle = ordered[-1], ordered[-2], ordered[len(ordered) // 2]
    if last > LONELY * before and last > FAR_FROM_MEDIAN * middle:
        findings.fault(
            CHECK, name, f"one unit of {what} is {last / before:.0f} times the next largest of {unit.numel()}"
        )
