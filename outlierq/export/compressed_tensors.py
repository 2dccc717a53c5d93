"""compressed-tensors: the formats that vLLM and transformers load without a plug-in.

`pack-quantized` for integer weights, `int-quantized` for integer weights with int8 inputs, `float-quantized` for E4M3.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from outlierq.core.errors import OutputError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.ct_config import format_of, quantization_config
from outlierq.ops.packing import pack, words_for

if TYPE_CHECKING:
    import torch

__all__ = ["clients", "encode", "obstacle", "quantization_config", "tensor_specs"]

SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
KERNEL_BLOCK = (128, 128)  # the only block that vLLM's kernels know


def obstacle(site: LinearSite, scheme: QuantScheme) -> str | None:
    """Why this format cannot hold the site, or None when it can."""
    if site.kind != "Linear":
        return f"compressed-tensors has no {site.kind} layer"
    return None


def clients(schemes: Collection[QuantScheme]) -> list[str]:
    """One line per client: does it load these schemes? Facts of 2026-11 (transformers 5.23, vLLM 0.32)."""
    asymmetric = any(not scheme.symmetric for scheme in schemes)
    transformers = "loads (dequantized at load, as its config asks)" if asymmetric else "loads"
    if any(scheme.activations for scheme in schemes):
        transformers = "loads (rounds inputs and weights, computes in 16 bits)"
    if asymmetric and len(schemes) > 1:
        # Its dequantizing loader decodes every linear with the first config group.
        transformers = (
            f"does not load {len(schemes)} schemes of which some are asymmetric; "
            "use one group_size that divides all widths and no overrides, or symmetric: true"
        )
    vllm = list(dict.fromkeys(note for scheme in sorted(schemes, key=str) for note in _vllm(scheme)))
    return [
        f"transformers 5.23 with compressed-tensors 0.20: {transformers}",
        f"vLLM 0.32: {'; '.join(vllm) or 'loads'}",
    ]


def expert_clients(schemes: Collection[QuantScheme | None]) -> list[str]:
    """What clients do with the experts of a mixture. schemes: of all their linears, None for those in 16 bits."""
    if len(schemes) > 1:
        return ["experts: transformers 5.23 does not load experts of different schemes; vLLM not tried"]
    (scheme,) = schemes
    if scheme.kind == "float":
        wrong = "" if scheme.block is None else "does not load experts with scales per block"
        loads = "loads; the inputs of experts stay in 16 bits" if scheme.activations else "loads"
        return [f"experts: transformers 5.23 {wrong or loads}; vLLM not tried"]
    if scheme.activations is not None:
        return ["experts: transformers 5.23 does not load experts with int8 inputs; vLLM not tried"]
    if not scheme.symmetric:
        return ["experts: transformers 5.23 does not load experts with zero points; set quantize.symmetric: true"]
    return ["experts: transformers 5.23 loads (decoded, and merged into its own layout); vLLM not tried"]


def _vllm(scheme: QuantScheme) -> list[str]:
    """What is special about a scheme in vLLM; nothing when it just loads."""
    inputs = scheme.activations
    if scheme.kind == "float":
        if scheme.block not in (None, KERNEL_BLOCK):
            return [f"has no kernel for blocks of {scheme.block[0]} x {scheme.block[1]}; use 128 x 128"]
        if inputs is None:
            return ["fp8 weights with 16-bit inputs: not tried"]
        if not inputs.dynamic:
            return ["has no CPU kernel for fp8 inputs with static scales; GPU not tried"]
        return ["fp8 is meant for GPUs; its CPU build loads it, but is slow without AMX-FP8"]
    if inputs is None:
        if scheme.bits == 8:
            return ["loads, but its CPU build has no kernel for 8-bit weights with 16-bit inputs"]
        return [] if scheme.bits == 4 else [f"has no kernel for {scheme.bits}-bit weights; use 4 or 8 bits"]
    if inputs.bits != 8:
        return [f"has no kernel for {inputs.bits}-bit inputs"]
    if scheme.bits == 8 and scheme.group_size is None:
        return [] if inputs.dynamic else ["loads, but on CPUs with AMX it computes scales per token instead"]
    if scheme.bits == 4 and inputs.dynamic:
        return ["loads, but its CPU build has a fast kernel for it on Arm only"]
    return [f"{scheme}: not tried"]


def cache_clients(cache: CacheScheme) -> list[str]:
    """What clients do with the scales of the KV cache."""
    backend = "" if cache.per == "tensor" else " and the Flash-Attention backend"
    return [
        f"vLLM 0.32, KV cache: uses the scales with `--kv-cache-dtype fp8`{backend}; a k_scale of exactly 1.0 in its "
        "log means that they were not loaded",
        "transformers 5.23, KV cache: rounds keys and values",
    ]


def tensor_specs(site: LinearSite, scheme: QuantScheme) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor that replaces the site's weight."""
    rows, columns = site.out_features, site.in_features
    scale_dtype, scales = SAFETENSORS_DTYPE[scheme.scale_dtype], scheme.scale_shape(rows, columns)
    if format_of(scheme) != "pack-quantized":
        specs = [
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


def encode(site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
    """The tensors of `tensor_specs`."""
    if quantized.outlier_columns is not None:
        raise OutputError(f"{site.module}: compressed-tensors has no place for outlier columns")
    if format_of(quantized.scheme) == "pack-quantized":
        return _packed(site, quantized)
    tensors = {site.weight: quantized.codes, f"{stem(site)}.weight_scale": quantized.scale}
    if quantized.input_scale is not None:
        tensors[f"{stem(site)}.input_scale"] = quantized.input_scale
    return tensors


def _packed(site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
    """Unsigned codes packed along columns, zero points packed along rows."""
    import torch

    scheme = quantized.scheme
    codes = quantized.codes
    if scheme.symmetric:
        # Wraps at 256: signed codes become unsigned.
        codes = codes.to(torch.int8).view(torch.uint8) + (1 << (scheme.bits - 1))
    tensors = {
        f"{stem(site)}.weight_packed": pack(codes.to(torch.uint8), scheme.bits),
        f"{stem(site)}.weight_scale": quantized.scale,
        f"{stem(site)}.weight_shape": torch.tensor(quantized.shape, dtype=torch.int64),
    }
    if quantized.zero_point is not None:
        # Not .contiguous(): a single group is a row whose strides it leaves alone, and packing views them as words.
        rows = quantized.zero_point.T.clone(memory_format=torch.contiguous_format)
        packed = pack(rows, scheme.bits)
        tensors[f"{stem(site)}.weight_zero_point"] = packed.T.contiguous()
    return tensors


def stem(site: LinearSite) -> str:
    """Tensor name without its last part: the module's name as the checkpoint spells it."""
    return site.weight.removesuffix(".weight")
