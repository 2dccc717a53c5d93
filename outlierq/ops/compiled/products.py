"""Tokens times weights of 4, 6 or 8 bits that stay packed: native/products.c, a kernel for each kind of processor.

A weight lies in panels of 16 rows, whose codes share int32 words: [panels, words of a row, 16]. Codes are integers in
two's complement or floats of few bits (`CODES`); scales are float32, or bytes as the checkpoint has them.
Which kernels a machine runs is asked of the machine; before a kernel's first product it must give what torch gives on a
small case, or it is not used and a note says so. Everything here gives None where there is no kernel left.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from outlierq.core.notes import note
from outlierq.ops import outlier_victim
from outlierq.ops.compiled import rounding as native

PANEL = 16
PLACES = {4: (0, 16, 4, 20, 8, 24, 12, 28), 8: (0, 8, 16, 24)}  # bits of a word at which its columns begin
# Of 6 bits, the lower four lie in two words and the upper two in a third.
LOWER, UPPER = (0, 8, 16, 24, 4, 12, 20, 28), tuple(8 * (c % 4) + 2 * (c // 4) for c in range(16))
SCALES = {torch.float32: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}  # numbers, divided by another, powers of two
# Numbers of `kernels` in products.c, the fastest first; what a kernel takes.
FLOAT_KERNELS = {"AVX-512 bf16": 6, "AVX-512": 4, "AVX2": 2, "portable": 0}
INT8_KERNELS = {"AVX-512 VNNI": 5, "NEON dot product": 7, "AVX2": 3, "portable": 1}
ONLY_BFLOAT16 = "AVX-512 bf16"


@dataclass(frozen=True)
class Code:
    """number: of products.c. bits: that it takes. columns: of a row that share `words` int32 words.
    exponent: bits of that of a float, 0 of an integer. paired: whether it may be an outlier or its victim.
    """

    number: int
    bits: int
    columns: int
    words: int
    exponent: int = 0
    paired: bool = False

    @property
    def values(self) -> torch.Tensor:
        """Float32 [2^bits], the number of each code of a float; the bias of its exponent is 2^(exponent - 1) - 1."""
        code = torch.arange(1 << self.bits)
        mantissa = self.bits - 1 - self.exponent
        exponent, rest = code >> mantissa & (1 << self.exponent) - 1, code & (1 << mantissa) - 1
        whole = (rest + (exponent > 0) * (1 << mantissa)).float()
        least = 2 - (1 << self.exponent - 1) - mantissa
        return torch.ldexp(whole, exponent.clamp(min=1) - 1 + least) * torch.where(
            code >> self.bits - 1 == 1, -1.0, 1.0
        )


CODES = {
    "int4": Code(0, 4, 8, 1),
    "int8": Code(1, 8, 4, 1),
    "e2m1": Code(2, 4, 8, 1, 2),
    "e4m3": Code(3, 8, 4, 1, 4),
    "e2m3": Code(4, 6, 16, 3, 2),
    "e3m2": Code(5, 6, 16, 3, 3),
    "pairs": Code(6, 4, 8, 1, paired=True),
}


class Packed(NamedTuple):
    """A packed weight: code * scale + offset.

    words: of `pack_panels`, or of another layout of the runtime. scale, offset: of `by_panel`, or None. kind: of
    `CODES`. divisor: float32 [1], of scales in E4M3.
    """

    words: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    kind: str
    divisor: torch.Tensor | None = None

    def panels(self, part: slice) -> Packed:
        """Some panels of it."""
        scale, offset = (None if whole is None else whole[part] for whole in (self.scale, self.offset))
        return Packed(self.words[part], scale, offset, self.kind, self.divisor)


def pack_panels(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Codes [out, in] of a kind of `CODES` as int32 [panels, in * bits / 32, 16]; in: whole steps of its columns.

    codes: integers, or numbers in float8_e4m3fn, which holds those of every kind of float.
    """
    several = CODES[kind].columns
    filled = F.pad(_bits(codes, kind), (0, 0, 0, -len(codes) % PANEL))
    steps = [filled[:, column::several].int() & (1 << CODES[kind].bits) - 1 for column in range(several)]
    if CODES[kind].bits == 6:
        low = [_joined([code & 15 for code in part], LOWER) for part in (steps[:8], steps[8:])]
        words = torch.stack([*low, _joined([code >> 4 for code in steps], UPPER)], -1).flatten(1)
    else:
        words = _joined(steps, PLACES[CODES[kind].bits])
    return words.view(-1, PANEL, words.shape[1]).transpose(1, 2).contiguous()


def unpack_panels(words: torch.Tensor, kind: str) -> torch.Tensor:
    """The inverse of `pack_panels`: [panels * 16, in], int8 or float8_e4m3fn."""
    rows, code = words.transpose(1, 2).reshape(-1, words.shape[1]), CODES[kind]
    if code.bits == 6:
        parts = rows.view(len(rows), -1, 3)
        lower = [parts[..., c // 8] >> LOWER[c % 8] & 15 for c in range(code.columns)]
        columns = [low | (parts[..., 2] >> place & 3) << 4 for low, place in zip(lower, UPPER, strict=True)]
    else:
        columns = [rows << (32 - code.bits - place) >> (32 - code.bits) for place in PLACES[code.bits]]
    codes = torch.stack(columns, -1).view(len(rows), -1)
    if code.paired:
        codes = outlier_victim.decode((codes & 15).to(torch.uint8))
    if not code.exponent:
        return codes.to(torch.int8)
    return code.values.to(torch.float8_e4m3fn).view(torch.uint8)[codes & (1 << code.bits) - 1].view(torch.float8_e4m3fn)


def _bits(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Codes [out, in] as `pack_panels` takes them, in bytes whose lowest bits are stored."""
    if CODES[kind].paired:
        return outlier_victim.encode(codes)
    return float_bits(codes, kind) if CODES[kind].exponent else codes.to(torch.int8)


def float_bits(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """Numbers [out, in] in float8_e4m3fn as uint8: their codes of a kind."""
    stored = codes.contiguous().view(torch.uint8)
    if kind == "e4m3":
        return stored
    table = torch.zeros(256, dtype=torch.uint8)
    as_e4m3 = CODES[kind].values.to(torch.float8_e4m3fn).view(torch.uint8)
    table[as_e4m3.long()] = torch.arange(len(as_e4m3), dtype=torch.uint8)
    return table[stored.int()]


def _joined(parts: list[torch.Tensor], places: tuple[int, ...]) -> torch.Tensor:
    """int32 words with each of `parts`, of any one shape, from its bit on."""
    words = torch.zeros_like(parts[0])
    for part, place in zip(parts, places, strict=True):
        words |= part << place
    return words


def by_panel(values: torch.Tensor) -> torch.Tensor:
    """Numbers [out, groups] as float32 [panels, groups, 16], or bytes as they are; what is filled up is 0."""
    plain = values.view(torch.uint8) if values.element_size() == 1 else values.float()
    filled = F.pad(plain, (0, 0, 0, -len(values) % PANEL))
    panels = filled.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()
    return panels.view(values.dtype) if values.element_size() == 1 else panels


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [out, in] for `multiply_int8`: panels, and under each panel 128 times the sums of its rows."""
    sums = F.pad(128 * codes.sum(1, dtype=torch.int32), (0, -len(codes) % PANEL))
    return torch.cat([pack_panels(codes, "int8"), sums.view(-1, 1, PANEL)], 1).contiguous()


@cache
def _compiled() -> ctypes.CDLL | None:
    """The library, if it was compiled since it has all of these products."""
    compiled = native.library()
    if compiled is None or not hasattr(compiled, "outlierq_resolve_pairs"):
        return None
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    codes, held = (number, pointer, number, pointer, pointer), (pointer, pointer, size, size)
    compiled.outlierq_multiply_panels.argtypes = (
        number,
        pointer,
        *codes,
        *4 * (size,),
        pointer,
        number,
        size,
        pointer,
        number,
    )
    compiled.outlierq_multiply_int8.argtypes = (number, *held, pointer, pointer, size, pointer, number, number)
    compiled.outlierq_decode_panels.argtypes = (pointer, size, *codes, *3 * (size,), number, pointer, pointer)
    compiled.outlierq_runs_kernel.argtypes = (number,)
    return compiled


def float_kernel(dtype: torch.dtype) -> str | None:
    """The name of the fastest kernel here for inputs of a dtype."""
    names = (n for n in FLOAT_KERNELS if n != ONLY_BFLOAT16 or dtype == torch.bfloat16)
    return next((name for name in names if dtype in native.DTYPES and _runs(FLOAT_KERNELS[name], name)), None)


def int8_kernel() -> str | None:
    """The name of the fastest kernel here for int8 inputs."""
    return next((name for name, number in INT8_KERNELS.items() if _runs(number, name)), None)


def multiply(x: torch.Tensor, weight: Packed, rows: int, kernel: str | None = None) -> torch.Tensor:
    """`x` [tokens, in] times a weight in panels, [tokens, rows] in its dtype. kernel: another than the fastest."""
    kernel = kernel or float_kernel(x.dtype)
    compiled = _compiled()
    assert compiled is not None and kernel is not None, "nothing was packed for a machine without a kernel"
    assert weight.scale is not None, "a weight without its scales"
    x = x.contiguous()
    y = x.new_empty(x.shape[0], rows)
    groups = weight.scale.shape[1]
    failed = compiled.outlierq_multiply_panels(
        FLOAT_KERNELS[kernel],
        weight.words.data_ptr(),
        *_codes(weight),
        rows,
        x.shape[1],
        groups,
        weight.words.shape[1] // CODES[weight.kind].words // groups,
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.shape[0],
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return _unless(failed, y)


def _codes(weight: Packed) -> tuple[int | None, ...]:
    """What codes mean, as the functions in C take it."""
    kind = 0 if weight.scale is None else SCALES[weight.scale.dtype]
    places = [None if part is None else part.data_ptr() for part in (weight.scale, weight.divisor, weight.offset)]
    return CODES[weight.kind].number, places[0], kind, *places[1:]


def multiply_int8(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    token_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    kernel: str | None = None,
) -> torch.Tensor:
    """int8 `x` [tokens, in] times int8 codes, exact sums times `scale` [out] and `token_scale` [tokens, 1], in `dtype`.

    words: of `pack_int8`.
    """
    kernel = kernel or int8_kernel()
    compiled = _compiled()
    assert compiled is not None and kernel is not None, "nothing was packed for a machine without a kernel"
    x = x.contiguous()
    y = torch.empty(x.shape[0], scale.shape[0], dtype=dtype)
    failed = compiled.outlierq_multiply_int8(
        INT8_KERNELS[kernel],
        words.data_ptr(),
        scale.data_ptr(),
        scale.shape[0],
        x.shape[1],
        x.data_ptr(),
        None if token_scale is None else token_scale.data_ptr(),
        x.shape[0],
        y.data_ptr(),
        native.DTYPES[dtype],
        torch.get_num_threads(),
    )
    return _unless(failed, y)


def decode(weight: Packed, out: torch.Tensor) -> torch.Tensor:
    """Whole panels into `out` [panels * 16, in]: code * scale + offset, or the codes without a scale."""
    compiled = _compiled()
    assert compiled is not None, "nothing was packed without compiled code"
    groups = 1 if weight.scale is None else weight.scale.shape[1]
    sizes = (len(weight.words), out.shape[1], groups, native.DTYPES[out.dtype])
    row = torch.empty(out.shape[1], dtype=torch.int8)
    held = (weight.words.data_ptr(), weight.words[0].numel(), *_codes(weight))
    compiled.outlierq_decode_panels(*held, *sizes, row.data_ptr(), out.data_ptr())
    return out


def _unless(failed: int, y: torch.Tensor) -> torch.Tensor:
    """What was computed; MemoryError where there was no room for it."""
    if failed:
        raise MemoryError(f"there is no memory to arrange the inputs of a product of {tuple(y.shape)}")
    return y


@cache
def _runs(number: int, name: str) -> bool:
    """Whether this machine runs a kernel, and it gives what torch gives."""
    compiled = _compiled()
    if compiled is None or not compiled.outlierq_runs_kernel(number):
        return False
    right = _int8_is_right(name) if number in INT8_KERNELS.values() else _float_is_right(name)
    if not right:
        note(f"the compiled product for {name} is not used: it differs from torch's on a small case")
    return right


def _float_is_right(name: str) -> bool:
    """Two groups, rows that fill no panel, few and many tokens; dyadic numbers, so that all sums are exact."""
    generator = torch.Generator().manual_seed(0)
    for kind, code in CODES.items():
        codes = torch.arange(20 * 96).view(20, 96) * 7 % (1 << code.bits)  # every code there is
        numbers = code.values[codes].clamp(-448, 448) if code.exponent else (codes - (1 << code.bits - 1)).float()
        if code.paired:
            numbers = outlier_victim.nearest_pairs(numbers * torch.tensor([1.0, 13.0, -13.0, 2.0]).repeat(24))
        scale, offset = (torch.randint(1, 5, (20, 2), generator=generator) / 4 for _ in range(2))
        offset = offset * (not code.exponent)
        words = pack_panels(numbers.to(torch.float8_e4m3fn if code.exponent else torch.int8), kind)
        weight = Packed(words, by_panel(scale), None if code.exponent else by_panel(offset), kind)
        dense = (numbers.view(20, 2, 48) * scale[..., None] + offset[..., None]).view(20, 96)
        for tokens in (1, 3, 96):
            x = torch.randint(-3, 4, (tokens, 96), generator=generator).bfloat16()
            if code.exponent:  # one number each: sums of floats are exact only alone
                x *= torch.eye(96, dtype=x.dtype)[:tokens]
            if not torch.equal(multiply(x, weight, 20, name), F.linear(x.float(), dense).bfloat16()):
                return False
    return True


def _int8_is_right(name: str) -> bool:
    """All values there are, at their extremes too."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (20, 48), dtype=torch.int8, generator=generator)
    codes[0], codes[1] = -128, 127
    for tokens in (1, 3, 30):
        x = torch.randint(-128, 128, (tokens, 48), dtype=torch.int8, generator=generator)
        x[0] = -128
        y = multiply_int8(x, pack_int8(codes), torch.ones(20), None, torch.float32, name)
        if not torch.equal(y.long(), x.long() @ codes.long().T):
            return False
    return True
