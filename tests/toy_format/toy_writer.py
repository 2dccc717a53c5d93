"""`toy`: int8 weights with one scale per row, codes upside down. It shows what the writer of a new format is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.format import Format, Sites, TensorSpec

if TYPE_CHECKING:
    import torch


class ToyFormat(Format, name="toy"):
    """P.upside_down I8 [out, in], P.scale F32 [out, 1]; a weight is (-1 - code) * scale."""

    scale_dtype = "float32"

    @classmethod
    def scheme_faults(cls, scheme: QuantScheme) -> list[str]:
        """Eight bits, and nothing else."""
        return [] if scheme.bits == 8 else [f"bits: toy stores 8 (this is {scheme.bits})"]

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        return None if scheme.group_size is None else "toy has one scale per row"

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """Codes and scales."""
        stem, rows = site.weight.removesuffix(".weight"), site.out_features
        return [(f"{stem}.upside_down", "I8", (rows, site.in_features)), (f"{stem}.scale", "F32", (rows, 1))]

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """Codes int8 [out, in], scales float32 [out, 1]."""
        import torch

        stem = site.weight.removesuffix(".weight")
        return {f"{stem}.upside_down": ~quantized.codes.to(torch.int8), f"{stem}.scale": quantized.scale}

    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any]:
        """By this the reader knows it."""
        return {"quant_method": "toy"}
