"""`outlierq-olive`: 4 bits for every weight, where an outlier takes the code of its neighbour. Only outlierq runs it.

OliVe (arXiv:2304.07493); what the codes mean is in `ops/outlier_victim.py`. For a linear called P: `P.weight_pairs` U8
[out, in / 2], the nibble of the even column in the low half of a byte, and `P.weight_scale` [out, groups], in the dtype
of the model. There is no list of outliers: a victim's nibble, 1000, says that the other one of its byte is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import STORED_AS
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.ops.outlier_victim import encode, pack

if TYPE_CHECKING:
    import torch


class OutlierVictimFormat(Format, name="outlierq-olive"):
    """Pairs in bytes, and their scales."""

    library = "outlierq"

    @classmethod
    def scheme_faults(cls, scheme: QuantScheme) -> list[str]:
        """Outlier-victim pairs, and nothing else."""
        if scheme.kind == "outlier-victim":
            return []
        return [f"kind: outlierq-olive stores `outlier-victim` pairs (this is {scheme.kind})"]

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        if site.kind != "Linear":
            return f"outlierq-olive is written for Linear layers only, this is a {site.kind}"
        odd = scheme.columns_per_group(site.in_features) % 2
        return f"outlier-victim pairs need an even number of columns, not {site.in_features}" if odd else None

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """(name, dtype, shape) of every tensor that replaces the site's weight."""
        stem, rows = site.weight.removesuffix(".weight"), site.out_features
        return [
            (f"{stem}.weight_pairs", "U8", (rows, site.in_features // 2)),
            (f"{stem}.weight_scale", STORED_AS[scheme.scale_dtype], (rows, scheme.groups(site.in_features))),
        ]

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensors of `tensor_specs`: pairs of codes [out, in / 2] uint8, scales [out, groups]."""
        stem = site.weight.removesuffix(".weight")
        return {f"{stem}.weight_pairs": pack(encode(quantized.codes)), f"{stem}.weight_scale": quantized.scale}

    def by_rows(self, site: LinearSite, scheme: QuantScheme) -> bool:
        """Rows do not depend on each other."""
        return True

    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any]:
        """What its reader looks for in config.json."""
        return {"quant_method": "outlierq-olive", "bits": 4, "modules_to_not_convert": list(kept)}
