"""Do the stored numbers make sense by themselves? Signs and sizes of scales, zero points, tensors of zeros.

All of this needs no source. Sizes are judged beside their neighbours, and only where no weight could explain them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint
    from outlierq.core.quant_tensor import QuantTensor

CHECK = "scales"
# Scales are positive by definition; what is stored beside codes under these names is one.
SCALES = (
    "weight_scale",
    "scales",
    "SCB",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
    "k_scale",
    "v_scale",
)
MAY_BE_TURNED = ("weight_scale", "scales")
FEWEST_TURNED = 0.02
# A scale this many times the next smaller one and the median of its linear: no group of weights has ever been.
LONELY, FAR_FROM_MEDIAN = 32.0, 64.0
# Inputs and caches hold activations: 1e-6 to 1e5 as far as anything is known, over 127 or 448.
RANGES = {
    "input_scale": (1e-9, 1e3),
    "input_global_scale": (1e-3, 1e10),  # 6 x 448 over the largest input
    "k_scale": (1e-9, 1e3),
    "v_scale": (1e-9, 1e3),
    "weight_global_scale": (0.0, 1e12),  # one of 0 divides: decoding says so
}
# Zero points follow the mean code of their group: correlation 0.92 and more in every linear of SmolLM2-135M as
# GPTQModel and llm-compressor write it, about 0 when the zero points are those of other groups; 0.57 where every other
# weight of a group has one value.
LEAST_CORRELATION = 0.45
# Median distance of mean code and zero point: 0.03 and less there.
USUAL_SHIFT = 0.5
# Too few groups, or zero points that are nearly all alike, say nothing.
FEWEST_GROUPS, LEAST_SPREAD, FEWEST_SIZES = 16, 0.3, 6


class Signs:
    """How many scales of each linear are negative.

    Symmetric grids reach one code farther down than up. Some programs, ours among them, turn a group round to use it,
    and then about half of all scales are negative; with others none is. A few are a fault, and so is a whole linear.
    """

    def __init__(self) -> None:
        self._negative: dict[str, tuple[int, int]] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Count the scales of one linear, in any shape."""
        self._negative[name] = int((values < 0).sum()), values.numel()

    def judge(self, findings: Findings) -> None:
        """Tell linears whose signs are not those of the checkpoint's other linears."""
        negative, everything = (sum(pair[i] for pair in self._negative.values()) for i in range(2))
        for name, (count, total) in self._negative.items():
            share = (negative - count) / max(1, everything - total)
            if count and (share < FEWEST_TURNED or (count == total >= FEWEST_GROUPS)):
                findings.fault(CHECK, name, f"{count} of {total} scales are negative")


def check_stored(name: str, tensor: torch.Tensor, signs: Signs, findings: Findings) -> None:
    """One stored tensor, in the shape of its header: scales have a sign, and a size that a neighbour can bear."""
    role = name.rpartition(".")[2]
    if role not in SCALES or not tensor.is_floating_point():
        return
    values = tensor.float()
    if role in MAY_BE_TURNED and tensor.dtype != torch.float8_e4m3fn:
        signs.add(name, values)
        _check_sizes(name, values.abs(), findings)
    elif bool((values < 0).any()):
        findings.fault(CHECK, name, f"{int((values < 0).sum())} of {values.numel()} scales are negative")
    elif role in RANGES:
        _check_single(name, role, values, findings)
    else:
        _check_sizes(name, values, findings)


def _check_single(name: str, role: str, values: torch.Tensor, findings: Findings) -> None:
    """Scales of inputs, of a cache, or of a whole weight."""
    least, largest = RANGES[role]
    strange = values[(values < least) | (values > largest)]
    if strange.numel():
        findings.fault(
            CHECK, name, f"is {strange.flatten()[0]:.3g}; a scale of this kind lies in {least:g} to {largest:g}"
        )


def _check_sizes(name: str, values: torch.Tensor, findings: Findings) -> None:
    """Scales of groups: one far above all others."""
    if values.numel() < FEWEST_SIZES:
        return
    ordered = values.flatten().sort().values
    middle, last, before = ordered[len(ordered) // 2], ordered[-1], ordered[-2]
    if middle > 0 and last > LONELY * before and last > FAR_FROM_MEDIAN * middle:
        what = (
            f"one of {values.numel()} scales is {last:.3g}, {last / before:.0f} times the next and {last / middle:.0f}"
        )
        findings.fault(CHECK, name, f"{what} times the median")


def check_codes(name: str, quantized: QuantTensor, config: Mapping[str, Any], findings: Findings) -> None:
    """A decoded weight [out, in] by itself: scales of zero under codes that are not, zero points, nothing but zeros."""
    if quantized.scheme.scales != "power-of-two":
        _check_zero_scales(name, quantized, findings)
    outliers = quantized.outlier_weight
    if outliers is not None and outliers.numel() and not bool(outliers.any()):
        findings.fault(CHECK, name, f"its {outliers.shape[1]} outlier columns are zero, so they are none")
    check_zero_points(name, quantized, config, findings)


def check_values(name: str, weight: torch.Tensor, findings: Findings) -> None:
    """A decoded weight [out, in] of nothing but zeros holds no linear."""
    if not bool(weight.any()):
        findings.fault("numbers", name, "holds nothing but zeros")


def _check_zero_scales(name: str, quantized: QuantTensor, findings: Findings) -> None:
    """A scale of 0 makes its group vanish; a group that is zero needs no codes but those of zero."""
    scale, codes = quantized.float_scale, quantized.codes.float()
    empty = scale == 0
    if not bool(empty.any()):
        return
    if quantized.scheme.block is not None:
        height, width = quantized.scheme.block
        spread = empty.repeat_interleave(height, 0)[: len(codes)].repeat_interleave(width, 1)[:, : codes.shape[1]]
        busy = spread & (codes != 0)
    else:
        grouped = codes.view(len(codes), scale.shape[1], -1)
        busy = empty & (grouped.amax(-1) != grouped.amin(-1))
    if bool(busy.any()):
        row = int(busy.nonzero()[0, 0])
        what = f"{int(empty.sum())} of {scale.numel()} scales are 0 over codes that are not, first in row {row}"
        findings.fault(CHECK, name, what)


def check_zero_points(name: str, quantized: QuantTensor, config: Mapping[str, Any], findings: Findings) -> None:
    """A zero point [out, groups] is the code of the weight 0, so it goes with the mean code of its group.

    That holds for groups with weights on both sides of 0, whose zero point lies inside of the range.
    """
    if quantized.zero_point is None or quantized.super_scale is not None:
        return
    if config.get("sym") is True or config.get("zero_point") is False:
        middle = 1 << (quantized.scheme.bits - 1)
        what = f"has zero points other than {middle}, but config.json says that it is symmetric"
        findings.fault("config", name, what)
        return
    rows, groups = quantized.zero_point.shape
    zero = quantized.zero_point.float().flatten()
    inside = (zero > 0) & (zero < quantized.scheme.code_max)
    mean = quantized.codes.float().view(rows, groups, -1).mean(-1).flatten()[inside]
    zero = zero[inside]
    if zero.numel() < FEWEST_GROUPS or zero.std() < LEAST_SPREAD:
        return
    correlation = torch.corrcoef(torch.stack([mean, zero]))[0, 1].item()
    if not correlation >= LEAST_CORRELATION:
        what = f"its zero points do not follow the mean codes of their groups (r = {correlation:.2f})"
        findings.fault("zero points", name, what)
        return
    beside = mean - zero
    noise = beside.std() / beside.numel() ** 0.5
    if beside.median().abs() > USUAL_SHIFT + 3 * noise:
        how = f"its zero points lie {beside.median():+.2f} from the mean codes, so all are wrong by about one"
        findings.fault("zero points", name, f"{how} (GPTQ's versions differ by one)")


def check_members(checkpoint: Checkpoint, config: Mapping[str, Any], findings: Findings) -> None:
    """Tensors that the config does not account for: scales of inputs or of a cache that it says nothing of."""
    static = [name for name in checkpoint.tensors if name.endswith((".input_scale", ".input_global_scale"))]
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    inputs = [group.get("input_activations") or {} for group in groups]
    if static and groups and not any(part and part.get("dynamic") in (False, "local") for part in inputs):
        what = "is the scale of an input, but config.json says of no linear that its input has one"
        findings.fault("config", static[0], what)
    caches = [name for name in checkpoint.tensors if name.endswith((".k_scale", ".v_scale"))]
    if caches and not config.get("kv_cache_scheme"):
        findings.fault("config", caches[0], "is the scale of a KV cache, of which config.json says nothing")
    threshold = config.get("llm_int8_threshold")
    if isinstance(threshold, int | float) and not isinstance(threshold, bool) and not threshold > 0:
        findings.fault("config", "", f"llm_int8_threshold is {threshold}, which makes every column an outlier or none")
