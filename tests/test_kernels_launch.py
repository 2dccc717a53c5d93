"""The launchers: what they refuse, what they do without a GPU, and what they would hand to CuPy."""

from __future__ import annotations

import contextlib
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import shim
import torch
from shim.wrappers import emulated, wrapper_inputs

from outlierq.kernels import launch, layout, plan
from outlierq.kernels.layout import KernelError
from outlierq.ops import hadamard
from outlierq.ops.twins.kv_quant import kv_dequant, kv_quant
from outlierq.ops.twins.packed_matmul import packed_matmul
from outlierq.ops.twins.quant_rows import SplitOperands, outlier_matmul, quant_rows

needs_compiler = pytest.mark.skipif(shim.missing() is not None, reason=shim.missing() or "")


def random(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture
def weight() -> layout.PackedWeight:
    """[24, 128] in groups of 32."""
    codes = torch.randint(-8, 8, (24, 128), generator=torch.Generator().manual_seed(0))
    return layout.pack(codes, random(24, 4).abs() / 50, group_size=32, dtype=torch.float16)


@pytest.fixture
def int8_operands() -> dict:
    codes = torch.randint(-127, 128, (24, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    x, scale_x, outliers = quant_rows(random(5, 64), torch.tensor([3, 9], dtype=torch.int32), 16)
    scale, kept = torch.rand(24), random(24, 16)
    return {"x": x, "scale_x": scale_x, "codes": codes, "scale": scale, "outliers": outliers, "outlier_weight": kept}


def test_on_the_cpu_every_launcher_is_its_twin(weight, int8_operands):
    x, parts = random(3, 128), layout.unpack(weight)
    assert torch.equal(launch.w4a16_gemv(x, weight), packed_matmul(x, *parts))
    assert torch.equal(launch.w4a16_gemm(x, weight), packed_matmul(x, *parts))
    assert torch.allclose(launch.dequant(weight).float() @ x.T.float(), packed_matmul(x, *parts).T.float(), atol=2e-2)
    assert all(torch.equal(a, b) for a, b in zip(launch.quant_rows(x), quant_rows(x), strict=True))
    expected = outlier_matmul(SplitOperands(**int8_operands), dtype=torch.float16)
    assert torch.equal(launch.w8a8_outlier(SplitOperands(**int8_operands), dtype=torch.float16), expected)
    cached = launch.kv_quant(x, bits=8, per="token", group_size=32)
    assert all(torch.equal(a, b) for a, b in zip(cached, kv_quant(x, bits=8, group_size=32), strict=True))
    assert torch.equal(launch.kv_dequant(*cached, bits=8), kv_dequant(*cached, bits=8))
    assert torch.equal(launch.fwht(x), hadamard.hadamard_transform(x.float()).half())


def test_wrong_tensors_are_refused_with_their_shapes(weight):
    x = random(3, 128)
    with pytest.raises(KernelError, match=r"x must be \[tokens, 128\]; got x float16 \(3, 64\)"):
        launch.w4a16_gemv(random(3, 64), weight)
    with pytest.raises(KernelError, match=r"bfloat16 \(3, 128\)"):
        launch.w4a16_gemm(x.bfloat16(), weight)
    with pytest.raises(KernelError, match=r"1 to 8 tokens; got x float16 \(9, 128\)"):
        launch.w4a16_gemv(random(9, 128), weight)
    with pytest.raises(KernelError, match=r"bias must be .*\[24\].*bias float16 \(23,\)"):
        launch.w4a16_gemv(x, weight, random(23))
    with pytest.raises(KernelError, match=r"a matrix.*128"):
        launch.w4a16_gemm(x[0], weight)
    with pytest.raises(KernelError, match=r"words must be \(2, 2, 128\)"):
        wrong = layout.PackedWeight(weight.words[:1], weight.scale, None, 4, 32, 24, 128)
        launch.dequant(wrong)
    with pytest.raises(KernelError, match="scale must be 16-bit"):
        wrong = layout.PackedWeight(weight.words, weight.scale[:2], None, 4, 32, 24, 128)
        launch.dequant(wrong)


def test_wrong_memory_is_refused(weight):
    with pytest.raises(KernelError, match=r"x must have contiguous rows.*strides \(1, 3\)"):
        launch.w4a16_gemv(random(128, 3).T, weight)
    with pytest.raises(KernelError, match="address % 16 = 2"):
        launch.w4a16_gemv(random(3 * 128 + 1)[1:].view(3, 128), weight)
    with pytest.raises(KernelError, match=r"strides \(132, 1\)"):
        launch.w4a16_gemv(random(3, 132)[:, :128], weight)
    with pytest.raises(KernelError, match=r"different devices.*'x': 'meta'"):
        launch.w4a16_gemv(random(3, 128).to("meta"), weight)


def test_wrong_int8_operands_are_refused(int8_operands):
    def refused(match: str, **changed):
        with pytest.raises(KernelError, match=match):
            launch.w8a8_outlier(SplitOperands(**{**int8_operands, **changed}), dtype=torch.float16)

    refused("must be int8", x=int8_operands["x"].float())
    refused("same inputs", x=int8_operands["x"][:, :32].contiguous())
    refused("scales must be float32: 5 or 1, and 24", scale=torch.rand(23))
    refused("outliers need their weight", outlier_weight=None)
    refused(r"\[24, 8 n\]", outlier_weight=random(24, 12), outliers=random(5, 12))
    refused("one 16-bit dtype", outliers=random(5, 16, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match="multiple of 16 inputs"):
        launch.quant_rows(random(2, 40))
    with pytest.raises(KernelError, match="int32"):
        launch.quant_rows(random(2, 32), torch.tensor([1]))


SPOILED = {
    "two devices": (lambda t: t.to("meta"), "different devices"),
    "an odd address": (lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape), "address % 16"),
    "columns first": (lambda t: t.T.contiguous().T, "contiguous"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_every_other_kernel_refuses_wrong_memory_too(how, int8_operands):
    spoil, said = SPOILED[how]
    codes, scale, minimum = launch.kv_quant(random(64, 64))
    rows = random(16, 64)
    calls = {
        "w8a8_outlier": lambda: launch.w8a8_outlier(
            SplitOperands(**{**int8_operands, "codes": spoil(int8_operands["codes"])}), dtype=torch.float16
        ),
        "kv_dequant": lambda: launch.kv_dequant(spoil(codes), scale, minimum),
    }
    if how != "two devices":  # of a single tensor there is no mixture
        calls["quant_rows"] = lambda: launch.quant_rows(spoil(rows))
        calls["fwht"] = lambda: launch.fwht(spoil(rows))
        calls["kv_quant"] = lambda: launch.kv_quant(spoil(random(64, 64)))
    for name, call in calls.items():
        with pytest.raises(KernelError, match=said) as raised:
            call()
        assert "(" in str(raised.value), f"{name} does not say the shapes"


def test_outlier_columns_on_another_device_are_refused():
    with pytest.raises(KernelError, match=r"different devices.*columns int32 \(1,\)"):
        launch.quant_rows(random(2, 32), torch.tensor([1], dtype=torch.int32, device="meta"))


def test_a_cache_or_transform_that_does_not_fit_is_refused():
    with pytest.raises(KernelError, match="groups of 64 per channel"):
        launch.kv_quant(random(65, 64), per="channel")
    with pytest.raises(KernelError, match="groups"):
        launch.kv_quant(random(64, 64), group_size=48)
    with pytest.raises(KernelError, match="per token or channel"):
        launch.kv_quant(random(64, 64), per="head")
    with pytest.raises(KernelError, match="multiple of 8"):
        launch.fwht(random(2, 4))
    with pytest.raises(KernelError, match="order 6"):
        launch.fwht(random(2, 6))


def test_without_a_device_one_line_says_what_happens_instead():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    said = launch.unavailable()
    assert "no CUDA device" in said and "\n" not in said


def test_without_cupy_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    launch.unavailable.cache_clear()
    try:
        said = launch.unavailable()
    finally:
        launch.unavailable.cache_clear()
    assert "outlierq[cuda]" in said and "\n" not in said


@pytest.mark.parametrize(
    "fault", [RuntimeError("cudaErrorInsufficientDriver: too old\nmore"), OSError("libnvrtc.so.13")]
)
def test_without_a_driver_or_compiler_one_line_says_so(fault, monkeypatch):
    def fail():
        raise fault

    runtime = SimpleNamespace(getDeviceCount=fail)
    cuda = SimpleNamespace(runtime=runtime, nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    launch.unavailable.cache_clear()
    try:
        said = launch.unavailable()
    finally:
        launch.unavailable.cache_clear()
    assert str(fault).splitlines()[0] in said and "torch is used instead" in said and "\n" not in said


def fake_cupy(answer) -> SimpleNamespace:
    """The parts of CuPy that are used; `answer` makes the function of a module."""

    class CompileException(Exception):
        pass

    class CUDADriverError(Exception):
        pass

    cuda = SimpleNamespace(
        compiler=SimpleNamespace(CompileException=CompileException),
        driver=SimpleNamespace(CUDADriverError=CUDADriverError),
    )
    return SimpleNamespace(
        cuda=cuda, RawModule=lambda **given: SimpleNamespace(get_function=lambda n: answer(given, n))
    )


@pytest.fixture
def on_fake_gpu(monkeypatch):
    """Install a fake CuPy; torch's own view of the machine stays as it is."""

    def install(answer) -> SimpleNamespace:
        cupy = fake_cupy(answer)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        launch._function.cache_clear()
        return cupy

    yield install
    launch._function.cache_clear()


def test_a_kernel_that_does_not_compile_warns_once_and_leaves_the_work_to_its_twin(on_fake_gpu):
    def fail(given, name):
        raise sys.modules["cupy"].cuda.compiler.CompileException("no such architecture\nmuch more")

    on_fake_gpu(fail)
    with pytest.warns(UserWarning, match=r"fwht<Half> cannot be used on CUDA device 0 \(no such architecture\)"):
        assert launch._function("fwht", "fwht<Half>", 0, 0) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch._function("fwht", "fwht<Half>", 0, 0) is None


def test_cupy_gets_one_source_without_includes_of_ours_and_the_instance_by_name(on_fake_gpu):
    asked, made = [], SimpleNamespace(kernel="compiled")

    def answer(given, name):
        asked.append((given, name))
        return made

    on_fake_gpu(answer)
    assert launch._function("w4a16_gemm", "w4a16_gemm<Half, 4, 1>", 60_000, 0) == "compiled"
    ((given, name),) = asked
    assert given["name_expressions"] == (name,) == ("w4a16_gemm<Half, 4, 1>",)
    assert '#include "packed' not in given["code"] and "#pragma once" not in given["code"]
    assert given["code"].count("struct Half {") == 1
    assert made.max_dynamic_shared_size_bytes == 60_000


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    device = torch.device("cuda", 0)


def test_a_launch_goes_to_the_stream_that_is_current_at_that_moment(monkeypatch):
    calls, streams = [], iter([7, 8])
    monkeypatch.setattr(launch, "unavailable", lambda: None)
    monkeypatch.setattr(launch, "_function", lambda *which: lambda *given, **named: calls.append((which, given, named)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams)))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    tensor = torch.zeros(4).as_subclass(OnGpu)
    one = plan.Launch("fwht", "fwht<Half>", (3, 2, 1), 64, (tensor, None, np.int32(5)), 96)
    assert launch.start(one) and launch.start(one)
    assert [named["stream"].ptr for _, _, named in calls] == [7, 8]
    which, (grid, block, arguments), named = calls[0]
    assert which == ("fwht", "fwht<Half>", 96, 0) and (grid, block) == ((3, 2, 1), (64, 1, 1))
    assert arguments == (tensor.data_ptr(), 0, np.int32(5)) and named["shared_mem"] == 96
    empty = plan.Launch("fwht", "fwht<Half>", (0, 1, 1), 64, (tensor,))
    assert launch.start(empty) and len(calls) == 2


@pytest.mark.parametrize("reason", ["no CuPy", "does not compile"])
def test_what_cannot_be_launched_is_left_to_the_twin(reason, monkeypatch):
    monkeypatch.setattr(launch, "unavailable", lambda: "no CuPy" if reason == "no CuPy" else None)
    monkeypatch.setattr(launch, "_function", lambda *which: None)
    tensor = torch.zeros(4).as_subclass(OnGpu)
    assert not launch.start(plan.Launch("fwht", "fwht<Half>", (3, 2, 1), 64, (tensor,)))


def test_arguments_keep_the_width_that_the_kernel_expects():
    tensor = torch.zeros(4)
    assert launch._argument(None) == 0 and launch._argument(tensor) == tensor.data_ptr()
    assert launch._argument(np.int32(7)).nbytes == 4 and launch._argument(np.int64(7)).nbytes == 8


@needs_compiler
@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_the_emulated_wrappers_compute_what_torch_does(dtype):
    words = wrapper_inputs(dtype)
    results = emulated(words, dtype)
    a, b = words[:, 10].contiguous().view(dtype), words[:, 11].contiguous().view(dtype)
    x, y = (words[:, i].contiguous().view(torch.float32) for i in (12, 13))

    def column(i: int, kind: torch.dtype) -> torch.Tensor:
        return results[:, i].contiguous().view(kind)

    assert torch.equal(column(16, dtype), a + b) and torch.equal(column(17, dtype), a - b)
    assert torch.equal(column(18, dtype), a * b)
    assert torch.equal(column(19, dtype).view(32, 2), torch.stack([x, y], 1).to(dtype))
    assert torch.equal(column(21, torch.float32), a.view(32, 2)[:, 0].float())
    assert torch.equal(column(22, torch.float32), torch.minimum(x, y))
    assert torch.equal(column(24, torch.int32), (x * 1000).round().int())
    assert torch.equal(column(25, torch.float32), x / y)
    assert torch.equal(results[:, 27], words[torch.arange(32) ^ 5, 14])


@needs_compiler
@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_the_emulated_mma_is_a_matrix_product_with_the_fragments_of_the_manual(dtype):
    words = wrapper_inputs(dtype)
    results = emulated(words, dtype)
    for kind, half, first in ((dtype, 8, 0), (torch.int8, 16, 4)):
        each = half // 4  # elements in a register
        registers = words[:, :6].contiguous().view(kind).view(8, 4, 6, each).double()  # group, lane in it, register
        a = registers[:, :, :4].reshape(8, 4, 2, 2, each)  # ..., half of k, half of the rows
        a = a.permute(3, 0, 2, 1, 4).reshape(16, 2 * half)
        b = registers[:, :, 4:].permute(2, 1, 3, 0).reshape(2 * half, 8)
        product = (a @ b).view(2, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4)
        sums = words[:, 6:10].contiguous()
        got = results[:, first : first + 4].contiguous()
        if kind == torch.int8:
            assert torch.equal(got.double(), product + sums.double())
        else:
            assert torch.equal(got.view(torch.float32).double(), product + sums.view(torch.float32).double())
