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


def kind_of_codes(weight: QuantTensor) -> str:
    """What the codes of this weight are held as: a name of `products.CODES`."""
    if weight.scheme.kind == "outlier-victim":
        return "pairs"
    if weight.scheme.kind == "float":
        return {4: "e2m1", 6: "e2m3", 8: "e4m3"}[weight.scheme.bits]
    return "int4" if weight.scheme.bits <= 4 else "int8"


def code_of(weight: QuantTensor) -> products.Code:
    """The same with its properties."""
    return products.CODES[kind_of_codes(weight)]


def ways_for(weight: QuantTensor, dtype: torch.dtype, int8_inputs: bool) -> list[Way]:
    """Those that can hold this weight for inputs of a dtype."""
    return [way for way in WAYS if way.int8_inputs == int8_inputs and way.missing(weight, dtype) is None]


def why_none(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    """Why no way holds this weight beside inputs that are not int8; None if one does."""
    if ways_for(weight, dtype, False):
        return None
    if not _is_plain(weight):
        return _not_in_panels(weight, dtype)
    return (_not_in_strips if code_of(weight).bits == 4 else _not_in_rows)(weight, dtype)


def _is_plain(weight: QuantTensor) -> bool:
    """Whether these are integers with scales by group, which torch has products for."""
    return weight.scheme.kind == "int" and weight.scheme.block is None


def _by_row(weight: QuantTensor) -> bool:
    return weight.scheme.group_size is None and weight.zero_point is None


def _only_bfloat16(dtype: torch.dtype) -> str | None:
    wrong = dtype != torch.bfloat16
    return f"the CPU's products take bfloat16, not {str(dtype).removeprefix('torch.')}" if wrong else None


def _not_in_panels(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    """Integers and pairs with plain scales and floats with any, in groups that fill whole words."""
    scheme, columns, several = weight.scheme, weight.shape[1], code_of(weight).columns
    if scheme.kind == "int" and scheme.scales != "plain":
        return f"{scheme.scales} scales have no compiled product"
    width = scheme.columns_per_group(columns)
    if width % several:
        return f"groups of {width} columns are no multiple of {several}"
    if columns % width:
        return f"rows of {columns} columns are no multiple of {width}, the width of a block"
    if scheme.kind == "float" and bool((weight.codes.view(torch.uint8) & 127 == 127).any()):
        return "some of its codes are no numbers"
    return None if products.float_kernel(dtype) else "no compiled product runs here"


def _in_panels(weight: QuantTensor) -> Parts:
    """Codes around zero; what zero points add to each group is an offset. Scales of blocks are those of each row."""
    codes, scale, offset = weight.codes, weight.scale, None
    if weight.scheme.block is not None:
        scale = scale.repeat_interleave(weight.scheme.block[0], 0)[: weight.shape[0]]
    if weight.zero_point is not None:
        middle = 1 << weight.scheme.bits - 1
        codes = codes.int() - middle
        offset = products.by_panel((middle - weight.zero_point.float()) * scale.float())
    words = products.pack_panels(codes, kind_of_codes(weight))
    parts: Parts = {"words": words, "scale": products.by_panel(scale), "zero_point": offset}
    return parts | {"super_scale": weight.super_scale}


def _not_in_strips(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    if code_of(weight).bits != 4 or not _is_plain(weight):
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
    if not _is_plain(weight):
        return "torch has no such product"
    if code_of(weight).bits != 8 or not _by_row(weight):
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
