"""The kernels as Python functions on torch tensors: check, allocate with torch, launch on torch's current stream.

The only module that imports cupy, and only when a CUDA tensor first arrives. CPU tensors, a machine without CuPy or a
driver, and a kernel that does not compile for a device get the torch twin instead; `unavailable()` says why, and a
compilation failure warns once. Nothing here waits for the device, so calls can be captured in a CUDA graph (after one
call outside of it, which compiles).

    w4a16_gemv(x, weight, bias=None) -> y          1 to 8 tokens; weight: layout.PackedWeight
    w4a16_gemm(x, weight, bias=None) -> y          5 to some 128 tokens
    dequant(weight) -> dense                       [out, in] in the dtype of the scales
    quant_rows(x, columns=None, pitch=None) -> (codes int8, scale float32 [tokens], outliers [tokens, pitch])
    w8a8_outlier(SplitOperands, dtype=bfloat16) -> y
    kv_quant(x, bits=4, per="token", group_size=64) -> (codes uint8, scale, minimum)
    kv_dequant(codes, scale, minimum, bits=4, per="token") -> x
    fwht(x, transpose=False) -> y
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import resources
from types import SimpleNamespace

import numpy as np
import torch

from outlierq.kernels import plan
from outlierq.kernels.layout import KernelError, PackedWeight, unpack
from outlierq.kernels.plan import Launch
from outlierq.ops import hadamard
from outlierq.ops.twins import kv_quant as kv
from outlierq.ops.twins import packed_matmul
from outlierq.ops.twins.quant_rows import SplitOperands, outlier_matmul
from outlierq.ops.twins.quant_rows import quant_rows as reference_quant_rows

OPTIONS = ("--std=c++17",)
SHARED_WITHOUT_ASKING = 48 * 1024  # bytes; a kernel that wants more has to say so once


def w4a16_gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [1 to 8 tokens, in] times a packed weight, [tokens, out]: `ops.packed_matmul.packed_matmul`."""
    plan.check(x.ndim == 2, "x must be a matrix", x=x)
    y = x.new_empty(x.shape[0], weight.out_features)
    launched = start(plan.plan_gemv(x, weight, bias, y))
    return y if launched else packed_matmul.packed_matmul(x, *unpack(weight), bias, weight.factor)


def w4a16_gemm(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [any number of tokens, in] times a packed weight on tensor cores; pays for 5 to some 128 tokens."""
    plan.check(x.ndim == 2, "x must be a matrix", x=x)
    parts = plan.gemm_parts(x.shape[0], weight, processors(x.device))
    sums, counters = plan.gemm_workspace(x.shape[0], weight, parts)
    partial = x.new_empty(sums, dtype=torch.float32) if sums else None
    finished = x.new_zeros(counters, dtype=torch.int32) if counters else None
    y = x.new_empty(x.shape[0], weight.out_features)
    launched = start(plan.plan_gemm(x, weight, bias, y, partial, finished, parts))
    return y if launched else packed_matmul.packed_matmul(x, *unpack(weight), bias, weight.factor)


def dequant(weight: PackedWeight) -> torch.Tensor:
    """The weight as a dense [out, in] matrix in the dtype of its scales: `ops.packed_matmul.dequantize`."""
    dense = weight.scale.new_empty(weight.shape)
    launched = start(plan.plan_dequant(weight, dense))
    return dense if launched else packed_matmul.dequantize(*unpack(weight), dtype=weight.dtype, factor=weight.factor)


def quant_rows(
    x: torch.Tensor, columns: torch.Tensor | None = None, pitch: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, outliers) of `x` [tokens, in]: `ops.quant_rows.quant_rows`.

    columns: int32 on the device of x, checked once with `plan.check_columns`; an index out of range is not found here.
    """
    plan.check(x.ndim == 2, "x must be a matrix", x=x)
    count = 0 if columns is None else columns.numel()
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    outliers = x.new_empty(x.shape[0], count if pitch is None else pitch)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    launched = start(plan.plan_quant_rows(x, columns, codes, scale, outliers))
    return (codes, scale, outliers) if launched else reference_quant_rows(x, columns, pitch)


def w8a8_outlier(given: SplitOperands, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """int8 product with 16-bit outlier columns, [tokens, out] in `dtype`: `ops.twins.quant_rows.outlier_matmul`."""
    x, codes = given.x, given.codes
    plan.check(x.ndim == codes.ndim == 2, "x and codes must be matrices", x=x, codes=codes)
    (tokens, inputs), outputs = x.shape, codes.shape[0]
    parts = plan.w8a8_parts(tokens, outputs, inputs, processors(x.device))
    sums, counters = plan.w8a8_workspace(tokens, outputs, parts)
    partial = x.new_empty(sums, dtype=torch.int32) if sums else None
    finished = x.new_zeros(counters, dtype=torch.int32) if counters else None
    y = x.new_empty(tokens, outputs, dtype=dtype)
    launched = start(plan.plan_w8a8(given, y, partial, finished, parts))
    return y if launched else outlier_matmul(given, dtype=dtype)


def kv_quant(
    x: torch.Tensor, *, bits: int = 4, per: str = "token", group_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, minimum) of keys or values [rows, width]: `ops.kv_quant.kv_quant`."""
    plan.check(x.ndim == 2 and group_size in kv.GROUP_SIZES, f"x must be a matrix, groups {kv.GROUP_SIZES}", x=x)
    rows, width = x.shape
    shape = (rows, width // group_size) if per == "token" else (rows // group_size, width)
    codes = x.new_empty(rows, width * bits // 8, dtype=torch.uint8)
    scale, minimum = x.new_empty(shape), x.new_empty(shape)
    how = {"bits": bits, "per": per, "group_size": group_size}
    launched = start(plan.plan_kv("kv_quant", x, (codes, scale, minimum), **how))
    return (codes, scale, minimum) if launched else kv.kv_quant(x, **how)


def kv_dequant(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, *, bits: int = 4, per: str = "token"
) -> torch.Tensor:
    """Keys or values [rows, width] in the dtype of the scales: `ops.kv_quant.kv_dequant`."""
    fits = codes.ndim == scale.ndim == 2 and bits in (4, 8)
    plan.check(fits, "codes and scale must be matrices, of 4 or 8 bits", codes=codes, scale=scale)
    x = scale.new_empty(codes.shape[0], codes.shape[1] * 8 // bits)
    whole, groups = (x.shape[1], scale.shape[1]) if per == "token" else (x.shape[0], scale.shape[0])
    group_size = whole // max(groups, 1)
    launch = plan.plan_kv("kv_dequant", x, (codes, scale, minimum), bits=bits, per=per, group_size=group_size)
    return x if start(launch) else kv.kv_dequant(codes, scale, minimum, bits=bits, per=per)


def fwht(x: torch.Tensor, *, transpose: bool = False) -> torch.Tensor:
    """Hadamard transform of each row of `x` [rows, n]: `ops.hadamard.hadamard_transform`, sums in float32."""
    plan.check(x.ndim == 2, "x must be a matrix", x=x)
    y = x.new_empty(x.shape)
    if start(plan.plan_fwht(x, _core(x.shape[1], transpose, x.device), y)):
        return y
    return hadamard.hadamard_transform(x.float(), transpose=transpose).to(x.dtype)


@cache
def _core(n: int, transpose: bool, device: torch.device) -> torch.Tensor | None:
    """The core of a Hadamard matrix of order n as the kernel wants it; None when n is a power of two."""
    try:
        order = hadamard.core_order(n)
    except hadamard.NoHadamardError as error:
        raise KernelError(str(error)) from None
    if order == 1:
        return None
    core = hadamard.hadamard_core(order)
    return (core.T if transpose else core).to(device, torch.int8).contiguous()


# ---- the machinery


@cache
def unavailable() -> str | None:
    """Why kernels cannot run in this process, in one line; None when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device: packed weights are multiplied by torch on the CPU"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not usable ({error}): `pip install 'outlierq[cuda]'` brings it; torch is used instead"
    try:
        cupy.cuda.runtime.getDeviceCount()
        cupy.cuda.nvrtc.getVersion()
    except (RuntimeError, OSError) as error:  # those of CUDA and of a missing library are kinds of these
        first = next(iter(str(error).splitlines()), "")
        return f"CuPy cannot use the CUDA driver or its compiler ({first}): torch is used instead"
    return None


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for anything else, where nothing is launched."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def start(launch: Launch) -> bool:
    """Put a launch on the current stream of its tensors' device; False when the twin has to do the work."""
    device = next(a.device for a in launch.arguments if isinstance(a, torch.Tensor))
    if device.type != "cuda" or unavailable() is not None:
        return False
    if 0 in launch.grid:
        return True
    function = _function(launch.source, launch.instance, launch.shared_bytes, device.index)
    if function is None:
        return False
    # The stream is asked for at every launch: under graph capture it is another one.
    stream = SimpleNamespace(ptr=torch.cuda.current_stream(device).cuda_stream)
    arguments = tuple(_argument(a) for a in launch.arguments)
    with torch.cuda.device(device):
        function(launch.grid, (launch.threads, 1, 1), arguments, shared_mem=launch.shared_bytes, stream=stream)
    return True


def _argument(value: torch.Tensor | np.generic | None) -> int | np.generic:
    """A pointer as a Python int (CuPy passes 64 bits); numbers keep the width that their numpy type says."""
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@cache
def _function(source: str, instance: str, shared_bytes: int, device: int):
    """The compiled kernel, or None (and a warning, once) where it does not compile or asks for too much memory."""
    import cupy

    # One module for each instance: compiling takes a fraction of a second, and only what is used is compiled.
    with torch.cuda.device(device):
        try:
            module = cupy.RawModule(code=source_text(source), options=OPTIONS, name_expressions=(instance,))
            function = module.get_function(instance)
            if shared_bytes > SHARED_WITHOUT_ASKING:
                function.max_dynamic_shared_size_bytes = shared_bytes
            return function.kernel
        except (cupy.cuda.compiler.CompileException, cupy.cuda.driver.CUDADriverError) as error:
            first = next(iter(str(error).splitlines()), "")
            warnings.warn(f"{instance} cannot be used on CUDA device {device} ({first}); torch is used", stacklevel=2)
            return None


@cache
def source_text(name: str) -> str:
    """A kernel with its headers pasted in, because CuPy's cache of compiled kernels does not look into includes."""
    folder = resources.files(__package__)
    seen = set()

    def text(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        lines = []
        for line in (folder / file).read_text(encoding="utf-8").splitlines():
            included = line.removeprefix('#include "').removesuffix('"')
            ours = line.startswith('#include "') and (folder / included).is_file()
            lines.append(text(included) if ours else line)
        return "\n".join(lines).replace("#pragma once", "")

    return text(f"{name}.cu")
