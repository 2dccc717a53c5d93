"""compressed-tensors: the formats that vLLM and transformers load without a plug-in.

`pack-quantized` for integer weights, `int-quantized` for integer weights with int8 inputs, `float-quantized` for E4M3,
`nvfp4-pack-quantized` and `mxfp4-pack-quantized` for E2M1, `mxfp6-pack-quantized` for E2M3, `mxfp8-quantized` for E4M3
in groups of 32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import STORED_AS
from outlierq.core.errors import OutputError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export import ct_config
from outlierq.export.clients import Mixture, byte_codes, expert_facts
from outlierq.export.ct_config import format_of
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.ops.packing import pack, pack_down, pack_e2m1, pack_e2m3, words_for

if TYPE_CHECKING:
    import torch


class CompressedTensorsFormat(Format, name="compressed-tensors"):
    """What vLLM and transformers load without a plug-in."""

    holds_cache_scales = True

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        if site.kind != "Linear":
            return _of_other_kind(site, scheme)
        if scheme.kind == "int" and scheme.scales != "plain":
            return f"compressed-tensors has no {scheme.scales} scales for integers; gguf has two-level ones"
        if scheme.scales != "plain" and site.in_features % scheme.columns_per_group(site.in_features):
            return (
                f"{scheme} needs columns in groups of {scheme.group_size}, and {site.in_features} are no multiple of it"
            )
        return None

    @classmethod
    def expert_clients(cls, schemes: Collection[QuantScheme | None], experts: Mixture) -> list[str]:
        """What clients do with the experts of a mixture. schemes: of all their linears, None for those in 16 bits."""
        return expert_facts(schemes, experts)

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """(name, dtype, shape) of every tensor that replaces the site's weight."""
        rows, columns = site.out_features, site.in_features
        if scheme.scales != "plain":
            return _float_specs(site, scheme)
        scale_dtype, scales = STORED_AS[scheme.scale_dtype], scheme.scale_shape(rows, columns)
        if site.transposed:
            rows, columns, scales = columns, rows, scales[::-1]
        if format_of(scheme) != "pack-quantized":
            specs: list[TensorSpec] = [
                (site.weight, "F8_E4M3" if scheme.kind == "float" else "I8", (rows, columns)),
                (f"{stem(site)}.weight_scale", scale_dtype, scales),
            ]
            static = scheme.activations is not None and not scheme.activations.dynamic
            return [*specs, (f"{stem(site)}.input_scale", scale_dtype, (1,))] if static else specs
        specs = [
            (f"{stem(site)}.weight_packed", "I32", (rows, words_for(columns, scheme.bits))),
            (f"{stem(site)}.weight_scale", scale_dtype, scales),
            (f"{stem(site)}.weight_shape", "I64", (2,)),
        ]
        if not scheme.symmetric:
            specs.append((f"{stem(site)}.weight_zero_point", "I32", (words_for(rows, scheme.bits), scales[1])))
        return specs

    def by_rows(self, site: LinearSite, scheme: QuantScheme) -> bool:
        """Whether some rows of a linear can be encoded without the others."""
        return not site.transposed and scheme.scales == "plain"

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensors of `tensor_specs` for a weight [out, in], or the same rows where `by_rows` allows it."""
        if quantized.outlier_columns is not None:
            raise OutputError(f"{site.module}: compressed-tensors has no place for outlier columns")
        if quantized.scheme.scales != "plain":
            return _floats(site, quantized)
        if format_of(quantized.scheme) == "pack-quantized":
            return _packed(site, quantized)
        codes, scale = _as_stored(site, quantized.codes), _as_stored(site, quantized.scale)
        tensors = {site.weight: codes, f"{stem(site)}.weight_scale": scale}
        if quantized.input_scale is not None:
            tensors[f"{stem(site)}.input_scale"] = quantized.input_scale
        return tensors

    def row_order(self, site: LinearSite) -> dict[str, torch.Tensor]:
        """Whether rows and columns have changed places."""
        import torch

        return {"transposed": torch.tensor(True)} if site.transposed else {}

    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any]:
        """As the compressed-tensors package builds it."""
        return ct_config.quantization_config(sites, kept=kept, cache=cache)

    @classmethod
    def dense_key(cls, schemes: Collection[QuantScheme]) -> str | None:
        """Not with several schemes: transformers would decode all with the first, and wrong weights are worse than an
        error.
        """
        return ct_config.DEQUANTIZE if len(schemes) == 1 else None


def _of_other_kind(site: LinearSite, scheme: QuantScheme) -> str | None:
    """Why a layer that is no linear cannot be held, or None: transformers decodes a Conv1D while it loads it, as it
    decodes anything called a weight. Its matrix stays [in, out], and groups of its rows are blocks of one column.
    """
    if not site.transposed:
        return f"compressed-tensors has no {site.kind} layer"
    inputs = scheme.activations
    if scheme.scales != "plain" or scheme.block is not None or not scheme.symmetric:
        return f"compressed-tensors holds a {site.kind} only with symmetric scales for groups of inputs"
    if inputs is not None and not inputs.dynamic:
        return f"compressed-tensors has no {site.kind} layer, whose inputs would have fixed scales"
    return None


def _as_stored(site: LinearSite, matrix: torch.Tensor) -> torch.Tensor:
    """Codes or scales [out, ...] in the order of the file."""
    return matrix.T.contiguous() if site.transposed else matrix


def _packed(site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
    """Unsigned codes packed along columns, zero points packed along rows."""
    import torch

    scheme, codes = quantized.scheme, _as_stored(site, byte_codes(site, quantized))
    shape = (site.out_features, site.in_features)
    tensors = {
        f"{stem(site)}.weight_packed": pack(codes, scheme.bits),
        f"{stem(site)}.weight_scale": _as_stored(site, quantized.scale),
        f"{stem(site)}.weight_shape": torch.tensor(shape[::-1] if site.transposed else shape),  # codes may be some rows
    }
    if quantized.zero_point is not None:
        # Not .contiguous(): a single group is a row whose strides it leaves alone, and packing views them as words.
        rows = quantized.zero_point.T.clone(memory_format=torch.contiguous_format)
        tensors[f"{stem(site)}.weight_zero_point"] = pack_down(rows, scheme.bits)
    return tensors


def _float_specs(site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
    """`tensor_specs` of NVFP4, MXFP4, MXFP6 and MXFP8."""
    rows, columns = site.out_features, site.in_features
    small, units = "F8_E4M3" if scheme.scales == "two-level" else "U8", []
    codes: TensorSpec = (site.weight, "F8_E4M3", (rows, columns))
    if scheme.bits < 8:
        codes = (f"{stem(site)}.weight_packed", "U8", (rows, columns * scheme.bits // 8))
    if scheme.scales == "two-level":
        units.append("weight_global_scale")
    if scheme.activations is not None and scheme.activations.scales == "two-level":
        units.append("input_global_scale")
    return [
        codes,
        (f"{stem(site)}.weight_scale", small, scheme.scale_shape(rows, columns)),
        *((f"{stem(site)}.{unit}", "F32", (1,)) for unit in units),
    ]


def _floats(site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
    """Two E2M1 codes per byte, that of the even column in the low half; four E2M3 codes in three; or E4M3 codes."""
    tensors = {f"{stem(site)}.weight_scale": quantized.scale}
    if quantized.scheme.bits == 4:
        tensors[f"{stem(site)}.weight_packed"] = pack_e2m1(quantized.codes)
    elif quantized.scheme.bits == 6:
        tensors[f"{stem(site)}.weight_packed"] = pack_e2m3(quantized.codes)
    else:
        tensors[site.weight] = quantized.codes
    if quantized.super_scale is not None:
        tensors[f"{stem(site)}.weight_global_scale"] = quantized.super_scale
    if quantized.input_scale is not None:
        tensors[f"{stem(site)}.input_global_scale"] = quantized.input_scale
    return tensors


def stem(site: LinearSite) -> str:
    """Tensor name without its last part: the module's name as the checkpoint spells it."""
    return site.weight.removesuffix(".weight")
