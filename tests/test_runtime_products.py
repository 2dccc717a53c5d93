"""Packed products against float64, the operators' laws, and what is refused before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, QuantScheme, block_types, gguf_scheme
from outlierq.kernels import layout as kernel_layout
from outlierq.kernels.layout import KernelError
from outlierq.ops.activations import fake_quantize
from outlierq.ops.compiled import products
from outlierq.ops.twins.int8_split import split_matmul
from outlierq.quantize.rtn import rtn
from outlierq.runtime import QuantLinear, choice, cpu, dispatch, layout, pages, ways

PER_TOKEN, PER_TENSOR = ActivationScheme(), ActivationScheme(per="tensor")
STATIC = ActivationScheme(dynamic=False, per="tensor")
NVFP4 = ActivationScheme("float", 4, dynamic=False, per="group", group_size=16, scales="two-level")
FP8_BLOCKS = QuantScheme(8, None, kind="float", block=(128, 128), activations=ActivationScheme("float", per="group"))
TOKENS = (1, 4, 16, 64, 256)

# name -> (out, in, scheme, form)
WEIGHTS = {
    "w4 g64": (192, 256, QuantScheme(4, 64), "packed"),
    "w4 g64 with zero points": (128, 128, QuantScheme(4, 64, symmetric=False), "packed"),
    "w4 per channel, ragged strip": (72, 160, QuantScheme(4, None), "packed"),
    "w4 groups of 96": (64, 192, QuantScheme(4, 96), "packed"),
    "w3 g32 with zero points": (64, 96, QuantScheme(3, 32, symmetric=False), "packed"),
    "w2 g32": (64, 64, QuantScheme(2, 32), "packed"),
    "w8 per channel": (40, 96, QuantScheme(8, None), "packed"),
    "w8 g32": (40, 96, QuantScheme(8, 32), "packed"),
    "w8 g32 with zero points": (40, 96, QuantScheme(8, 32, symmetric=False), "packed"),
    "w5 g32 with zero points": (40, 96, QuantScheme(5, 32, symmetric=False), "packed"),
    "w8 g33": (40, 99, QuantScheme(8, 33), "decoded"),
    "w4 per channel, odd width": (24, 90, QuantScheme(4, None), "decoded"),
    "w8a8": (40, 96, QuantScheme(8, None, activations=PER_TOKEN), "int8"),
    "w8a8 per tensor": (40, 96, QuantScheme(8, None, activations=PER_TENSOR), "int8"),
    "w8a8 static": (40, 96, QuantScheme(8, None, activations=STATIC), "int8"),
    "w4a8": (64, 128, QuantScheme(4, 64, activations=PER_TOKEN), "packed"),
    "fp8 per channel": (40, 96, QuantScheme(8, None, kind="float", activations=ActivationScheme("float")), "packed"),
    "fp8 blocks": (200, 256, FP8_BLOCKS, "packed"),
    "fp8 blocks, ragged": (200, 300, FP8_BLOCKS, "decoded"),
    "nvfp4": (40, 96, QuantScheme(4, 16, kind="float", scales="two-level"), "packed"),
    "nvfp4 w4a4": (40, 96, QuantScheme(4, 16, kind="float", scales="two-level", activations=NVFP4), "packed"),
    "mxfp4": (40, 96, QuantScheme(4, 32, kind="float", scales="power-of-two"), "packed"),
    "mxfp6": (40, 96, QuantScheme(6, 32, kind="float", scales="power-of-two"), "packed"),
    "mxfp8": (40, 96, QuantScheme(8, 32, kind="float", scales="power-of-two"), "packed"),
    "w8 blocks": (200, 256, QuantScheme(8, None, block=(128, 128)), "packed"),
    "pairs": (72, 256, QuantScheme(4, None, kind="outlier-victim"), "packed"),
    "pairs g64": (40, 192, QuantScheme(4, 64, kind="outlier-victim"), "packed"),
}


def weight(rows: int, columns: int, scheme: QuantScheme, outliers: int = 0) -> QuantTensor:
    """Random codes, scales within a factor of 3, zero points around the middle."""
    torch.manual_seed(rows * columns)
    if scheme.kind != "int":
        stored = choice.random_weight(scheme, (rows, columns))
        static = scheme.activations is not None and not scheme.activations.dynamic
        return replace(stored, input_scale=torch.tensor([300.0]) if static else None)
    codes = torch.randint(int(scheme.code_min), int(scheme.code_max) + 1, (rows, columns))
    codes = codes.to(torch.int8 if scheme.symmetric else torch.uint8)
    shape = scheme.scale_shape(rows, columns)
    scale = torch.rand(shape).add_(0.5).mul_(0.01).bfloat16()
    zero = None if scheme.symmetric else torch.randint(0, 1 << scheme.bits, shape).to(torch.uint8)
    static = scheme.activations is not None and not scheme.activations.dynamic
    chosen = torch.randperm(columns)[:outliers].sort().values if outliers else None
    kept = torch.randn(rows, outliers).bfloat16() if outliers else None
    return QuantTensor(codes, scale, zero, scheme, torch.tensor([0.02]) if static else None, chosen, kept)


ONLY_COMPILED = {"w8 g32", "w8 g32 with zero points", "w5 g32 with zero points", "w8 blocks"} | {
    name for name, row in WEIGHTS.items() if row[2].kind != "int"
}


def form_here(name: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """The form of a weight, which for some needs compiled products."""
    form = WEIGHTS[name][3]
    if form != "packed" or products.float_kernel(dtype) or (name not in ONLY_COMPILED and dtype == torch.bfloat16):
        return form
    return "decoded"


def relative(y: torch.Tensor, truth: torch.Tensor) -> float:
    return ((y.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_form_is_within_bfloat16_of_the_float64_product(name):
    rows, columns, scheme, _ = WEIGHTS[name]
    stored = weight(rows, columns, scheme)
    bias = torch.randn(rows)
    layer = QuantLinear(stored, bias)
    assert layer.form == form_here(name)
    assert (layer.reason is None) == (layer.form != "decoded")
    for tokens in TOKENS:
        x = torch.randn(tokens, columns).bfloat16()
        rounded = x if scheme.activations is None else fake_quantize(x.float(), scheme.activations, stored.input_scale)
        truth = rounded.double() @ stored.dequantize().double().T + bias.double()
        y = layer(x)
        assert y.dtype == x.dtype
        assert relative(y, truth) < 1e-2, tokens


@pytest.mark.parametrize("name", [*block_types(), None])
def test_weights_that_are_no_plain_integers_are_never_multiplied_as_such(name):
    """Tables of values, scales in units of others, real minima: their codes or scales mean something else."""
    scheme = QuantScheme(4, 32, symmetric=False, scales="two-level") if name is None else gguf_scheme(name)
    stored = rtn(torch.randn(40, 256), None, scheme)
    layer = QuantLinear(stored)
    assert scheme.kind == "float" or scheme.scales == "plain" or layer.form == "decoded"
    x = torch.randn(5, 256).bfloat16()
    assert relative(layer(x), x.double() @ stored.dequantize().double().T) < 1e-2


@pytest.mark.parametrize("name", [n for n, row in WEIGHTS.items() if row[3] != "int8"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_other_dtypes_keep_their_own_precision(name, dtype, bound):
    rows, columns, scheme, _ = WEIGHTS[name]
    stored = weight(rows, columns, scheme)
    layer = QuantLinear(stored, dtype=dtype)
    x = torch.randn(5, columns, dtype=dtype)
    seen = x if scheme.activations is None else fake_quantize(x, scheme.activations, stored.input_scale)
    assert layer.form == form_here(name, dtype)
    assert relative(layer(x), seen.double() @ stored.dequantize().double().T) < bound


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_a_layer_holds_is_the_weight_it_was_given(name):
    rows, columns, scheme, _ = WEIGHTS[name]
    stored = weight(rows, columns, scheme)
    layer = QuantLinear(stored)
    dense = layer.dense()
    if scheme.symmetric or scheme.bits < 4 or layer.choice is None or layer.choice.way == "compiled":
        assert torch.equal(dense, stored.dequantize())
    else:  # torch keeps (8 - zero point) * scale in bfloat16
        step = stored.scale.float().repeat_interleave(scheme.columns_per_group(columns), 1)
        assert ((dense - stored.dequantize()).abs() <= step * 8 / 256).all()


def test_int8_packing_can_be_undone_and_products_saturate_nowhere():
    codes = torch.randint(-128, 128, (40, 96), dtype=torch.int8)
    assert torch.equal(layout.unpack_int8(layout.pack_int8(codes)), codes)
    if layout.int8_is_exact():
        x = torch.randint(-128, 128, (7, 96), dtype=torch.int8)
        y = layout.qlinear(x, layout.pack_int8(codes), torch.ones(40))
        assert torch.equal(y.long(), x.long() @ codes.long().T)


@pytest.mark.parametrize("outliers", [0, 5])
def test_int8_is_the_same_in_whatever_way(outliers):
    stored = weight(40, 96, QuantScheme(8, None, activations=PER_TOKEN), outliers=outliers)
    x, results = torch.randn(7, 96).bfloat16(), {}
    for way in ways.ways_for(stored, torch.bfloat16, True):
        for direct in (cpu.ALWAYS, 0) if way.decodes else (cpu.ALWAYS,):
            layer = QuantLinear(stored, choice=choice.Choice(way.name, direct, {}))
            assert layer.words.is_mkldnn == (way.name == "oneDNN")
            assert torch.equal(layer.dense(), stored.dequantize())
            results[way.name, direct] = layer(x)
    assert len(results) >= 2
    first = next(iter(results.values()))
    for y in results.values():
        assert relative(y, first.double()) < 4e-3


def test_a_weight_is_the_same_in_whatever_way():
    for scheme in (QuantScheme(4, 64), QuantScheme(4, 64, symmetric=False), QuantScheme(8, None)):
        stored = weight(600, 128, scheme)
        x, tried = torch.randn(9, 128).bfloat16(), 0
        for way in ways.ways_for(stored, torch.bfloat16, False):
            for direct in (cpu.ALWAYS, 0):
                layer = QuantLinear(stored, choice=choice.Choice(way.name, direct, {}))
                assert relative(layer(x), x.double() @ stored.dequantize().double().T) < 1e-2
                tried += 1
        assert tried >= 2


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (192, 96), (128, 4096)])
def test_unpacking_undoes_packing(rows, columns):
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int8)
    assert layout.strip_rows() in layout.STRIPS
    assert torch.equal(layout.unpack_int4(layout.pack_int4(codes)) + 8, codes)
    assert torch.equal(layout.unpack_int4(layout.pack_int4(codes)[64:]) + 8, codes[64:])


def test_the_layout_of_narrower_vectors_is_found_too():
    code = "from outlierq.runtime import layout; print(layout.strip_rows())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "32"


def test_a_layout_that_is_not_known_is_not_used(monkeypatch):
    monkeypatch.setattr(layout, "strip_rows", lambda: None)
    assert [way.name for way in ways.ways_for(weight(64, 128, QuantScheme(4, 64)), torch.bfloat16, False)] in (
        ["compiled"],
        [],
    )
    monkeypatch.setattr(products, "float_kernel", lambda dtype: None)
    layer = QuantLinear(weight(64, 128, QuantScheme(4, 64)))
    assert (layer.form, layer.reason) == ("decoded", "this processor's 4-bit layout is not known")


def test_int8_sums_are_exact():
    """Powers of two as scales leave nothing to round: the layer must give the integers themselves."""
    codes = torch.randint(-127, 128, (16, 64), dtype=torch.int8)
    x = torch.randint(-127, 128, (5, 64)).float()
    x[:, 0] = 127
    scheme = QuantScheme(8, None, scale_dtype="float32", activations=PER_TOKEN)
    layer = QuantLinear(QuantTensor(codes, torch.ones(16, 1), None, scheme), dtype=torch.float32)
    assert torch.equal(layer(x).long(), x.long() @ codes.long().T)


def test_outlier_columns_follow_the_split_product():
    stored = weight(40, 96, QuantScheme(8, None, activations=PER_TOKEN), outliers=5)
    x = torch.randn(7, 96).bfloat16()
    x[:, stored.outlier_columns] *= 50
    layer = QuantLinear(stored)
    assert layer.form == "int8"
    truth = split_matmul(x.float(), stored.codes, stored.scale, stored.outlier_columns, stored.outlier_weight)
    assert relative(layer(x), truth.double()) < 1e-2
    assert torch.equal(layer.dense(), stored.dequantize())


@pytest.mark.parametrize("tokens", [1, 8, 9, 128, 200])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_cuda_side_computes_the_same_through_its_twins(tokens, symmetric):
    """Without a GPU the launchers run their torch twins: this checks what is handed to them."""
    stored = weight(64, 128, QuantScheme(4, 32, symmetric=symmetric))
    held = kernel_layout.pack(stored.codes, stored.scale, stored.zero_point, bits=4, group_size=32)
    x, bias = torch.randn(2, tokens, 128).bfloat16(), torch.randn(64).bfloat16()
    y = dispatch._packed_on_cuda(x, held.words, held.scale, held.zero_point, None, bias, "int4", 32, 64)
    assert y.shape == (2, tokens, 64)
    assert relative(y, x.double() @ stored.dequantize().double().T + bias.double()) < 1e-2


@pytest.mark.parametrize(("inputs", "outliers"), [(PER_TOKEN, 0), (PER_TOKEN, 5), (PER_TENSOR, 0), (STATIC, 0)])
def test_the_cuda_side_of_int8_computes_the_same_through_its_twins(inputs, outliers):
    stored = weight(40, 96, QuantScheme(8, None, activations=inputs), outliers=outliers)
    layer = QuantLinear(stored, torch.randn(40))
    x = torch.randn(7, 96).bfloat16()
    parts = (stored.codes, layer.scale, layer.input_scale, layer.columns, layer.outlier_weight, layer.bias)
    assert relative(dispatch._int8_on_cuda(x, *parts, inputs.per == "token"), layer(x).double()) < 1e-2


def operands(name: str) -> tuple[str, tuple]:
    """Operator and arguments of a layer."""
    rows, columns, scheme, form = WEIGHTS[name]
    layer = QuantLinear(weight(rows, columns, scheme), torch.randn(rows))
    x = torch.randn(2, 3, columns).bfloat16()
    if form == "int8":
        words = layout.unpack_int8(layer.words) if layer.words.is_mkldnn else layer.words
        fixed = (
            words.contiguous(),
            layer.scale,
            layer.input_scale,
            None,
            None,
            layer.bias,
            True,
            cpu.ALWAYS,
        )
        return "int8_linear", (x, *fixed)
    held = (layer.words, layer.scale, layer.zero_point, layer.super_scale, layer.bias)
    return "packed_linear", (x, *held, layer.codes, None, rows, layer.direct)


@pytest.mark.parametrize("name", ["w4 g64", "w4 per channel, ragged strip", "w8 per channel", "w8a8", "mxfp4"])
def test_the_operators_pass_torchs_own_check(name):
    operator, arguments = operands(name)
    found = torch.library.opcheck(getattr(torch.ops.outlierq, operator).default, arguments)
    assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize("name", ["w4 g64", "w8a8", "w4a8", "fp8 per channel", "nvfp4"])
def test_a_compiled_model_has_no_graph_break(name):
    rows, columns, scheme, _ = WEIGHTS[name]
    layers = torch.nn.Sequential(QuantLinear(weight(rows, columns, scheme)), torch.nn.ReLU())
    x = torch.randn(3, columns).bfloat16()
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert relative(compiled(x), layers(x).double()) < 1e-2


@pytest.mark.parametrize("name", ["w4 g64", "w8 per channel", "w8a8", "w8 g32", "nvfp4"])
def test_an_input_of_another_width_is_refused_with_its_shape(name):
    rows, columns, scheme, _ = WEIGHTS[name]
    layer = QuantLinear(weight(rows, columns, scheme))
    with pytest.raises(KernelError, match=rf"{columns}\]; got.*\(3, {columns + 32}\)"):
        layer(torch.randn(3, columns + 32).bfloat16())


def test_parts_on_another_device_are_refused_with_all_shapes():
    codes, scale = torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, device="meta")
    with pytest.raises(KernelError, match=r"x is on cpu, but {'scale': 'meta'}; got x bfloat16 \(3, 32\), codes int8"):
        dispatch.int8_on_cpu(torch.randn(3, 32).bfloat16(), codes, scale, None, None, None, None, True)


def test_a_layer_in_torchs_layout_refuses_float32():
    rows, columns, scheme, _ = WEIGHTS["w4 g64"]
    layer = QuantLinear(weight(rows, columns, scheme), choice=choice.Choice("torch int4", cpu.ALWAYS, {}))
    with pytest.raises(KernelError, match="bfloat16 inputs; got x float32"):
        layer(torch.randn(3, columns))


def test_outlier_columns_out_of_range_are_refused():
    stored = weight(40, 96, QuantScheme(8, None, activations=PER_TOKEN), outliers=5)
    stored.outlier_columns[-1] = 96
    with pytest.raises(KernelError, match=r"within 0 \.\. 95"):
        QuantLinear(stored)


def test_no_tokens_give_no_outputs():
    for rows, columns, scheme, _ in WEIGHTS.values():
        if scheme.activations is None or scheme.activations.per == "token":
            x = torch.empty(0, columns, dtype=torch.bfloat16)
            assert QuantLinear(weight(rows, columns, scheme))(x).shape == (0, rows)


@pytest.mark.parametrize("name", ["w8a8", "w8a8 per tensor", "w8a8 static"])
def test_integers_do_not_hide_a_nan(name):
    rows, columns, scheme, _ = WEIGHTS[name]
    layer = QuantLinear(weight(rows, columns, scheme))
    x = torch.randn(3, columns).bfloat16()
    x[1, 5] = float("nan")
    assert layer(x).isnan().all(1).tolist() == ([True] * 3 if name == "w8a8 per tensor" else [False, True, False])


def test_a_weight_in_huge_pages_is_the_same_weight(monkeypatch):
    for tensor in (torch.randn(1 << 20), layout.pack_int8(torch.randint(-128, 128, (2048, 2048), dtype=torch.int8))):
        before = tensor.to_dense() if tensor.is_mkldnn else tensor.clone()
        assert pages.gather(tensor) in (0, (tensor.nbytes // pages.PAGE - 1) * pages.PAGE, tensor.nbytes)
        assert torch.equal(tensor.to_dense() if tensor.is_mkldnn else tensor, before)
    asked = []
    monkeypatch.setattr(pages, "_advise", lambda: lambda *call: asked.append(call) or 0)
    tensor = torch.zeros(3 * pages.PAGE + 5, dtype=torch.uint8)
    gathered = pages.gather(tensor[5:])
    if sys.platform.startswith("linux"):
        ((first, size, _),) = asked
        assert gathered == size >= 2 * pages.PAGE and first % pages.PAGE == size % pages.PAGE == 0
        assert tensor.data_ptr() + 5 <= first and first + size <= tensor.data_ptr() + tensor.nbytes
        monkeypatch.setattr(pages, "_advise", lambda: lambda *call: -1)
    assert pages.gather(tensor) == 0 and pages.gather(torch.zeros(8)) == 0
