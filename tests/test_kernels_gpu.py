"""The kernels on a real GPU: `make test-gpu`. What the CPU emulation cannot show is shown here.

Wrappers bit for bit against the emulation first: if those differ, nothing else means anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import shim
import torch
from shim.wrappers import emulated, wrapper_inputs

from outlierq.kernels import launch, layout, plan
from outlierq.ops.hadamard import hadamard_transform
from outlierq.ops.twins.kv_quant import kv_dequant, kv_quant
from outlierq.ops.twins.packed_matmul import dequantize
from outlierq.ops.twins.quant_rows import SplitOperands, outlier_matmul, quant_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.unavailable() is not None, reason=launch.unavailable() or ""),
    # A kernel that falls back to its twin would pass every comparison.
    pytest.mark.filterwarnings("error:.*cannot be used on CUDA device"),
]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
# Small enough for compute-sanitizer, and ragged; then layers of an 8B model.
SMALL = [(1, 24, 96, 32), (3, 40, 1152, 128), (17, 136, 320, 64), (70, 152, 1152, None)]
LARGE = [(1, 4096, 4096, 128), (16, 14336, 4096, 128), (128, 4096, 14336, 64), (8, 6144, 4096, 32)]
SHAPES = [pytest.param(*s, id=f"small-{i}") for i, s in enumerate(SMALL)]
SHAPES += [pytest.param(*s, id=f"large-{i}") for i, s in enumerate(LARGE)]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    ratio = float((got.double() - expected).norm() / expected.norm())
    return ratio if ratio == ratio else float("inf")


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(sum(shape)), device="cuda").to(dtype)


def packed(rows: int, columns: int, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype):
    """A packed weight on the GPU, and the parts that it was made from."""
    low, groups = (-(1 << (bits - 1)) if symmetric else 0), columns // group if group else 1
    codes = torch.randint(low, low + (1 << bits), (rows, columns), device="cuda")
    scale = (torch.rand(rows, groups, device="cuda") * 0.02 + 0.01).to(dtype)
    zero = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), device="cuda")
    return layout.pack(codes, scale, zero, bits=bits, group_size=group, dtype=dtype), (codes, scale, zero)


def exact(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """The weight in float64 without any rounding."""
    width = codes.shape[1] // scale.shape[1]
    centred = codes if zero is None else codes - zero.repeat_interleave(width, 1)
    return centred.double() * scale.double().repeat_interleave(width, 1)


@pytest.mark.skipif(shim.missing() is not None, reason=shim.missing() or "")
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_wrappers_give_the_bits_of_the_emulation(dtype):
    words = wrapper_inputs(dtype)
    results = torch.zeros(32, 32, dtype=torch.int32, device="cuda")
    assert launch.start(plan.plan_selftest(words.cuda(), results, dtype))
    different = (results.cpu() != emulated(words, dtype)).any(0).nonzero().flatten().tolist()
    assert different == [], f"words {different} of selftest differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tokens", "rows", "columns", "group"), SHAPES)
def test_packed_products_agree_with_float64(tokens, rows, columns, group, bits, symmetric, dtype):
    weight, parts = packed(rows, columns, bits, group, symmetric, dtype)
    x, bias = random(tokens, columns, dtype=dtype), random(rows, dtype=dtype)
    expected = x.double() @ exact(*parts).T + bias.double()
    if tokens <= plan.GEMV_ROWS:
        assert error(launch.w4a16_gemv(x, weight, bias), expected) < TOLERANCE[dtype]
    assert error(launch.w4a16_gemm(x, weight, bias), expected) < TOLERANCE[dtype]
    assert torch.equal(launch.dequant(weight), dequantize(*parts, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "outputs", "inputs", "group"), SHAPES)
def test_int8_products_with_outliers_agree_with_float64(tokens, outputs, inputs, group, dtype):
    x = random(tokens, inputs, dtype=dtype)
    columns = torch.arange(1, inputs, max(inputs // 20, 1), dtype=torch.int32, device="cuda")
    x[:, columns.long()] *= 50
    pitch = -(-columns.numel() // 16) * 16
    low, scale_x, outliers = launch.quant_rows(x, columns, pitch)
    # The twin runs on the CPU: on a GPU torch divides by a number by multiplying with its inverse.
    for got, expected in zip((low, scale_x, outliers), quant_rows(x.cpu(), columns.cpu(), pitch), strict=True):
        assert torch.equal(got.cpu(), expected)
    codes = torch.randint(-127, 128, (outputs, inputs), device="cuda", dtype=torch.int8)
    scale, kept = torch.rand(outputs, device="cuda") * 0.01 + 0.001, random(outputs, pitch, dtype=dtype)
    expected = (low.double() @ codes.double().T) * scale_x.double()[:, None] * scale.double()
    plain = SplitOperands(low, scale_x, codes, scale)
    without = launch.w8a8_outlier(plain, dtype=dtype)
    assert torch.equal(without, outlier_matmul(plain, dtype=dtype)), "int32 sums are exact"
    y = launch.w8a8_outlier(SplitOperands(low, scale_x, codes, scale, outliers, kept), dtype=dtype)
    assert error(y, expected + outliers.double() @ kept.double().T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("per", ["token", "channel"])
def test_small_cache_kernels_give_the_bits_of_their_twins(per, bits, dtype):
    x = random(256, 128, dtype=dtype)
    got = launch.kv_quant(x, bits=bits, per=per, group_size=64)
    expected = kv_quant(x.cpu(), bits=bits, per=per, group_size=64)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(launch.kv_dequant(*got, bits=bits, per=per), kv_dequant(*got, bits=bits, per=per))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 768, 4096, 14336])
def test_small_transforms_agree_with_float64(n, dtype):
    x = random(5, n, dtype=dtype)
    for transpose in (False, True):
        expected = hadamard_transform(x.double(), transpose=transpose)
        assert error(launch.fwht(x, transpose=transpose), expected) < TOLERANCE[dtype]


def test_nothing_waits_for_the_device_and_a_graph_can_be_replayed_on_new_inputs():
    dtype = torch.bfloat16
    weight, parts = packed(512, 4096, 4, 128, True, dtype)
    x = random(16, 4096, dtype=dtype)
    codes = torch.randint(-127, 128, (512, 4096), device="cuda", dtype=torch.int8)
    scale = torch.rand(512, device="cuda")

    def work() -> tuple[torch.Tensor, ...]:
        low, scale_x, _ = launch.quant_rows(x)
        cached = launch.kv_quant(x)
        return (
            launch.w4a16_gemv(x[:4], weight), launch.w4a16_gemm(x, weight), launch.dequant(weight),
            launch.w8a8_outlier(SplitOperands(low, scale_x, codes, scale)), launch.kv_dequant(*cached), launch.fwht(x),
        )  # fmt: skip

    work()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for seed in range(3):
        x.copy_(torch.randn(16, 4096, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, work(), strict=True))
    assert error(captured[1], x.double() @ exact(*parts).T) < TOLERANCE[dtype]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing_on_small_shapes(tool):
    if os.environ.get("OUTLIERQ_SANITIZED") or shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer, or already inside it")
    inner = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "small", "-p", "no:cacheprovider", __file__]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *inner]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OUTLIERQ_SANITIZED": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
