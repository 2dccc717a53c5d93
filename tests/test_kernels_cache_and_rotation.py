"""Quantized keys and values, and the Hadamard transform: kernels played on the CPU against their twins and laws."""

from __future__ import annotations

import pytest
import shim
import torch

from outlierq.kernels import plan
from outlierq.ops.hadamard import core_order, hadamard, hadamard_core
from outlierq.ops.twins.kv_quant import kv_dequant, kv_quant

needs_compiler = pytest.mark.skipif(shim.missing() is not None, reason=shim.missing() or "")
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
CACHES = [
    (3, 64, "token", 32),
    (5, 128, "token", 64),
    (2, 256, "token", 256),
    (64, 72, "channel", 32),
    (128, 8, "channel", 128),
]


def nothing(shape, dtype) -> torch.Tensor:
    return shim.guarded(torch.full(tuple(shape), 77 if dtype == torch.uint8 else float("nan"), dtype=dtype))


def keys(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width))
    x[:, 3] += 20
    x[0] = 0.5  # a group without any range
    return shim.guarded(x.to(dtype))


def play_quant(x, bits, per, group, schedule=0, fault="none") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = tuple(nothing(part.shape, part.dtype) for part in kv_quant(x, bits=bits, per=per, group_size=group))
    launch = plan.plan_kv("kv_quant", x, parts, bits=bits, per=per, group_size=group)
    shim.build("kv").run(launch, schedule, fault)
    assert all(shim.untouched(part) for part in parts)
    return parts


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "width", "per", "group"), CACHES)
def test_the_cache_kernels_equal_their_twins_bit_for_bit(rows, width, per, group, bits, dtype):
    x = keys(rows, width, dtype)
    expected = kv_quant(x, bits=bits, per=per, group_size=group)
    back = kv_dequant(*expected, bits=bits, per=per)
    guarded = [shim.guarded(part) for part in expected]
    for schedule in shim.SCHEDULES:
        got = play_quant(x, bits, per, group, schedule)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        restored = nothing(x.shape, dtype)
        launch = plan.plan_kv("kv_dequant", restored, guarded, bits=bits, per=per, group_size=group)
        shim.build("kv").run(launch, schedule)
        assert torch.equal(restored, back) and shim.untouched(restored)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "width", "per", "group"), CACHES)
def test_a_cached_number_comes_back_within_a_step_of_its_group(rows, width, per, group, bits):
    x = keys(rows, width, torch.float16)
    codes, scale, minimum = kv_quant(x, bits=bits, per=per, group_size=group)
    back = kv_dequant(codes, scale, minimum, bits=bits, per=per)
    axis = 1 if per == "token" else 0
    step = scale.double().repeat_interleave(group, axis)
    rounding = x.double().abs().max() * 2**-10  # of the minimum and of the result
    assert ((back.double() - x.double()).abs() <= 0.51 * step * 1.01 + rounding).all()


@needs_compiler
@pytest.mark.parametrize("per", ["token", "channel"])
def test_a_nan_spoils_its_group_and_no_other(per):
    x = keys(32, 64, torch.bfloat16)
    x[3, 5] = float("nan")
    parts = play_quant(x, 4, per, 32)
    wrong = kv_dequant(*parts, bits=4, per=per).isnan()
    expected = torch.zeros_like(wrong)
    if per == "token":
        expected[3, :32] = True
    else:
        expected[:, 5] = True
    assert torch.equal(wrong, expected)


@needs_compiler
def test_shuffles_that_do_nothing_show():
    x = keys(5, 128, torch.float16)
    right = play_quant(x, 4, "token", 64)
    assert not torch.equal(play_quant(x, 4, "token", 64, 0, "skip_shuffle")[1], right[1])


def play_fwht(x: torch.Tensor, *, transpose=False, schedule=0, fault="none", line=0) -> torch.Tensor:
    order = core_order(x.shape[1])
    core = hadamard_core(order).to(torch.int8)
    core = None if order == 1 else shim.guarded((core.T if transpose else core).contiguous())
    y = nothing(x.shape, x.dtype)
    shim.build("fwht").run(plan.plan_fwht(x, core, y), schedule, fault, line)
    assert shim.untouched(y)
    return y


# Powers of two, one below the 8 numbers of a thread; cores of order 12, 20 and 28 with pieces of 2 to 512.
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", [8, 64, 4096, 24, 40, 768, 1792])
def test_the_transform_is_the_product_with_the_hadamard_matrix(n, transpose, dtype):
    x = shim.guarded(torch.randn(3, n, generator=torch.Generator().manual_seed(n)).to(dtype))
    matrix = hadamard(n).double() / n**0.5
    expected = x.double() @ (matrix if transpose else matrix.T)
    results = [play_fwht(x, transpose=transpose, schedule=schedule) for schedule in shim.SCHEDULES]
    assert (results[0].double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_compiler
def test_every_barrier_of_the_transform_is_needed():
    x = shim.guarded(torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).half())
    right, barriers = play_fwht(x), shim.build("fwht").lines("__syncthreads")
    assert len(barriers) == 2
    for line in barriers:
        results = [play_fwht(x, schedule=s, fault="skip_barrier", line=line) for s in shim.SCHEDULES]
        assert any(not torch.equal(result, right) for result in results), line
