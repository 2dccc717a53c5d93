"""`bitsandbytes`: LLM.int8() checkpoints (arXiv:2208.07339) as transformers saves them with bitsandbytes.

For a linear called P: `P.weight` I8 [out, in], `P.SCB` F32 [out], the largest magnitude of each row (the weight is
codes * SCB / 127), and `P.weight_format` U8, 0 for rows that lie one after the other. The outlier columns are not
stored: the client finds them in every batch, and multiplies them with the weight that the codes stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutputError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, CacheScheme, QuantScheme
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.ops.twins.int8_split import THRESHOLD
from outlierq.registry import LARGEST_SCALES, Asked, ways_to

if TYPE_CHECKING:
    import torch

ROW_MAJOR = 0


class BitsandbytesFormat(Format, name="bitsandbytes"):
    """LLM.int8() as transformers saves it."""

    scale_dtype = "float32"  # that of the row maxima, so scales are not rounded to the model's 16 bits

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        if site.kind != "Linear":
            return f"LLM.int8() is written for Linear layers only, this is a {site.kind}"
        return int8_obstacle("bitsandbytes", scheme)

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """(name, dtype, shape) of every tensor that replaces the site's weight."""
        stem = site.weight.removesuffix(".weight")
        return [
            (site.weight, "I8", (site.out_features, site.in_features)),
            (f"{stem}.SCB", "F32", (site.out_features,)),
            (f"{stem}.weight_format", "U8", ()),
        ]

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensors of `tensor_specs`: int8 codes [out, in], SCB float32 [out], weight_format uint8 []."""
        import torch

        if quantized.outlier_columns is not None:
            raise OutputError(f"{site.module}: this format has no place for outlier columns; use method rtn")
        stem = site.weight.removesuffix(".weight")
        return {
            site.weight: quantized.codes.to(torch.int8),
            f"{stem}.SCB": row_maxima(quantized.scale.float().flatten(), site.module),
            f"{stem}.weight_format": torch.tensor(ROW_MAJOR, dtype=torch.uint8),
        }

    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any]:
        """What its readers look for in config.json."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": THRESHOLD,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": list(kept),
        }

    @classmethod
    def recipe_faults(cls, asked: Asked) -> list[str]:
        """A row's scale is its largest weight, which not every method chooses."""
        faults = super().recipe_faults(asked)
        if asked.method is not None and LARGEST_SCALES not in asked.gives:
            makers = " or ".join(ways_to(LARGEST_SCALES))
            faults.append(f"quantize.method: bitsandbytes scales a row by its largest weight: {makers}")
        return faults


def int8_obstacle(name: str, scheme: QuantScheme) -> str | None:
    """Why a format that means "int8 weights per row, int8 inputs per token" cannot hold the scheme."""
    stored = (scheme.kind, scheme.bits, scheme.symmetric, scheme.group_size, scheme.block, scheme.scales)
    if stored != ("int", 8, True, None, None, "plain") or scheme.activations not in (None, ActivationScheme()):
        return f"{name} stores int8 symmetric per channel with int8 inputs per token, not {scheme}"
    return None


def row_maxima(scale: torch.Tensor, module: str) -> torch.Tensor:
    """[out] float32 whose 127th part is `scale` to the last bit, as the client computes it.

    127 * scale is rounded, so one of its neighbours may be the one. A scale that is a row's maximum over 127, or has
    at most 17 bits (bfloat16, float16), always has one; about 1 in 100 other float32 numbers has none.
    """
    import torch

    nearest = (scale.double() * 127).float()
    up, down = (torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (torch.inf, 0.0))
    for candidate in (up, down):
        nearest = torch.where(nearest / 127 == scale, nearest, candidate)
    lost = int((nearest / 127 != scale).sum())
    if lost:
        raise OutputError(
            f"{lost} of {scale.numel()} scales of {module} cannot be written as row maxima",
            hint="use quantize.method: rtn with scale_search: minmax, as recipe llm-int8 does",
        )
    return nearest
