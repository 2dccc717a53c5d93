"""`outlierq-split`: int8 weights with the columns of outlier channels beside them in 16 bits. Only outlierq runs it.

No format of vLLM, compressed-tensors or bitsandbytes can keep some columns of a linear in 16 bits. For a linear called
P: `P.weight` I8 [out, in] with 0 in the outlier columns, `P.weight_scale` [out, 1], `P.outlier_columns` I32 [k]
ascending and `P.outlier_weight` [out, k]; floats in the model's dtype. Inputs are rounded to int8 with one scale per
token that leaves the outlier columns out; see `ops/twins/int8_split.py` for what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import STORED_AS
from outlierq.core.errors import OutputError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.bitsandbytes import int8_obstacle
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.ops.twins.int8_split import column_budget
from outlierq.registry import OUTLIER_COLUMNS, Asked, ways_to

if TYPE_CHECKING:
    import torch


class OutlierSplitFormat(Format, name="outlierq-split"):
    """The int8 codes and the columns beside them."""

    holds_outlier_columns = True
    library = "outlierq"

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        if site.kind != "Linear":
            return f"outlierq-split is written for Linear layers only, this is a {site.kind}"
        return int8_obstacle("outlierq-split", scheme)

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """(name, dtype, shape) of every tensor that replaces the site's weight."""
        stem, outliers = site.weight.removesuffix(".weight"), column_budget(site.in_features)
        dtype = STORED_AS[scheme.scale_dtype]
        return [
            (site.weight, "I8", (site.out_features, site.in_features)),
            (f"{stem}.weight_scale", dtype, (site.out_features, 1)),
            (f"{stem}.outlier_columns", "I32", (outliers,)),
            (f"{stem}.outlier_weight", dtype, (site.out_features, outliers)),
        ]

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensors of `tensor_specs`: int8 codes [out, in], scales [out, 1], columns [k], their weight [out, k]."""
        import torch

        if quantized.outlier_columns is None or quantized.outlier_weight is None:
            raise OutputError(f"{site.module}: this format needs outlier columns; use method int8_split")
        stem = site.weight.removesuffix(".weight")
        return {
            site.weight: quantized.codes.to(torch.int8),
            f"{stem}.weight_scale": quantized.scale,
            f"{stem}.outlier_columns": quantized.outlier_columns.to(torch.int32),
            f"{stem}.outlier_weight": quantized.outlier_weight.contiguous(),
        }

    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any]:
        """What its readers look for in config.json."""
        return {
            "quant_method": "outlierq",
            "format": "outlierq-split",
            "weights": "int8 symmetric per output row",
            "input_activations": "int8 symmetric per token, without the outlier columns",
            "modules_to_not_convert": list(kept),
        }

    @classmethod
    def recipe_faults(cls, asked: Asked) -> list[str]:
        """It is the format of methods that give outlier columns."""
        faults = super().recipe_faults(asked)
        if asked.method is not None and OUTLIER_COLUMNS not in asked.gives:
            makers = " or ".join(ways_to(OUTLIER_COLUMNS))
            faults.append(f"quantize.method: {cls.name} is the format of {makers} (this is {asked.method})")
        return faults
