"""compressed-tensors `pack-quantized`: the format vLLM and transformers load without a plug-in."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.ops.packing import pack, words_for

if TYPE_CHECKING:
    import torch

SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def obstacle(site: LinearSite, scheme: QuantScheme) -> str | None:
    """Why this format cannot hold the site, or None when it can."""
    if site.kind != "Linear":
        return f"compressed-tensors has no {site.kind} layer"
    return None


def clients(schemes: Collection[QuantScheme]) -> list[str]:
    """One line per client: does it load these schemes? Facts of 2026-11 (transformers 5.23, vLLM 0.32)."""
    asymmetric = any(not scheme.symmetric for scheme in schemes)
    transformers = "loads (dequantized at load, as its config asks)" if asymmetric else "loads"
    if asymmetric and len(schemes) > 1:
        # Its dequantizing loader decodes every linear with the first config group.
        transformers = (
            f"does not load {len(schemes)} schemes of which some are asymmetric; "
            "use one group_size that divides all widths and no overrides, or symmetric: true"
        )
    odd = sorted({scheme.bits for scheme in schemes} - {4, 8})
    widths = " and ".join(f"{bits}-bit" for bits in odd)
    return [
        f"transformers 5.23 with compressed-tensors 0.20: {transformers}",
        "vLLM 0.32: " + (f"has no kernel for {widths} weights; use 4 or 8 bits" if odd else "loads"),
    ]


def tensor_specs(site: LinearSite, scheme: QuantScheme) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor that replaces the site's weight."""
    rows, columns = site.out_features, site.in_features
    groups = scheme.groups(columns)
    specs = [
        (f"{stem(site)}.weight_packed", "I32", (rows, words_for(columns, scheme.bits))),
        (f"{stem(site)}.weight_scale", SAFETENSORS_DTYPE[scheme.scale_dtype], (rows, groups)),
        (f"{stem(site)}.weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        specs.append((f"{stem(site)}.weight_zero_point", "I32", (words_for(rows, scheme.bits), groups)))
    return specs


def encode(site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
    """The tensors of `tensor_specs`: unsigned codes packed along columns, zero points packed along rows."""
    import torch

    scheme = quantized.scheme
    codes = quantized.codes + (1 << (scheme.bits - 1)) if scheme.symmetric else quantized.codes
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


def quantization_config(
    sites: Sequence[tuple[LinearSite, QuantScheme | None]], *, also_kept: Sequence[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json, built and checked by the compressed-tensors package.

    sites: every linear with its scheme, None when kept. One scheme targets all `Linear` modules; several name theirs.
    also_kept: modules without a tensor of their own (a tied head).
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    by_scheme: dict[QuantScheme, list[str]] = {}
    for site, scheme in sites:
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(site.module)
    kept = [site.module for site, scheme in sites if scheme is None and site.kind == "Linear"]
    kept += [module for module in also_kept if module not in kept]
    groups = {}
    for number, (scheme, modules) in enumerate(by_scheme.items()):
        weights = QuantizationArgs(
            num_bits=scheme.bits,
            type="int",
            symmetric=scheme.symmetric,
            strategy="channel" if scheme.group_size is None else "group",
            group_size=scheme.group_size,
        )
        targets = ["Linear"] if len(by_scheme) == 1 else _targets(modules, by_scheme, scheme)
        group = QuantizationScheme(targets=targets, weights=weights, format="pack-quantized")
        groups[f"group_{number}"] = group
    config = QuantizationConfig(
        config_groups=groups, ignore=kept, format="pack-quantized", quantization_status="compressed"
    ).model_dump(mode="json")
    if len(by_scheme) == 1 and not next(iter(by_scheme)).symmetric:
        # transformers 5.23 cannot hold packed zero points in its compressed layers; this key makes it load dense. Not
        # with several schemes: it would decode all with the first one, and wrong weights are worse than an error.
        config["dequantize"] = True
    return config


def _targets(modules: list[str], by_scheme: dict[QuantScheme, list[str]], scheme: QuantScheme) -> list[str]:
    """Patterns over block numbers where they are unambiguous, full names otherwise."""
    others = {pattern(m) for s, names in by_scheme.items() if s != scheme for m in names}
    named = [pattern(m) if pattern(m) not in others else m for m in modules]
    return list(dict.fromkeys(named))


def pattern(module: str) -> str:
    """ "model.layers.3.mlp.up_proj" as a pattern that matches it in every block."""
    return "re:" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split(".")) + "$"
