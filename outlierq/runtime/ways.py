"""The ways in which the CPU can hold a packed weight and multiply with it; `choice` takes the fastest for a shape.

A way says what it misses for a weight, or holds it: "words", "scale" and the rest as `cpu` takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from outlierq.core.quant_tensor import QuantTensor
from outlierq.ops.compiled import products
from outlierq.runtime import layout

Parts = dict[str, torch.Tensor | None]  # the buffers of a layer by their names


@dataclass(frozen=True)
class Way:
    """How a weight is held. int8_inputs: for inputs in int8. decodes: it also multiplies with decoded blocks."""

    name: str
    int8_inputs: bool
    missing: Callable[[QuantTensor, torch.dtype], str | None]
    hold: Callable[[QuantTensor], Parts]
    decodes: bool = True


def packed_bits(weight: QuantTensor) -> int:
    """Bits that a code of this weight takes."""
    return 4 if weight.scheme.bits <= 4 else 8


def ways_for(weight: QuantTensor, dtype: torch.dtype, int8_inputs: bool) -> list[Way]:
    """Those that can hold this weight for inputs of a dtype."""
    return [way for way in WAYS if way.int8_inputs == int8_inputs and way.missing(weight, dtype) is None]


def why_none(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    """Why no way holds this weight beside inputs that are not int8; None if one does."""
    if ways_for(weight, dtype, False):
        return None
    return (_not_in_strips if packed_bits(weight) == 4 else _not_in_rows)(weight, dtype)


def _by_row(weight: QuantTensor) -> bool:
    return weight.scheme.group_size is None and weight.zero_point is None


def _only_bfloat16(dtype: torch.dtype) -> str | None:
    wrong = dtype != torch.bfloat16
    return f"the CPU's products take bfloat16, not {str(dtype).removeprefix('torch.')}" if wrong else None


def _not_in_panels(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    """Integers with plain scales, in groups that fill whole words."""
    if weight.scheme.scales != "plain":
        return f"{weight.scheme.scales} scales have no compiled product"
    width, several = weight.scheme.columns_per_group(weight.shape[1]), 32 // packed_bits(weight)
    if width % several:
        return f"groups of {width} columns are no multiple of {several}"
    return None if products.float_kernel(dtype) else "no compiled product runs here"


def _in_panels(weight: QuantTensor) -> Parts:
    """Codes around zero; what zero points add to each group is an offset."""
    codes, offset = weight.codes, None
    if weight.zero_point is not None:
        middle = 1 << weight.scheme.bits - 1
        codes = codes.int() - middle
        offset = products.by_panel((middle - weight.zero_point.float()) * weight.scale.float())
    words = products.pack_panels(codes, packed_bits(weight))
    return {"words": words, "scale": products.by_panel(weight.scale), "zero_point": offset}


def _not_in_strips(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    if packed_bits(weight) != 4:
        return "torch has no such product"
    width = weight.scheme.columns_per_group(weight.shape[1])
    if layout.fitting_group(width) is None:
        return _only_bfloat16(dtype) or f"groups of {width} columns are no multiple of {min(layout.GROUP_SIZES)}"
    return _only_bfloat16(dtype) or (None if layout.strip_rows() else "this processor's 4-bit layout is not known")


def _in_strips(weight: QuantTensor) -> Parts:
    """torch's 4-bit layout; rows are filled up to whole strips."""
    width = weight.scheme.columns_per_group(weight.shape[1])
    codes, zero_point = weight.codes.int(), weight.zero_point
    if zero_point is not None and weight.scheme.bits < 4:  # differences fit 4 bits, and lose nothing to a rounded zero
        codes, zero_point = codes - zero_point.int().repeat_interleave(width, 1), None
    offset = layout.MIDDLE if zero_point is None else 0
    filling = (0, 0, 0, -weight.shape[0] % max(layout.STRIPS))
    fitting = layout.fitting_group(width)
    assert fitting is not None, f"groups of {width} columns are not packed"
    pairs = F.pad(layout.pack_scale(weight.scale, zero_point, width // fitting), (0, 0, 0, filling[-1]))
    return {"words": layout.pack_int4(F.pad(codes + offset, filling)), "scale": pairs.contiguous(), "zero_point": None}


def _not_in_rows(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    if packed_bits(weight) != 8 or not _by_row(weight):
        bits = weight.scheme.bits
        return _only_bfloat16(dtype) or f"{bits} bits have a product only with one scale per row and no zero points"
    return _only_bfloat16(dtype)


def _in_rows(weight: QuantTensor) -> Parts:
    codes = weight.codes.to(torch.int8).contiguous()
    return {"words": codes, "scale": weight.scale.bfloat16().flatten(), "zero_point": None}


def _not_in_int8_panels(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    if weight.shape[1] % 4:
        return f"rows of {weight.shape[1]} columns are no multiple of 4"
    return None if products.int8_kernel() else "no compiled product runs here"


def _int8(pack: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[QuantTensor], Parts]:
    """Codes in an order of their own, float32 scales by row."""

    def hold(weight: QuantTensor) -> Parts:
        words = pack(weight.codes.to(torch.int8).contiguous())
        return {"words": words, "scale": weight.scale.float().flatten(), "zero_point": None}

    return hold


# Names are those that `outlierq bench` shows and the kept choices have.
WAYS = (
    Way("compiled", False, _not_in_panels, _in_panels),
    Way("torch int4", False, _not_in_strips, _in_strips),
    Way("torch int8", False, _not_in_rows, _in_rows),
    Way("compiled int8", True, _not_in_int8_panels, _int8(products.pack_int8)),
    Way(
        "oneDNN",
        True,
        lambda *_: None if layout.int8_is_exact() else "oneDNN has no exact product here",
        _int8(layout.pack_int8),
        decodes=False,
    ),
    Way("torch int_mm", True, lambda *_: None, _int8(torch.Tensor.contiguous)),
)
