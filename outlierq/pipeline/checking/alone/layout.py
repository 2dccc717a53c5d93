"""Do the words of the quantization_config fit the tensors of each linear? Groups, number types, orders of columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

CHECK = "config"
INTEGERS = ("pack-quantized", "int-quantized")
# Their decoders do not need the group size, so that they cannot say that it is wrong.
FLOAT4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
CACHE_BITS = 8
BYTES = {"int-quantized": "I8", "float-quantized": "F8_E4M3"}
# Keys of GPTQ's config under which the order of activations leaves the groups in runs of columns.
IN_RUNS = ("static_groups", "act_group_aware", "hybrid")


def check_layout(stored: Checkpoint, linears: Mapping[str, Any], config: Mapping[str, Any], findings: Findings) -> None:
    """stored: the checkpoint as it is. linears: how each of its weights is stored. config: its quantization_config."""
    if config.get("quant_method") == "compressed-tensors":
        cache = config.get("kv_cache_scheme") or {}
        if cache.get("num_bits", CACHE_BITS) != CACHE_BITS:
            what = f"the KV cache is said to have {cache['num_bits']} bits; the scales of one belong to {CACHE_BITS}"
            findings.fault(CHECK, "", what)
        for name, linear in linears.items():
            for what in _of_compressed_tensors(stored, linear):
                findings.fault(CHECK, name, what)
    if config.get("quant_method") == "gptq":
        _check_gptq(stored, linears, config, findings)


def _of_compressed_tensors(stored: Checkpoint, linear: Any) -> Iterable[str]:
    """What a config group says of one linear, against what is stored of it."""
    said = linear.said
    weights, inputs = said.get("weights") or {}, said.get("input_activations") or {}
    needed = "int" if linear.format in INTEGERS else "float"
    if weights.get("type", needed) != needed:
        yield f"is said to hold numbers of type {weights['type']}, but {linear.format} holds {needed}"
    codes = stored.tensors[next(iter(linear.members.values()))]
    if codes.dtype != BYTES.get(linear.format, codes.dtype):
        yield f"is stored as {codes.dtype}; {linear.format} holds {BYTES[linear.format]}"
    if weights.get("actorder") == "group" and "weight_g_idx" not in linear.members:
        yield "is said to have groups in activation order, but no weight_g_idx is stored"
    if inputs and inputs.get("dynamic", False) is False and "input_scale" not in linear.members:
        yield "is said to have a fixed scale for its inputs, but none is stored"
    least, most = inputs.get("num_bits"), weights.get("num_bits")
    if isinstance(least, int) and isinstance(most, int) and least < most:
        yield f"has inputs of {least} bits under weights of {most}, which no kernel multiplies"
    yield from _of_scales(linear, weights, stored.tensors[linear.members["weight_scale"]].shape)


def _of_scales(linear: Any, weights: Mapping[str, Any], shape: tuple[int, ...]) -> Iterable[str]:
    """The strategy, and the size of groups, against the shape of the scales."""
    (rows, columns), strategy, size = linear.shape, weights.get("strategy"), weights.get("group_size")
    count = 1
    for number in shape:
        count *= number
    if strategy == "tensor" and count != 1:
        yield f"is said to have one scale, but {count} are stored"
    elif strategy == "channel" and count != (channels := columns if linear.is_across else rows):
        yield f"is said to have a scale for each of its {channels} outputs, but {count} are stored"
    elif linear.format in FLOAT4 and isinstance(size, int) and size > 0 and count * size != rows * columns:
        yield f"is said to have groups of {size} columns, but {count} scales are stored for {rows} x {columns} weights"


def _check_gptq(stored: Checkpoint, linears: Mapping[str, Any], config: Mapping[str, Any], findings: Findings) -> None:
    """`desc_act` against the order of columns, `sym` against the zero points."""
    ordered = {name: _order(stored, linear, name, findings) for name, linear in linears.items()}
    runs = [name for name, in_runs in ordered.items() if in_runs]
    others = [name for name, in_runs in ordered.items() if in_runs is False]
    if others and config.get("desc_act") is False:
        what = f"has its columns in another order ({len(others)} such linears), but desc_act is false"
        findings.fault(CHECK, others[0], what)
    if config.get("sym") is False and all(_is_one_word(stored, linear) for linear in linears.values()):
        findings.fault(CHECK, "", "sym is false, but every zero point of every linear is the same")
    excused = any(config.get(key) or (config.get("meta") or {}).get(key) for key in IN_RUNS)
    if runs and not others and config.get("desc_act") is True and not excused:
        findings.fault(CHECK, "", "desc_act is true, but the columns of every linear are in their own order")


def _is_one_word(stored: Checkpoint, linear: Any) -> bool:
    """Whether all zero points of a linear are alike."""
    words: torch.Tensor = stored.read(linear.members["qzeros"])
    return bool((words == words.flatten()[0]).all())


def _order(stored: Checkpoint, linear: Any, name: str, findings: Findings) -> bool | None:
    """Whether the groups are runs of columns; None with one group, or when it cannot be told."""
    index: torch.Tensor = stored.read(linear.members["g_idx"]).long()
    width = linear.scheme.columns_per_group(linear.shape[1])
    groups = linear.scheme.groups(linear.shape[1])
    if (
        groups < 2
        or groups != stored.tensors[linear.members["scales"]].shape[0]
        or bool((index < 0).any())
        or bool((index >= groups).any())
    ):
        return None
    sizes = index.bincount(minlength=groups)
    if bool((sizes != width).any()):
        fewest = int(sizes.argmin())
        findings.fault(CHECK, name, f"g_idx gives {int(sizes[fewest])} columns to group {fewest}; each has {width}")
    return bool((index == index.new_tensor(range(len(index))) // width).all())
