"""int8 tokens with 16-bit outlier columns: kernels played on the CPU against their twins, float64 and int64."""

from __future__ import annotations

import pytest
import shim
import torch

from outlierq.kernels import plan
from outlierq.kernels.layout import KernelError
from outlierq.ops.twins.int8_split import split_matmul
from outlierq.ops.twins.quant_rows import SplitOperands, outlier_matmul, quant_rows

needs_compiler = pytest.mark.skipif(shim.missing() is not None, reason=shim.missing() or "")
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)


def tokens_with_outliers(tokens: int, width: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose chosen columns are 50 times as large, and the columns."""
    g = torch.Generator().manual_seed(tokens * 7 + width)
    x = torch.randn(tokens, width, generator=g)
    columns = torch.randperm(width, generator=g)[:count].sort().values
    x[:, columns] *= 50
    return shim.guarded(x.to(dtype)), shim.guarded(columns.int())


def play_quant_rows(x, columns, pitch, schedule=0, fault="none", line=0):
    """(codes, scale, outliers) of the kernel."""
    tokens = x.shape[0]
    codes = shim.guarded(torch.full(x.shape, -128, dtype=torch.int8))
    scale = shim.guarded(torch.full((tokens,), float("nan")))
    outliers = shim.guarded(torch.full((tokens, pitch), float("nan"), dtype=x.dtype))
    launch = plan.plan_quant_rows(x, columns, codes, scale, outliers)
    shim.build("quant_rows").run(launch, schedule, fault, line)
    assert shim.untouched(codes) and shim.untouched(scale) and shim.untouched(outliers)
    return codes, scale, outliers


def same(a: tuple, b: tuple) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "count", "pitch"), [(1, 16, 0, 0), (3, 4096, 20, 32), (5, 2064, 3, 16), (2, 10256, 300, 304)]
)
def test_quant_rows_equals_its_twin_bit_for_bit(tokens, width, count, pitch, dtype):
    x, columns = tokens_with_outliers(tokens, width, count, dtype)
    expected = quant_rows(x, columns, pitch)
    for schedule in shim.SCHEDULES:
        assert same(play_quant_rows(x, columns, pitch, schedule), expected)


def test_the_quantized_rows_are_within_half_a_step_and_the_outliers_are_kept():
    x, columns = tokens_with_outliers(6, 256, 5, torch.bfloat16)
    codes, scale, outliers = quant_rows(x, columns, 16)
    rest = [c for c in range(256) if c not in columns.tolist()]
    distance = (codes.double() * scale.double()[:, None] - x.double())[:, rest].abs()
    assert (distance <= 0.5001 * scale[:, None]).all()
    assert torch.equal(codes.abs().amax(1), torch.full((6,), 127, dtype=torch.int8))
    assert torch.equal(outliers[:, :5], x[:, columns.long()]) and not outliers[:, 5:].any()
    assert not codes[:, columns.long()].any()


@needs_compiler
def test_rows_of_zeros_tiny_values_and_nan_behave_as_in_the_twin():
    x = torch.zeros(5, 64, dtype=torch.bfloat16)
    x[1, 3] = 1e-38
    x[2, 5], x[3, 6] = float("nan"), float("-inf")
    x[4] = torch.linspace(-1, 1, 64)
    x = shim.guarded(x)
    codes, scale, _ = play_quant_rows(x, None, 0)
    twin_codes, twin_scale, _ = quant_rows(x)
    assert torch.equal(scale[[0, 1]], torch.ones(2)) and not codes[:2].any()
    assert scale[2].isnan() and scale[3].isinf() and twin_scale[2].isnan() and twin_scale[3].isinf()
    assert (scale[2:4, None] * codes[2:4].float() * 0).isnan().any(1).all()
    assert torch.equal(codes[[0, 1, 4]], twin_codes[[0, 1, 4]])


def test_outlier_columns_out_of_range_or_twice_are_refused():
    plan.check_columns(torch.tensor([0, 3, 63]), 64)
    plan.check_columns(torch.tensor([], dtype=torch.int32), 64)
    for wrong in ([0, 64], [-1, 3], [3, 3], [5, 4]):
        with pytest.raises(KernelError, match=r"ascend within 0 .. 63"):
            plan.check_columns(torch.tensor(wrong), 64)


def spoiled(run, right, fault: str, line: int = 0) -> bool:
    """Whether a fault shows under at least one schedule."""
    for schedule in shim.SCHEDULES:
        try:
            if not same(run(schedule, fault, line), right):
                return True
        except shim.ShimError:
            return True
    return False


@needs_compiler
def test_every_barrier_of_quant_rows_is_needed():
    x, columns = tokens_with_outliers(3, 10256, 300, torch.float16)

    def run(*way):
        return play_quant_rows(x, columns, 304, *way)

    barriers = shim.build("quant_rows").lines("__syncthreads")
    assert len(barriers) == 3
    for line in barriers:
        assert spoiled(run, run(0), "skip_barrier", line), f"nothing shows that the barrier in line {line} is missing"


def int8_operands(tokens, outputs, inputs, shared, dtype, *, one_scale=False) -> dict:
    """Guarded arguments of an int8 product with `shared` outlier columns, none if 0."""
    g = torch.Generator().manual_seed(tokens + outputs + inputs)

    def random(*shape, kind=dtype):
        return shim.guarded(torch.randn(*shape, generator=g).to(kind))

    def codes(*shape):
        return shim.guarded(torch.randint(-127, 128, shape, generator=g, dtype=torch.int8))

    return {
        "x": codes(tokens, inputs),
        "scale_x": shim.guarded(torch.rand(1 if one_scale else tokens, generator=g) * 0.01 + 0.001),
        "codes": codes(outputs, inputs),
        "scale": shim.guarded(torch.rand(outputs, generator=g) * 0.01 + 0.001),
        "outliers": random(tokens, shared) if shared else None,
        "outlier_weight": random(outputs, shared) if shared else None,
        "bias": random(outputs),
    }


def play_w8a8(operands: dict, dtype, parts=1, schedule=0, fault="none", line=0) -> torch.Tensor:
    """The product by the kernel."""
    tokens, outputs = operands["x"].shape[0], operands["codes"].shape[0]
    y = shim.guarded(torch.full((tokens, outputs), float("nan"), dtype=dtype))
    sums, counters = plan.w8a8_workspace(tokens, outputs, parts)
    partial = shim.guarded(torch.full((sums,), -1, dtype=torch.int32)) if sums else None
    finished = shim.guarded(torch.zeros(counters, dtype=torch.int32)) if counters else None
    launch = plan.plan_w8a8(SplitOperands(**operands), y, partial, finished, parts)
    shim.build("w8a8_outlier").run(launch, schedule, fault, line)
    assert shim.untouched(y)
    return y


def exact_product(x, scale_x, codes, scale, outliers, outlier_weight, bias) -> torch.Tensor:
    """Float64, from the formula."""
    y = (x.double() @ codes.double().T) * scale_x.double()[:, None] * scale.double() + bias.double()
    return y if outliers is None else y + outliers.double() @ outlier_weight.double().T


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    ratio = float((got.double() - expected).norm() / expected.norm())
    return ratio if ratio == ratio else float("inf")


PRODUCTS = [
    # tokens, outputs, inputs, outlier columns, parts, one scale for all tokens
    (1, 8, 16, 0, 1, False),
    (16, 136, 400, 16, 1, False),
    (20, 24, 1040, 24, 2, True),
    (40, 72, 128, 72, 1, False),
    (70, 136, 528, 8, 1, False),
    (3, 40, 1536, 16, 3, False),
]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "outputs", "inputs", "shared", "parts", "one_scale"), PRODUCTS)
def test_w8a8_agrees_with_float64_under_every_schedule(tokens, outputs, inputs, shared, parts, one_scale, dtype):
    operands = int8_operands(tokens, outputs, inputs, shared, dtype, one_scale=one_scale)
    results = [play_w8a8(operands, dtype, parts, schedule) for schedule in shim.SCHEDULES]
    assert error(results[0], exact_product(**operands)) < TOLERANCE[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert error(outlier_matmul(SplitOperands(**operands), dtype=dtype), exact_product(**operands)) < TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize("parts", [1, 2])
def test_int8_sums_are_exact_where_float32_would_lose_bits(parts):
    inputs, outputs = 2**15, 8
    operands = int8_operands(1, outputs, inputs, 0, torch.float16)
    # Half of the products add up to 127 * 127 * 2^14, where neighbours in float32 are 16 apart; the others undo that.
    operands["x"].fill_(127)
    operands["codes"].fill_(127)
    operands["codes"][:, inputs // 2 :] = -127
    operands["codes"][:, 0] -= torch.arange(outputs, dtype=torch.int8)
    operands["scale_x"].fill_(1.0), operands["scale"].fill_(1.0), operands["bias"].zero_()
    y = play_w8a8(operands, torch.float16, parts)
    assert y.flatten().tolist() == [-127.0 * row for row in range(outputs)]


def test_rows_and_product_together_are_the_static_split_of_llm_int8():
    x, columns = tokens_with_outliers(6, 256, 5, torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (24, 256), generator=g, dtype=torch.int8)
    scale, kept = torch.rand(24, generator=g) * 0.01, torch.randn(24, 5, generator=g).bfloat16()
    expected = split_matmul(x, codes, scale[:, None], columns.long(), kept)
    low, scale_x, outliers = quant_rows(x, columns, 16)
    y = outlier_matmul(SplitOperands(low, scale_x, codes, scale, outliers, torch.nn.functional.pad(kept, (0, 11))))
    assert error(y, expected.double()) < 5e-3


@needs_compiler
def test_every_barrier_of_w8a8_is_needed_and_so_is_every_copy_it_waits_for():
    operands = int8_operands(40, 136, 1040, 136, torch.float16)

    def run(*way, parts=1):
        return (play_w8a8(operands, torch.float16, parts, *way),)

    def split(*way):
        return run(*way, parts=2)

    built = shim.build("w8a8_outlier")
    barriers = [line for line in built.lines("__sync") if line not in built.lines("orders memory between blocks")]
    assert len(barriers) == 2
    for line in barriers:
        assert spoiled(split, split(0), "skip_barrier", line), (
            f"nothing shows that the barrier in line {line} is missing"
        )
    assert spoiled(run, run(0), "weak_wait") and spoiled(run, run(0), "swap_b")
