"""What is launched: which instance of which kernel, on how many blocks, with which arguments. Pure, no GPU needed.

Every `plan_*` checks its tensors and gives a `Launch`; `launch.py` hands it to CUDA, the tests to a CPU that plays one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from outlierq.kernels.layout import DTYPES, TILE_INPUTS, TILE_OUTPUTS, KernelError, PackedWeight
from outlierq.ops.twins.kv_quant import GROUP_SIZES
from outlierq.ops.twins.quant_rows import SplitOperands

Cached: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes, scale, minimum

NAMES = {torch.float16: "Half", torch.bfloat16: "Bfloat"}
CODES = ("4", "8", "E2M1", "E4M3", "PAIRS")  # of packed.cuh: integers, floats, outlier-victim pairs
KINDS = ("int", "float", "outlier-victim")
GEMV_ROWS = 8
GEMM_OUTPUTS, GEMM_STAGES = 128, 4  # of a block of w4a16_gemm
W8A8_OUTPUTS, W8A8_SLAB, W8A8_STAGES = 128, 128, 3  # outputs of a block of w8a8_outlier, bytes of a row in a slab
LARGEST_HADAMARD = 57_344  # numbers whose float32 values fit the shared memory of an H100 (224 of 227 KB)
LARGEST_ROW = 49_152  # inputs whose 16-bit values fit the shared memory (96 KB) of every GPU since sm_86
ONE_GROUP = 30  # a shift that maps every input to group 0


@dataclass(frozen=True)
class Launch:
    """source: name of the .cu file. instance: a name expression in it. arguments: tensors, None, np.int32, np.float32.

    shared_bytes: dynamic shared memory of a block.
    """

    source: str
    instance: str
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[Any, ...]
    shared_bytes: int = 0


def shapes(**tensors: torch.Tensor | None) -> str:
    """The tensors of a message: name, dtype and shape of each."""
    present = {name: t for name, t in tensors.items() if t is not None}
    return ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in present.items())


def check(fits: bool, what: str, **tensors: torch.Tensor | None) -> None:
    """Raise a KernelError that says what is wanted, and what came."""
    if not fits:
        raise KernelError(f"{what}; got {shapes(**tensors)}")


def check_memory(**tensors: torch.Tensor | None) -> None:
    """All on one device, contiguous, on 16-byte boundaries; only the rows of `x` may lie apart, each on a boundary."""
    present = {name: t for name, t in tensors.items() if t is not None}
    devices = {name: str(t.device) for name, t in present.items()}
    if len(set(devices.values())) > 1:
        raise KernelError(f"tensors lie on different devices: {devices}; got {shapes(**present)}")
    for name, t in present.items():
        if t.numel() == 0:
            continue
        steps = [step for step, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1 and name == "x"]
        aligned = t.data_ptr() % 16 == 0 and all(step * t.element_size() % 16 == 0 for step in steps)
        if not aligned or (t.stride(-1) != 1 and t.shape[-1] > 1):
            raise KernelError(
                f"{name} must have contiguous rows that start at multiples of 16 bytes; it has shape {tuple(t.shape)}, "
                f"strides {t.stride()}, address % 16 = {t.data_ptr() % 16}"
            )
        if name != "x" and not t.is_contiguous():
            raise KernelError(f"{name} must be contiguous; it has shape {tuple(t.shape)}, strides {t.stride()}")


def check_weight(weight: PackedWeight) -> None:
    """The parts of a packed weight fit each other."""
    rows, columns = weight.shape
    parts = {"words": weight.words, "scale": weight.scale, "zero_point": weight.zero_point, "factor": weight.factor}
    groups = columns // weight.group_size if weight.group_size else 1
    words = (-(-rows // TILE_OUTPUTS), -(-columns // TILE_INPUTS), 32 * weight.bits)
    check(weight.words.dtype == torch.int32 and tuple(weight.words.shape) == words, f"words must be {words}", **parts)
    fits = weight.dtype in DTYPES and tuple(weight.scale.shape) == (groups, rows)
    check(fits, f"scale must be 16-bit [{groups}, {rows}]", **parts)
    zero = weight.zero_point
    fits = zero is None or (zero.dtype == weight.dtype and zero.shape == weight.scale.shape)
    check(fits, "zero_point must be like scale", **parts)
    fits = weight.factor is None or (weight.factor.dtype == torch.float32 and weight.factor.numel() == 1)
    check(fits, "factor must be one float32", **parts)
    check_memory(**parts)


def check_matmul(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> None:
    """x [M, in] and bias [out] fit the weight."""
    check_weight(weight)
    rows, columns = weight.shape
    check(x.ndim == 2 and x.shape[1] == columns, f"x must be [tokens, {columns}]", x=x, bias=bias)
    check(x.dtype == weight.dtype, f"x must be {weight.dtype} like the scales", x=x, scale=weight.scale)
    if bias is not None:
        check(
            bias.dtype == x.dtype and tuple(bias.shape) == (rows,), f"bias must be {x.dtype} [{rows}]", x=x, bias=bias
        )
    check_memory(x=x, words=weight.words, scale=weight.scale, zero_point=weight.zero_point, bias=bias)


def group_numbers(weight: PackedWeight) -> tuple[np.int32, np.int32]:
    """(log2 of the group size, number of groups) as the kernels take them."""
    shift = weight.group_size.bit_length() - 1 if weight.group_size else ONE_GROUP
    return np.int32(shift), np.int32(weight.scale.shape[0])


def groups_of_tile(weight: PackedWeight) -> int:
    """Groups in the inputs of a tile: 4, 2 or 1."""
    return TILE_INPUTS // weight.group_size if weight.group_size and weight.group_size < TILE_INPUTS else 1


def code_name(weight: PackedWeight) -> str:
    """What the codes are called in packed.cuh."""
    return CODES[weight.bits // 8 + 2 * KINDS.index(weight.kind)]


def plan_gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, y: torch.Tensor) -> Launch:
    """`w4a16_gemv`: one block for 16 outputs; warps as many as have at least two tiles each.

    x: [tokens, in], 1 to 8 tokens. bias: [out]. y: [tokens, out].
    """
    check_matmul(x, weight, bias)
    check(x.shape[0] <= GEMV_ROWS, f"w4a16_gemv takes 1 to {GEMV_ROWS} tokens", x=x)
    rows, columns = weight.shape
    strips, tiles = weight.words.shape[:2]
    sizes = tuple(np.int32(v) for v in (x.shape[0], rows, columns, x.stride(0)))
    tensors = (weight.words, weight.scale, weight.zero_point, weight.factor, x, bias, y)
    instance = f"w4a16_gemv<{NAMES[x.dtype]}, {code_name(weight)}, {groups_of_tile(weight)}>"
    warps = min(8, max(1, tiles // 2))
    return Launch("w4a16_gemv", instance, (strips, 1, 1), 32 * warps, (*tensors, *sizes, *group_numbers(weight)))


def gemm_tokens(tokens: int) -> int:
    """Tokens of a block: 16, 32 or 64."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def gemm_parts(tokens: int, weight: PackedWeight, processors: int) -> int:
    """Over how many blocks the inputs are split: about two blocks a multiprocessor, at least four tiles each."""
    tiles = weight.words.shape[1]
    blocks = -(-weight.out_features // GEMM_OUTPUTS) * -(-tokens // gemm_tokens(tokens))
    parts = max(1, min(2 * processors // max(blocks, 1), tiles // 4, 16))
    return -(-tiles // -(-tiles // parts))


def gemm_workspace(tokens: int, weight: PackedWeight, parts: int) -> tuple[int, int]:
    """(float32 partial sums, counters) that `plan_gemm` needs for a split; (0, 0) without one."""
    if parts == 1:
        return 0, 0
    blocks = -(-weight.out_features // GEMM_OUTPUTS) * -(-tokens // gemm_tokens(tokens))
    return blocks * parts * gemm_tokens(tokens) * GEMM_OUTPUTS, blocks


def plan_gemm(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    partial: torch.Tensor | None,
    finished: torch.Tensor | None,
    parts: int,
) -> Launch:
    """`w4a16_gemm`. partial, finished (zeros, int32): as large as `gemm_workspace` says; parts: `gemm_parts`.

    x: [tokens, in]. bias: [out]. y: [tokens, out].
    """
    check_matmul(x, weight, bias)
    rows, columns = weight.shape
    tokens, block = x.shape[0], gemm_tokens(x.shape[0])
    for space, count in zip((partial, finished), gemm_workspace(tokens, weight, parts), strict=True):
        check((0 if space is None else space.numel()) == count, f"a workspace of {count} is needed", space=space)
    check_memory(x=x, y=y, partial=partial, finished=finished)
    sizes = tuple(np.int32(v) for v in (tokens, rows, columns, x.stride(0)))
    tensors = (weight.words, weight.scale, weight.zero_point, weight.factor, x, bias, y, partial, finished)
    instance = f"w4a16_gemm<{NAMES[x.dtype]}, {code_name(weight)}, {block // 16}>"
    grid = (-(-rows // GEMM_OUTPUTS), -(-tokens // block), parts)
    stage = 2 * block * TILE_INPUTS + GEMM_OUTPUTS * TILE_INPUTS * weight.bits // 8 + 8 * GEMM_OUTPUTS
    return Launch("w4a16_gemm", instance, grid, 128, (*tensors, *sizes, *group_numbers(weight)), GEMM_STAGES * stage)


def plan_dequant(weight: PackedWeight, dense: torch.Tensor) -> Launch:
    """`dequant`: one warp for a tile, four warps a block. dense: [out, in]."""
    check_weight(weight)
    rows, columns = weight.shape
    fits = tuple(dense.shape) == weight.shape and dense.dtype == weight.dtype
    check(fits, f"the result must be {weight.dtype} {weight.shape}", dense=dense)
    check_memory(words=weight.words, dense=dense)
    strips, tiles = weight.words.shape[:2]
    instance = f"dequant<{NAMES[weight.dtype]}, {code_name(weight)}>"
    tensors = (weight.words, weight.scale, weight.zero_point, weight.factor, dense)
    sizes = (np.int32(rows), np.int32(columns), *group_numbers(weight))
    return Launch("dequant", instance, (-(-strips * tiles // 4), 1, 1), 128, (*tensors, *sizes))


def plan_quant_rows(
    x: torch.Tensor, columns: torch.Tensor | None, codes: torch.Tensor, scale: torch.Tensor, outliers: torch.Tensor
) -> Launch:
    """`quant_rows`: one block a token, which lies in shared memory. Columns out of range count as 0.

    x, codes: [tokens, in]. columns: int32 [k]. scale: float32 [tokens]. outliers: [tokens, k or more].
    """
    check(x.ndim == 2 and x.dtype in DTYPES, "x must be 16-bit floats [tokens, in]", x=x)
    tokens, width = x.shape
    check(width % 16 == 0 and width <= LARGEST_ROW, f"x must have a multiple of 16 inputs, at most {LARGEST_ROW}", x=x)
    fits = columns is None or (columns.dtype == torch.int32 and columns.ndim == 1)
    check(fits, "outlier columns must be int32 [k]", x=x, columns=columns)
    count = 0 if columns is None else columns.numel()
    fits = outliers.dtype == x.dtype and outliers.shape[0] == tokens and outliers.shape[1] >= count
    check(fits, "outliers must be [tokens, k or more] like x", x=x, columns=columns, outliers=outliers)
    fits = codes.shape == x.shape and codes.dtype == torch.int8 and tuple(scale.shape) == (tokens,)
    check(
        fits and scale.dtype == torch.float32, "codes must be int8 like x, scale float32", x=x, codes=codes, scale=scale
    )
    check_memory(x=x, columns=columns, codes=codes, scale=scale, outliers=outliers)
    sizes = tuple(np.int32(v) for v in (width, x.stride(0), count, outliers.shape[1]))
    arguments = (x, columns, codes, scale, outliers, *sizes)
    return Launch("quant_rows", f"quant_rows<{NAMES[x.dtype]}>", (tokens, 1, 1), 256, arguments, 2 * width)


W8A8_TILES = {16: (1, 1), 32: (1, 2), 64: (1, 4), 128: (2, 4)}  # tokens of a block: (warps, 16-token tiles of each)


def w8a8_tokens(tokens: int) -> int:
    """Tokens of a block: 16, 32, 64 or 128."""
    return next((size for size in W8A8_TILES if tokens <= size), 128)


def w8a8_parts(tokens: int, outputs: int, inputs: int, processors: int) -> int:
    """Over how many blocks the inputs are split: one block a multiprocessor, at least four slabs each."""
    slabs = -(-inputs // W8A8_SLAB)
    blocks = -(-outputs // W8A8_OUTPUTS) * -(-tokens // w8a8_tokens(tokens))
    parts = max(1, min(processors // max(blocks, 1), slabs // 4, 16))
    return -(-slabs // -(-slabs // parts))


def w8a8_workspace(tokens: int, outputs: int, parts: int) -> tuple[int, int]:
    """(int32 partial sums, counters) that `plan_w8a8` needs for a split; (0, 0) without one."""
    if parts == 1:
        return 0, 0
    blocks = -(-outputs // W8A8_OUTPUTS) * -(-tokens // w8a8_tokens(tokens))
    return blocks * parts * w8a8_tokens(tokens) * W8A8_OUTPUTS, blocks


def check_w8a8(given: SplitOperands, y: torch.Tensor) -> None:
    """Shapes, dtypes and memory of an int8 product; y: [tokens, out]."""
    x, scale_x, codes, scale, bias = given.x, given.scale_x, given.codes, given.scale, given.bias
    outliers, outlier_weight = given.outliers, given.outlier_weight
    both = {"x": x, "codes": codes}
    check(
        x.dtype == codes.dtype == torch.int8 and x.ndim == codes.ndim == 2, "x and codes must be int8 matrices", **both
    )
    (tokens, inputs), (outputs, width) = x.shape, codes.shape
    check(inputs == width, "x and codes must have the same inputs", **both)
    check(outputs % 8 == 0 and inputs % 16 == 0, "codes must have out % 8 = 0 and in % 16 = 0", **both)
    fits = scale_x.dtype == scale.dtype == torch.float32 and scale.numel() == outputs and scale_x.numel() in (1, tokens)
    check(fits, f"scales must be float32: {tokens} or 1, and {outputs}", scale_x=scale_x, scale=scale)
    split = {"outliers": outliers, "outlier_weight": outlier_weight}
    check((outliers is None) == (outlier_weight is None), "outliers need their weight", **split)
    if outliers is not None and outlier_weight is not None:
        shared = outliers.shape[-1]
        fits = tuple(outliers.shape) == (tokens, shared) and tuple(outlier_weight.shape) == (outputs, shared)
        check(fits and shared % 8 == 0, f"outliers must be [{tokens}, 8 n], their weight [{outputs}, 8 n]", **split)
    results = {**split, "bias": bias, "y": y}
    fits = y.dtype in DTYPES and all(t is None or t.dtype == y.dtype for t in results.values())
    check(fits, "outliers, their weight, bias and y must have one 16-bit dtype", **results)
    check(bias is None or tuple(bias.shape) == (outputs,), f"bias must be [{outputs}]", bias=bias)
    check(x.is_contiguous(), "x must be contiguous", x=x)
    check_memory(**both, scale_x=scale_x, scale=scale, **results)


def plan_w8a8(
    given: SplitOperands,
    y: torch.Tensor,
    partial: torch.Tensor | None,
    finished: torch.Tensor | None,
    parts: int,
) -> Launch:
    """`w8a8_outlier`. partial (int32), finished (zeros, int32): `w8a8_workspace`; parts: `w8a8_parts`.

    Of outlier columns there are 8 n, those without use filled with zeros. y: [tokens, out].
    """
    check_w8a8(given, y)
    x, scale_x, codes, outliers = given.x, given.scale_x, given.codes, given.outliers
    (tokens, inputs), outputs = x.shape, codes.shape[0]
    for space, count in zip((partial, finished), w8a8_workspace(tokens, outputs, parts), strict=True):
        check((0 if space is None else space.numel()) == count, f"a workspace of {count} is needed", space=space)
    check_memory(x=x, partial=partial, finished=finished)
    block = w8a8_tokens(tokens)
    warps, tiles = W8A8_TILES[block]
    outlier_bytes = 0 if outliers is None else 2 * outliers.shape[1]
    sizes = tuple(np.int32(v) for v in (tokens, outputs, inputs, outlier_bytes, int(scale_x.numel() > 1)))
    weights = (codes, scale_x, given.scale, outliers, given.outlier_weight, given.bias)
    tensors = (x, *weights, y, partial, finished)
    grid = (-(-outputs // W8A8_OUTPUTS), -(-tokens // block), parts)
    shared = W8A8_STAGES * (block + W8A8_OUTPUTS) * W8A8_SLAB
    instance = f"w8a8_outlier<{NAMES[y.dtype]}, {warps}, {tiles}>"
    return Launch("w8a8_outlier", instance, grid, 128 * warps, (*tensors, *sizes), shared)


def check_kv(x: torch.Tensor, cached: Cached, bits: int, per: str, group_size: int) -> None:
    """A cache of [rows, width] with its codes, scales and minima."""
    codes, scale, minimum = cached
    check(
        bits in (4, 8) and per in ("token", "channel"),
        f"a cache has 4 or 8 bits per token or channel: {bits} {per}",
        x=x,
    )
    check(x.ndim == 2 and x.dtype in DTYPES and x.is_contiguous(), "x must be contiguous 16-bit [rows, width]", x=x)
    rows, width = x.shape
    along = width if per == "token" else rows
    fits = group_size in GROUP_SIZES and along % group_size == 0 and width % 8 == 0
    check(fits, f"groups of {group_size} per {per} need a multiple of it, and width % 8 = 0", x=x)
    shape = (rows, width // group_size) if per == "token" else (rows // group_size, width)
    parts = {"codes": codes, "scale": scale, "minimum": minimum}
    fits = codes.dtype == torch.uint8 and tuple(codes.shape) == (rows, width * bits // 8)
    check(fits, f"codes must be uint8 [{rows}, {width * bits // 8}]", x=x, **parts)
    fits = scale.dtype == minimum.dtype == x.dtype and tuple(scale.shape) == tuple(minimum.shape) == shape
    check(fits, f"scale and minimum must be like x, {shape}", x=x, **parts)
    check_memory(x=x, **parts)


def plan_kv(kernel: str, x: torch.Tensor, cached: Cached, *, bits: int, per: str, group_size: int) -> Launch:
    """`kv_quant` (x [rows, width] to its codes, scales and minima) or `kv_dequant` (these to x)."""
    check_kv(x, cached, bits, per, group_size)
    channel = per == "channel"
    each = 2 * group_size if channel and kernel == "kv_quant" else 8
    tensors = (x, *cached) if kernel == "kv_quant" else (*cached, x)
    sizes = (np.int64(x.numel()), np.int32(x.shape[1]), np.int32(group_size))
    instance = f"{kernel}<{NAMES[x.dtype]}, {bits}, {int(channel)}>"
    return Launch("kv", instance, (-(-x.numel() // (each * 128)), 1, 1), 128, (*tensors, *sizes))


def plan_fwht(x: torch.Tensor, core: torch.Tensor | None, y: torch.Tensor) -> Launch:
    """`fwht`: one block a row. core: int8 [order, order] of +-1, None for order 1; n / order must be a power of two."""
    check(
        x.ndim == 2 and x.dtype in DTYPES and y.dtype == x.dtype and y.shape == x.shape,
        "x, y: 16-bit [rows, n]",
        x=x,
        y=y,
    )
    rows, n = x.shape
    order = 1 if core is None else core.shape[0]
    size = n // order
    check(n % 8 == 0 and n <= LARGEST_HADAMARD, f"n must be a multiple of 8, at most {LARGEST_HADAMARD}", x=x)
    check(size * order == n and size & (size - 1) == 0, f"{n} is not {order} times a power of two", x=x, core=core)
    fits = core is None or (core.dtype == torch.int8 and tuple(core.shape) == (order, order))
    check(fits, "core must be int8 [order, order]", core=core)
    check_memory(x=x, core=core, y=y)
    numbers = (np.int32(n), np.int32(order), np.int32(x.stride(0)), np.float32(n**-0.5))
    return Launch("fwht", f"fwht<{NAMES[x.dtype]}>", (rows, 1, 1), 256, (x, core, y, *numbers), 4 * n)


def plan_selftest(words: torch.Tensor, results: torch.Tensor, dtype: torch.dtype) -> Launch:
    """`selftest`: one warp, int32 [32, 16] to [32, 32]."""
    check(tuple(words.shape) == (32, 16) and tuple(results.shape) == (32, 32), "[32, 16] to [32, 32]", words=words)
    check_memory(words=words, results=results)
    return Launch("selftest", f"selftest<{NAMES[dtype]}>", (1, 1, 1), 32, (words, results))


def check_columns(columns: torch.Tensor, width: int) -> None:
    """Outlier columns [k] are different, ascending and in range. Reads them, so it belongs where a layer is made."""
    listed = columns.tolist()
    if listed != sorted(set(listed)) or (listed and not 0 <= listed[0] <= listed[-1] < width):
        raise KernelError(f"outlier columns must ascend within 0 .. {width - 1}; got {listed[:8]} .. {listed[-1:]}")


def both_types(kernel: str, *parameters: str) -> list[str]:
    """Name expressions of a kernel for both 16-bit types and each of the further template parameters."""
    return [f"{kernel}<{', '.join(filter(None, (t, p)))}>" for t in ("Half", "Bfloat") for p in parameters or ("",)]


# Every instance that a plan can ask for, by source.
INSTANCES: dict[str, list[str]] = {
    "w4a16_gemv": both_types("w4a16_gemv", *(f"{code}, {parts}" for code in CODES for parts in (1, 2)), "E2M1, 4"),
    "dequant": both_types("dequant", *CODES),
    "w4a16_gemm": both_types("w4a16_gemm", *(f"{code}, {m}" for code in CODES for m in (1, 2, 4))),
    "quant_rows": both_types("quant_rows"),
    "kv": [
        name for kernel in ("kv_quant", "kv_dequant") for name in both_types(kernel, "4, 0", "4, 1", "8, 0", "8, 1")
    ],
    "fwht": both_types("fwht"),
    "selftest": both_types("selftest"),
    "w8a8_outlier": both_types("w8a8_outlier", *(f"{w}, {m}" for w, m in W8A8_TILES.values())),
}

# Most registers of a thread, over all architectures: more would leave too few warps on a multiprocessor.
REGISTERS = {
    "w4a16_gemv": 128,
    "dequant": 64,
    "w4a16_gemm": 168,
    "quant_rows": 64,
    "w8a8_outlier": 208,
    "kv": 64,
    "fwht": 64,
    "selftest": 96,
}
