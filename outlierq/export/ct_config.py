"""The `quantization_config` of compressed-tensors checkpoints, built and checked by the compressed-tensors package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.model import LinearSite
from outlierq.core.scheme import ActivationScheme, CacheScheme, QuantScheme
from outlierq.export.declared import holds_experts, names_of

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

MIXED = "mixed-precision"
DEQUANTIZE = "dequantize"
CONV1D = "Conv1D"  # of transformers: a linear whose weight is [in, out]
NVFP4, MXFP4, MXFP6, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"


def format_of(scheme: QuantScheme) -> str:
    """The compressed-tensors format that holds a scheme.

    Integers are packed into words where inputs are floats; kernels for int8 inputs want plain int8 weights.
    """
    if scheme.scales != "plain":
        return {"nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp6": MXFP6, "mxfp8": MXFP8}[scheme.numbers]
    if scheme.kind == "float":
        return "float-quantized"
    by_integers = scheme.activations is not None and scheme.activations.kind == "int"
    return "int-quantized" if by_integers else "pack-quantized"


def quantization_config(
    sites: Sequence[tuple[LinearSite, QuantScheme | None]],
    *,
    kept: Sequence[str] = (),
    cache: CacheScheme | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    sites: every linear with its scheme, None when kept. One scheme targets all `Linear` modules; several name theirs.
    kept: every module that is stored plain (`declared.kept_modules`). cache: of the KV cache, None for 16 bits.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    by_scheme: dict[tuple[QuantScheme, bool], list[str]] = {}
    for site, scheme in sites:
        if scheme is not None:
            by_scheme.setdefault((scheme, site.transposed), []).extend(names_of(site))
    is_a_target = any(transposed for _, transposed in by_scheme)
    no_targets = {name for site, _ in sites if site.kind == CONV1D and not is_a_target for name in names_of(site)}
    ignore = [name for name in kept if name not in no_targets]
    # vLLM asks by the names of separate experts also where they are stored together.
    ignore += [rf"re:{re.escape(name)}\.\d+\..*" for name in kept if holds_experts(name)]
    groups = {}
    for number, (key, modules) in enumerate(by_scheme.items()):
        scheme, transposed = key
        # The last says what is stored as [in, out]; other programs call a Conv1D a linear.
        targets = ["Linear"] if len(by_scheme) == 1 else _targets(modules, by_scheme, key)
        targets += [CONV1D] if transposed else []
        weights = _weights(scheme, transposed=transposed)
        groups[f"group_{number}"] = QuantizationScheme(
            targets=targets, weights=weights, input_activations=_inputs(scheme), format=format_of(scheme)
        )
    formats = {format_of(scheme) for scheme, _ in by_scheme} or {"dense"}
    config: dict[str, Any] = QuantizationConfig(
        config_groups=groups,
        ignore=ignore,
        format=formats.pop() if len(formats) == 1 else MIXED,
        quantization_status="compressed",
        kv_cache_scheme=None if cache is None else _cache(cache),
    ).model_dump(mode="json")
    if len(by_scheme) == 1 and not next(iter(by_scheme))[0].symmetric:
        # transformers 5.23 cannot hold packed zero points in its compressed layers; this key makes it load dense. Not
        # with several schemes: it would decode all with the first one, and wrong weights are worse than an error.
        config[DEQUANTIZE] = True
    return config


def _weights(scheme: QuantScheme, *, transposed: bool) -> QuantizationArgs:
    """How weights are stored. transposed: as [in, out], so that a group is a block of rows in one column."""
    from compressed_tensors.quantization import QuantizationArgs

    where: dict[str, Any]
    if scheme.scales == "two-level":
        where = {"strategy": "tensor_group", "group_size": scheme.group_size, "scale_dtype": "torch.float8_e4m3fn"}
    elif scheme.scales == "power-of-two":
        where = {"strategy": "group", "group_size": scheme.group_size, "scale_dtype": "torch.uint8"}
    elif scheme.block is not None:
        where = {"strategy": "block", "block_structure": list(scheme.block)}
    elif scheme.group_size is not None and transposed:
        where = {"strategy": "block", "block_structure": [scheme.group_size, 1]}
    elif scheme.group_size is not None:
        where = {"strategy": "group", "group_size": scheme.group_size}
    else:
        where = {"strategy": "channel"}
    return QuantizationArgs(num_bits=scheme.bits, type=scheme.kind, symmetric=scheme.symmetric, **where)


def _inputs(scheme: QuantScheme) -> QuantizationArgs | None:
    """How inputs are quantized at run time."""
    from compressed_tensors.quantization import QuantizationArgs

    inputs: ActivationScheme | None = scheme.activations
    if inputs is None:
        return None
    how: dict[str, Any] = {"strategy": inputs.per, "dynamic": inputs.dynamic}
    if inputs.per == "group":
        how["group_size"] = inputs.group_size
    if inputs.scales == "two-level":  # a unit from calibration, scales of groups at run time
        how |= {"strategy": "tensor_group", "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
    elif inputs.scales == "power-of-two":
        how |= {"scale_dtype": "torch.uint8"}
    return QuantizationArgs(num_bits=inputs.bits, type=inputs.kind, symmetric=True, **how)


def _cache(cache: CacheScheme) -> QuantizationArgs:
    """How keys and values are stored."""
    from compressed_tensors.quantization import QuantizationArgs

    strategy = "tensor" if cache.per == "tensor" else "attn_head"
    return QuantizationArgs(num_bits=cache.bits, type="float", symmetric=True, strategy=strategy, dynamic=False)


def _targets(
    modules: list[str], by_scheme: dict[tuple[QuantScheme, bool], list[str]], key: tuple[QuantScheme, bool]
) -> list[str]:
    """Patterns over block numbers where they are unambiguous, full names otherwise."""
    others = {pattern(m) for other, names in by_scheme.items() if other != key for m in names}
    named = [pattern(m) if pattern(m) not in others else m for m in modules]
    return list(dict.fromkeys(named))


def pattern(module: str) -> str:
    """ "model.layers.3.mlp.up_proj" as a pattern that matches it in every block."""
    return "re:" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split(".")) + "$"
