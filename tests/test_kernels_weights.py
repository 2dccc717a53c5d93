"""Packed weights: the layout, its kernels played on the CPU against float64, and the proof that the tests can fail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import shim
import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.kernels import layout, plan
from outlierq.ops.compiled.products import CODES
from outlierq.ops.outlier_victim import nearest_pairs
from outlierq.ops.twins.packed_matmul import dequantize, packed_matmul

needs_compiler = pytest.mark.skipif(shim.missing() is not None, reason=shim.missing() or "")
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(TOLERANCE)
GROUPS = (32, 64, 128, None)


@dataclass(frozen=True)
class Case:
    """A random weight with its parts, inputs for it, and what the product is in float64."""

    weight: layout.PackedWeight
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    x: torch.Tensor
    bias: torch.Tensor | None

    def dense(self) -> torch.Tensor:
        """The weight as its definition says, float64, without any rounding."""
        if self.weight.kind != "int":
            return self.codes
        width = self.codes.shape[1] // self.scale.shape[1]
        zero = 0 if self.zero_point is None else self.zero_point.repeat_interleave(width, 1)
        return (self.codes - zero).double() * self.scale.double().repeat_interleave(width, 1)

    def product(self) -> torch.Tensor:
        """Float64 [tokens, out]."""
        y = self.x.double() @ self.dense().T
        return y if self.bias is None else y + self.bias.double()


def make_case(tokens, rows, columns, *, bits=4, group_size=128, dtype=torch.float16, symmetric=True, bias=True) -> Case:
    """Guarded tensors: what lies beside them is NaN."""
    g = torch.Generator().manual_seed(rows * 31 + columns + bits)
    groups = columns // group_size if group_size else 1
    low = -(1 << (bits - 1)) if symmetric else 0
    codes = torch.randint(low, low + (1 << bits), (rows, columns), generator=g)
    scale = (torch.rand(rows, groups, generator=g) * 0.02 + 0.01).to(dtype)
    zero_point = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=g)
    packed = layout.pack(codes, scale, zero_point, bits=bits, group_size=group_size, dtype=dtype)
    parts = {name: getattr(packed, name) for name in ("words", "scale", "zero_point")}
    parts = {name: None if part is None else shim.guarded(part) for name, part in parts.items()}
    weight = layout.PackedWeight(**parts, bits=bits, group_size=group_size, out_features=rows, in_features=columns)
    x = shim.guarded(torch.randn(tokens, columns, generator=g).to(dtype))
    added = shim.guarded(torch.randn(rows, generator=g).to(dtype)) if bias else None
    return Case(weight, codes, scale, zero_point, x, added)


FLOATS = {
    "nvfp4": QuantScheme(4, 16, kind="float", scales="two-level"),
    "mxfp4": QuantScheme(4, 32, kind="float", scales="power-of-two"),
    "mxfp8": QuantScheme(8, 32, kind="float", scales="power-of-two"),
    "fp8": QuantScheme(8, None, kind="float"),
    "fp8-block": QuantScheme(8, None, kind="float", block=(128, 128)),
}


PAIRS = {f"pairs of {size}": QuantScheme(4, size, kind="outlier-victim") for size in (None, 32, 128)}
OTHERS = [*FLOATS, *PAIRS]


def paired_weight(name: str, rows: int, columns: int) -> QuantTensor:
    """Pairs of all kinds there are, an outlier on either side."""
    scheme, g = PAIRS[name], torch.Generator().manual_seed(rows + columns)
    codes = nearest_pairs(8 * torch.randn(rows, columns, generator=g)).to(torch.int8)
    scale = torch.rand(scheme.scale_shape(rows, columns), generator=g).mul_(0.02).add_(0.01)
    return QuantTensor(codes, scale, None, scheme)


def float_weight(name: str, rows: int, columns: int) -> QuantTensor:
    """All codes there are but NaN, with scales of any size that the kernels hold in both dtypes."""
    if name in PAIRS:
        return paired_weight(name, rows, columns)
    scheme, g = FLOATS[name], torch.Generator().manual_seed(rows + columns)
    values = CODES["e2m1" if scheme.bits == 4 else "e4m3"].values
    codes = values[torch.arange(rows * columns).view(rows, columns) * 7 % len(values)].clamp(-448, 448)
    shape, whole = scheme.scale_shape(rows, columns), None
    if scheme.scales == "power-of-two":
        scale = torch.randint(110, 118, shape, generator=g).to(torch.uint8)
    else:
        scale = torch.rand(shape, generator=g) + 0.5
    if scheme.scales == "two-level":
        scale, whole = (scale * 300).to(torch.float8_e4m3fn), torch.tensor([3000.0])
    return QuantTensor(codes.to(torch.float8_e4m3fn), scale, None, scheme, super_scale=whole)


def make_float_case(name: str, tokens: int, rows: int, columns: int, dtype=torch.bfloat16, bias=True) -> Case:
    """As `make_case`; `codes` is the weight in float64, after the rounding of plain scales."""
    g = torch.Generator().manual_seed(rows * 31 + columns)
    stored = float_weight(name, rows, columns)
    packed = layout.pack_pairs(stored, dtype) if name in PAIRS else layout.pack_floats(stored, dtype)
    parts = {part: getattr(packed, part) for part in ("words", "scale", "factor")}
    guarded = {part: None if held is None else shim.guarded(held) for part, held in parts.items()}
    codes, scale, _ = layout.unpack(packed)
    dense = codes.double() * scale.double().repeat_interleave(columns // scale.shape[1], 1)
    dense = dense if packed.factor is None else dense * packed.factor.double()
    x = shim.guarded(torch.randn(tokens, columns, generator=g).to(dtype))
    added = shim.guarded(torch.randn(rows, generator=g).to(dtype)) if bias else None
    return Case(replace(packed, **guarded), dense, scale, None, x, added)


def empty(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return shim.guarded(torch.full((rows, columns), float("nan"), dtype=dtype))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error; infinite for NaN, which compares false with any bound."""
    ratio = float((got.double() - expected).norm() / expected.norm())
    return ratio if ratio == ratio else float("inf")


def play(kernel, case: Case, schedule: int = 0, fault: str = "none", line: int = 0) -> torch.Tensor:
    """The product by a kernel: `kernel` plans the launch."""
    y = empty(case.x.shape[0], case.weight.out_features, case.x.dtype)
    launch = kernel(case.x, case.weight, case.bias, y)
    shim.build(launch.source).run(launch, schedule, fault, line)
    assert shim.untouched(y)
    return y


def play_dequant(case: Case, schedule: int = 0, fault: str = "none", line: int = 0) -> torch.Tensor:
    dense = empty(*case.weight.shape, case.weight.dtype)
    shim.build("dequant").run(plan.plan_dequant(case.weight, dense), schedule, fault, line)
    assert shim.untouched(dense)
    return dense


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(8, 16, None), (24, 96, 32), (16, 64, 64), (40, 144, None)])
def test_unpacking_gives_back_what_was_packed(rows, columns, group, bits, symmetric):
    case = make_case(1, rows, columns, bits=bits, group_size=group, symmetric=symmetric)
    codes, scale, zero_point = layout.unpack(case.weight)
    assert torch.equal(codes, case.codes.short()) and torch.equal(scale, case.scale)
    assert (zero_point is None) == symmetric
    assert symmetric or torch.equal(zero_point, case.zero_point.short())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_floats_are_the_weight_but_for_rounded_plain_scales(name, dtype):
    stored = float_weight(name, 136, 256)
    case = make_float_case(name, 1, 136, 256, dtype)
    if stored.scheme.scales == "plain":
        scale = stored.scale.to(dtype)
        stored = replace(stored, scale=scale)
    assert torch.allclose(case.dense(), stored.dequantize().double(), rtol=3e-7, atol=0)
    assert case.weight.words.nbytes == 9 * 4 * 128 * stored.scheme.bits


def test_powers_of_two_that_float16_does_not_hold_are_refused_by_name():
    stored = float_weight("mxfp4", 16, 64)
    stored.scale[0, 0] = 20
    with pytest.raises(layout.KernelError, match="mxfp4 scales reach farther than float16"):
        layout.pack_floats(stored, torch.float16)
    layout.pack_floats(stored, torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lane_finds_its_fragment_where_the_layout_says(bits):
    codes = torch.arange(16 * 64).view(16, 64) * 7 % (1 << bits)
    ones = torch.ones(16, 1)
    words = layout.pack(codes, ones, ones * 0, bits=bits).words.view(-1).tolist()
    places = (0, 4, 1, 5)
    for lane in range(32):
        for j in range(2):
            for kk in range(4):
                first = 16 * kk + 2 * (lane % 4)
                wanted = codes[8 * j + lane // 4, [first, first + 1, first + 8, first + 9]].tolist()
                if bits == 4:
                    word = words[4 * lane + 2 * j + kk // 2]
                    got = [word >> 4 * (2 * (kk % 2) + place) & 15 for place in places]
                else:
                    word = words[128 * j + 4 * lane + kk]
                    got = [word >> 8 * place & 255 for place in range(4)]
                assert got == wanted


def test_packing_refuses_what_does_not_fit_and_says_the_numbers():
    codes, scale = torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 1)
    with pytest.raises(layout.KernelError, match="12 x 64"):
        layout.pack(codes[:12], scale[:12])
    with pytest.raises(layout.KernelError, match="16 x 40"):
        layout.pack(codes[:, :40], scale)
    with pytest.raises(layout.KernelError, match="group_size 48"):
        layout.pack(codes, scale, group_size=48)
    with pytest.raises(layout.KernelError, match=r"scale is \(16, 1\).*2 groups"):
        layout.pack(codes, scale, group_size=32)
    with pytest.raises(layout.KernelError, match=r"codes 0 .. 9 do not fit 4 bits from -8"):
        layout.pack(codes + torch.arange(64) % 10, scale)
    with pytest.raises(layout.KernelError, match="not 3"):
        layout.pack(codes, scale, bits=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_the_twin_is_the_product_with_the_dequantized_weight(dtype, symmetric, group):
    case = make_case(3, 24, 256, group_size=group, dtype=dtype, symmetric=symmetric)
    y = packed_matmul(case.x, case.codes, case.scale, case.zero_point, case.bias)
    assert y.dtype == dtype and error(y, case.product()) < TOLERANCE[dtype]


# Ragged in every direction: one token and many, outputs that fill half a strip, inputs that fill a part of a tile.
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "group"),
    [(1, 16, 64, 64), (4, 8, 16, None), (2, 24, 96, 32), (3, 40, 1152, 128), (8, 72, 2064, None), (1, 16, 4096, 32)],
)
def test_gemv_agrees_with_float64_under_every_schedule(tokens, rows, columns, group, symmetric, bits, dtype):
    case = make_case(tokens, rows, columns, bits=bits, group_size=group, dtype=dtype, symmetric=symmetric)
    results = [play(plan.plan_gemv, case, schedule) for schedule in shim.SCHEDULES]
    assert error(results[0], case.product()) < TOLERANCE[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 8, 128), (3, 24, 384), (8, 136, 1152)])
def test_gemv_of_floats_agrees_with_float64_under_every_schedule(tokens, rows, columns, name, dtype):
    case = make_float_case(name, tokens, rows, columns, dtype)
    results = [play(plan.plan_gemv, case, schedule) for schedule in shim.SCHEDULES]
    assert error(results[0], case.product()) < TOLERANCE[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])
    y = packed_matmul(case.x, *layout.unpack(case.weight), case.bias, case.weight.factor)
    assert error(y, case.product()) < TOLERANCE[dtype]


@needs_compiler
def test_gemv_reads_tokens_that_lie_apart_and_needs_no_bias():
    case = make_case(3, 16, 128, bias=False)
    wide = shim.guarded(torch.full((3, 200), float("nan"), dtype=torch.float16))
    wide[:, :128] = case.x
    y = empty(3, 16, torch.float16)
    shim.build("w4a16_gemv").run(plan.plan_gemv(wide[:, :128], case.weight, None, y))
    assert error(y, case.product()) < TOLERANCE[torch.float16]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 64, 64), (8, 16, None), (24, 96, 32), (40, 400, None)])
def test_dequant_gives_the_weight_of_the_twin_bit_for_bit(rows, columns, group, symmetric, bits, dtype):
    case = make_case(1, rows, columns, bits=bits, group_size=group, dtype=dtype, symmetric=symmetric)
    expected = dequantize(case.codes, case.scale, case.zero_point, dtype=dtype)
    for schedule in shim.SCHEDULES:
        assert torch.equal(play_dequant(case, schedule), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OTHERS)
def test_dequant_of_floats_gives_the_weight_of_the_twin_bit_for_bit(name, dtype):
    case = make_float_case(name, 1, 40, 384, dtype)
    expected = dequantize(*layout.unpack(case.weight), dtype=dtype, factor=case.weight.factor)
    for schedule in shim.SCHEDULES:
        assert torch.equal(play_dequant(case, schedule), expected)


def split_gemm(parts: int):
    """The plan of a gemm whose inputs are split over `parts` blocks."""

    def planned(x, weight, bias, y):
        sums, counters = plan.gemm_workspace(x.shape[0], weight, parts)
        partial = shim.guarded(torch.full((sums,), float("nan"))) if sums else None
        finished = shim.guarded(torch.zeros(counters, dtype=torch.int32)) if counters else None
        return plan.plan_gemm(x, weight, bias, y, partial, finished, parts)

    return planned


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "group", "parts"),
    [(5, 16, 64, 64, 1), (16, 136, 48, None, 1), (17, 24, 96, 32, 1), (33, 72, 320, 64, 2), (70, 152, 1152, 128, 3)],
)
def test_gemm_agrees_with_float64_under_every_schedule(tokens, rows, columns, group, parts, symmetric, bits, dtype):
    case = make_case(tokens, rows, columns, bits=bits, group_size=group, dtype=dtype, symmetric=symmetric)
    results = [play(split_gemm(parts), case, schedule) for schedule in shim.SCHEDULES]
    assert error(results[0], case.product()) < TOLERANCE[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("tokens", "rows", "columns", "parts"), [(5, 8, 128, 1), (17, 24, 384, 1), (33, 136, 1152, 2)])
def test_gemm_of_floats_agrees_with_float64_under_every_schedule(tokens, rows, columns, parts, name, dtype):
    case = make_float_case(name, tokens, rows, columns, dtype)
    results = [play(split_gemm(parts), case, schedule) for schedule in shim.SCHEDULES]
    assert error(results[0], case.product()) < TOLERANCE[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("processors", [1, 16, 132])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 8, 16), (16, 4096, 4096), (64, 512, 14336), (128, 8192, 512)]
)
def test_the_parts_of_a_gemm_are_never_empty_and_never_too_many(tokens, rows, columns, processors):
    words = torch.empty(-(-rows // 16), -(-columns // 64), 128, dtype=torch.int32, device="meta")
    weight = layout.PackedWeight(words, torch.empty(1, rows, device="meta"), None, 4, None, rows, columns)
    parts = plan.gemm_parts(tokens, weight, processors)
    tiles = words.shape[1]
    assert 1 <= parts <= 16 and (parts - 1) * -(-tiles // parts) < tiles
    blocks = -(-rows // 128) * -(-tokens // plan.gemm_tokens(tokens))
    assert parts == 1 or parts * blocks <= 2 * processors


PRODUCTS = {"w4a16_gemv": (plan.plan_gemv, (3, 24, 1152)), "w4a16_gemm": (split_gemm(2), (20, 136, 768))}
BETWEEN_BLOCKS = "orders memory between blocks"  # the CPU runs one block after the other


def spoiled(run, right, fault: str, line: int = 0) -> bool:
    """Whether a fault shows under at least one schedule: another result, or a complaint of the shim."""
    for schedule in shim.SCHEDULES:
        try:
            if not torch.equal(run(schedule, fault, line), right):
                return True
        except shim.ShimError:
            return True
    return False


@needs_compiler
@pytest.mark.parametrize("source", [*PRODUCTS, "dequant"])
def test_every_barrier_is_needed(source):
    kernel, shape = PRODUCTS.get(source, (None, (1, 24, 192)))
    case = make_case(*shape, group_size=None)
    run = (lambda *way: play(kernel, case, *way)) if kernel else (lambda *way: play_dequant(case, *way))
    right, built = run(0), shim.build(source)
    barriers = [line for line in built.lines("__sync") if line not in built.lines(BETWEEN_BLOCKS)]
    assert barriers
    for line in barriers:
        assert spoiled(run, right, "skip_barrier", line), f"nothing shows that the barrier in line {line} is missing"


@needs_compiler
@pytest.mark.parametrize("source", PRODUCTS)
def test_swapped_fragments_show(source):
    kernel, shape = PRODUCTS[source]
    case = make_case(*shape)
    assert spoiled(lambda *way: play(kernel, case, *way), play(kernel, case), "swap_b")


@needs_compiler
@pytest.mark.parametrize("source", PRODUCTS)
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_swapped_fragments_and_missing_barriers_show_with_floats_too(source, name):
    kernel, shape = PRODUCTS[source]
    case = make_float_case(name, *shape)
    right, built = play(kernel, case), shim.build(source)
    run = lambda *way: play(kernel, case, *way)  # noqa: E731
    assert spoiled(run, right, "swap_b")
    for line in built.lines("__sync"):
        assert line in built.lines(BETWEEN_BLOCKS) or spoiled(run, right, "skip_barrier", line)


@needs_compiler
def test_a_wait_for_one_copy_less_shows():
    case = make_case(20, 136, 768)
    right = play(split_gemm(1), case)
    assert spoiled(lambda *way: play(split_gemm(1), case, *way), right, "weak_wait")
