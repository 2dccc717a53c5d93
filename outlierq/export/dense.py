"""`dense`: dequantized weights in 16 bits, for any client. Not smaller; it shows what the codes mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.ops.compiled import packing as native_packing

if TYPE_CHECKING:
    import torch


class DenseFormat(Format, name="dense"):
    """Weights in 16 bits."""

    holds_unquantized = True
    holds_outlier_columns = True
    holds_codes = False

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Dense weights can hold every scheme."""
        return None

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """The weight under its own name and shape."""
        from outlierq.core.dtypes import STORED_AS

        shape = (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
        return [(site.weight, STORED_AS[scheme.scale_dtype], shape)]

    def by_rows(self, site: LinearSite, scheme: QuantScheme) -> bool:
        """Whether some rows of a linear can be encoded without the others."""
        return not site.transposed

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The dequantized weight [out, in] ([in, out] as a Conv1D stores it), or rows of it, in its storage dtype."""
        import torch

        dense = native_packing.dequantize(quantized)
        if dense is None:
            dense = quantized.dequantize().to(getattr(torch, quantized.scheme.scale_dtype))
        return {site.weight: (dense.T if site.transposed else dense).contiguous()}

    def quantization_config(self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None) -> None:
        """Dense checkpoints have no quantization config."""

    @classmethod
    def scheme_faults(cls, scheme: QuantScheme) -> list[str]:
        """The codes of every scheme can be dequantized, but 16-bit weights do not say that inputs are quantized."""
        if scheme.activations is None:
            return []
        return ["activations: `export.format: dense` cannot say that inputs are quantized"]
