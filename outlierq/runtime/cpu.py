"""Products with packed weights on the CPU: on the codes where that is faster, else blocks that are decoded as they go.

Decoding by blocks keeps a block in the cache and makes no dense weight. Which of the two is faster, by how many tokens
there are, was measured when the layer was made (`choice`): bit i of `direct` says it for TOKENS[i] and fewer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
import torch.nn.functional as F

from outlierq.core.scheme import ActivationScheme
from outlierq.ops.activations import scale_that_holds
from outlierq.ops.compiled import products
from outlierq.ops.compiled.rounding import DTYPES, round_tokens, scale_rows
from outlierq.ops.twins.int8_split import int8_product
from outlierq.runtime.layout import qlinear, unpack_int4

TOKENS = (1, 4, 16, 64, 256)  # the last stands for more, too
ALWAYS = (1 << len(TOKENS)) - 1
BLOCK_ROWS = 256


def is_direct(direct: int, tokens: int) -> bool:
    """Whether so many tokens are multiplied with the codes."""
    return bool(direct >> min(bisect_left(TOKENS, tokens), len(TOKENS) - 1) & 1)


def packed_linear(x: torch.Tensor, weight: products.Packed, rows: int, direct: bool) -> torch.Tensor:
    """`x` [tokens, in] times a weight in any layout of the CPU, [tokens, rows]."""
    words, scale = weight.words, weight.scale
    if words.ndim == 3:
        return panels_linear(x, weight, rows, direct)
    assert scale is not None, "a weight without its scales"
    if weight.kind == "int8":
        return int8_weight_linear(x, words, scale, direct)
    y = int4_linear(x, words, scale, direct)
    return y if y.shape[1] == rows else y[:, :rows].contiguous()  # strips are filled up


def panels_linear(x: torch.Tensor, weight: products.Packed, rows: int, direct: bool) -> torch.Tensor:
    """`x` [tokens, in] times the panels of `ops.compiled.products`, [tokens, rows]."""
    if direct:
        return products.multiply(x, weight, rows)

    def block(part: slice, dense: torch.Tensor) -> torch.Tensor:
        return products.decode(weight.panels(_of_panels(part)), dense)

    y = _by_blocks(x, len(weight.words) * products.PANEL, block)
    return y if y.shape[1] == rows else y[:, :rows].contiguous()


def _of_panels(rows: slice) -> slice:
    """The panels of whole panels of rows."""
    return slice(rows.start // products.PANEL, rows.stop // products.PANEL)


def int4_linear(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, direct: bool) -> torch.Tensor:
    """bfloat16 `x` [tokens, in] times a 4-bit weight in torch's strips, [tokens, out].

    words: of `layout.pack_int4`. scale: [groups, out, 2], pairs of `layout.pack_scale`.
    """
    width = x.shape[1] // scale.shape[0]
    if direct:
        return torch._weight_int4pack_mm_for_cpu(x, words, width, scale)
    factor = scale[..., 0].t().contiguous()
    zero = scale[..., 1].t().contiguous() if bool(scale[..., 1].any()) else None

    def block(rows: slice, weight: torch.Tensor) -> torch.Tensor:
        grouped = unpack_int4(words[rows], weight).view(weight.shape[0], -1, width)
        grouped.mul_(factor[rows, :, None])
        if zero is not None:
            grouped.add_(zero[rows, :, None])
        return weight

    return _by_blocks(x, words.shape[0], block)


def int8_weight_linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, direct: bool) -> torch.Tensor:
    """bfloat16 `x` [tokens, in] times int8 `codes` [out, in] with one scale per row, [tokens, out]. scale: [out]."""
    if direct:
        return torch._weight_int8pack_mm(x, codes, scale)
    return _by_blocks(x, codes.shape[0], lambda rows, weight: weight.copy_(codes[rows])).mul_(scale)


def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    columns: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    per_token: bool,
    opaque: bool = False,
    direct: bool = True,
) -> torch.Tensor:
    """`x` [tokens, in] in int8 times int8 `codes` [out, in], plus 16-bit outlier columns: `ops.int8_split`.

    scale: float32 [out]. input_scale: [1] of a static scheme, else it is found per token or for all of `x`.
    columns: [k], outlier_weight: [out, k or more]; what is more are zeros. opaque: the codes come from
    `layout.pack_int8` (torch.compile does not know by itself). Rows and oneDNN's order are plain torch, for any device.
    """
    low = x if columns is None else x.index_fill(1, columns.long(), 0.0)
    rounded, step = quantize_input(low, input_scale, per_token)
    if codes.ndim == 3 and direct and columns is None and x.dtype in DTYPES and step.ndim == 2:
        return products.multiply_int8(rounded, codes, scale, step.contiguous(), x.dtype)
    y = _int8_sums(rounded, codes, scale, x.dtype, opaque, direct)
    if columns is None and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        scaled = scale_rows(y, step)
        if scaled is not None:
            return scaled
    y.mul_(step)
    if columns is not None:
        assert outlier_weight is not None, "outlier columns need their weight"
        y.addmm_(x[:, columns.long()].float(), outlier_weight[:, : columns.numel()].float().t())
    return y.to(x.dtype)


def _int8_sums(
    rounded: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, opaque: bool, direct: bool
) -> torch.Tensor:
    """Float32 [tokens, out]: sums of int8 products times `scale`; exact sums unless the codes are decoded."""
    if opaque:
        return qlinear(rounded, codes, scale)
    if direct:
        if codes.ndim == 3:
            return products.multiply_int8(rounded, codes, scale)
        return int8_product(rounded, codes) * scale
    wide = rounded.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    if codes.ndim == 2:
        sums = _by_blocks(wide, len(codes), lambda rows, weight: weight.copy_(codes[rows]))
    else:

        def block(rows: slice, weight: torch.Tensor) -> torch.Tensor:
            return products.decode(products.Packed(codes[_of_panels(rows)], None, None, "int8"), weight)

        sums = _by_blocks(wide, len(codes) * products.PANEL, block)[:, : len(scale)]
    return sums.float() * scale


def quantize_input(
    x: torch.Tensor, input_scale: torch.Tensor | None, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 codes of `x` [tokens, in], scale: [] or [tokens, 1]), with a given scale or one found now.

    A NaN makes its token's scale NaN, since no integer tells of it.
    """
    if input_scale is not None:
        step = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, input_scale)
        return (x / input_scale).round_().clamp_(-128, 127).to(torch.int8), step
    if per_token and not torch.compiler.is_compiling():  # which cannot see into a library
        compiled = round_tokens(x)
        if compiled is not None:
            return compiled
    wide = x.to(torch.float32, copy=True)  # in place from here on: fresh memory costs more than the arithmetic
    largest = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    step = scale_that_holds(largest if per_token else largest.amax(), ActivationScheme())
    return wide.div_(step).round_().to(torch.int8), step  # the scale holds the largest value: nothing to clamp


def _by_blocks(x: torch.Tensor, rows: int, decode: Callable[[slice, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`x` times a weight of which `decode` writes some rows at a time into the [rows, in] that it is given."""
    y = x.new_empty(x.shape[0], rows)
    weight = x.new_empty(min(BLOCK_ROWS, rows), x.shape[1])  # one for all blocks: fresh memory costs more than decoding
    for first in range(0, rows, BLOCK_ROWS):
        part = slice(first, min(first + BLOCK_ROWS, rows))
        y[:, part] = F.linear(x, decode(part, weight[: part.stop - first]))
    return y
