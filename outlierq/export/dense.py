"""`dense`: dequantized weights in 16 bits, for any client. Not smaller; it shows what the codes mean."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.export.clients import client_facts
from outlierq.ops.compiled import packing as native_packing

if TYPE_CHECKING:
    import torch


def obstacle(site: LinearSite, scheme: QuantScheme) -> str | None:
    """Dense weights can hold every scheme."""
    return None


def clients(schemes: Collection[QuantScheme]) -> list[str]:
    """Which programs load it, one line each."""
    return client_facts("dense", schemes)


def tensor_specs(site: LinearSite, scheme: QuantScheme) -> list[tuple[str, str, tuple[int, ...]]]:
    """The weight under its own name and shape."""
    from outlierq.core.dtypes import STORED_AS

    shape = (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
    return [(site.weight, STORED_AS[scheme.scale_dtype], shape)]


def by_rows(site: LinearSite, scheme: QuantScheme) -> bool:
    """Whether some rows of a linear can be encoded without the others."""
    return not site.transposed


def encode(site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
    """The dequantized weight [out, in] ([in, out] as a Conv1D stores it), or rows of it, in its storage dtype."""
    import torch

    dense = native_packing.dequantize(quantized)
    if dense is None:
        dense = quantized.dequantize().to(getattr(torch, quantized.scheme.scale_dtype))
    return {site.weight: (dense.T if site.transposed else dense).contiguous()}


def quantization_config(sites: object, *, also_kept: object = ()) -> None:
    """Dense checkpoints have no quantization config."""
    return
