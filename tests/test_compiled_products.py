"""The compiled products give what torch gives, on every kernel that runs here and on any number of threads; the choice
between them and torch's is measured once for a machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from outlierq.core.notes import collecting
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.ops.compiled import products
from outlierq.ops.outlier_victim import nearest_pairs
from outlierq.runtime import QuantLinear, choice, cpu, timing, ways

pytestmark = pytest.mark.skipif(products._compiled() is None, reason="nothing was compiled")
# Of bfloat16 every product is rounded once, at its end; float32 sums in another order than float64.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
FLOAT = [name for name, number in products.FLOAT_KERNELS.items() if products._runs(number, name)]
INT8 = [name for name, number in products.INT8_KERNELS.items() if products._runs(number, name)]


@pytest.fixture
def fresh_choices(tmp_path, monkeypatch):
    """An empty cache folder, and nothing in memory."""
    monkeypatch.setenv("OUTLIERQ_CACHE", str(tmp_path))
    for remembered in (choice._kept, choice.machine):
        remembered.cache_clear()
    yield tmp_path / choice.FILE
    for remembered in (choice._kept, choice.machine):
        remembered.cache_clear()


def test_a_portable_kernel_runs_everywhere():
    assert "portable" in FLOAT and "portable" in INT8


def random_codes(kind: str, rows: int, columns: int) -> torch.Tensor:
    """Codes of a kind, as `pack_panels` takes them: all there are but NaN."""
    code = products.CODES[kind]
    codes = torch.randint(0, 1 << code.bits, (rows, columns))
    if code.exponent:
        return code.values[codes].clamp(-448, 448).to(torch.float8_e4m3fn)
    if code.paired:
        return nearest_pairs(torch.randn(rows, columns) * 8).to(torch.int8)
    return (codes - (1 << code.bits - 1)).to(torch.int8)


@pytest.mark.parametrize("kind", products.CODES)
def test_unpacking_panels_undoes_packing(kind):
    codes = random_codes(kind, 40, 96)
    words = products.pack_panels(codes, kind)
    assert words.nbytes == 48 * 96 * products.CODES[kind].bits // 8
    unpacked = products.unpack_panels(words, kind)
    assert unpacked.dtype == codes.dtype and torch.equal(unpacked[:40].view(torch.uint8), codes.view(torch.uint8))
    assert not unpacked[40:].float().any()


@pytest.mark.parametrize("kernel", FLOAT)
@pytest.mark.parametrize("kind", products.CODES)
@pytest.mark.parametrize(("rows", "columns", "groups"), [(40, 96, 3), (16, 16, 1), (33, 256, 2), (1, 1024, 8)])
def test_float_products_are_those_of_float64(kernel, kind, rows, columns, groups):
    torch.manual_seed(rows)
    codes = random_codes(kind, rows, columns)
    scale, offset = torch.rand(rows, groups) + 0.1, torch.randn(rows, groups)
    words = products.pack_panels(codes, kind)
    for shift in (None, offset):
        added = 0 if shift is None else shift.double()[..., None]
        dense = (codes.double().view(rows, groups, -1) * scale.double()[..., None] + added).view(rows, columns)
        held = (products.by_panel(scale), None if shift is None else products.by_panel(shift))
        weight = products.Packed(words, *held, kind)
        for dtype in [torch.bfloat16] if kernel == products.ONLY_BFLOAT16 else BOUNDS:
            for tokens in (*range(1, 27), 64) if kind.startswith("int") else (1, 2, 3, 4, 5, 13, 24, 26, 64):
                x = torch.randn(tokens, columns).to(dtype)
                y = products.multiply(x, weight, rows, kernel)
                truth = x.double() @ dense.T
                assert y.dtype == dtype and y.shape == truth.shape
                assert (y.double() - truth).norm() < BOUNDS[dtype] * truth.norm(), (dtype, tokens)


@pytest.mark.parametrize("kernel", INT8)
@pytest.mark.parametrize(("rows", "columns"), [(40, 96), (16, 4), (33, 260), (1, 1024)])
def test_int8_products_are_exact_at_the_extremes_too(kernel, rows, columns):
    torch.manual_seed(rows)
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    codes[0] = -128
    scale = torch.rand(rows)
    words = products.pack_int8(codes)
    for tokens in (*range(1, 27), 64):
        x = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8)
        x[0] = -128
        step = torch.rand(tokens, 1)
        sums = (x.long() @ codes.long().T).float() * scale
        assert torch.equal(products.multiply_int8(x, words, scale, None, torch.float32, kernel), sums)
        for dtype in BOUNDS:
            assert torch.equal(products.multiply_int8(x, words, scale, step, dtype, kernel), (sums * step).to(dtype))


def test_any_number_of_threads_gives_the_same():
    codes = torch.randint(-8, 8, (520, 256))
    held = products.Packed(products.pack_panels(codes, "int4"), products.by_panel(torch.rand(520, 4)), None, "int4")
    x = torch.randn(30, 256).bfloat16()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results += [products.multiply(x, held, 520) for _ in range(20)]
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


def test_a_forked_process_has_threads_of_its_own():
    code = (
        "import os, torch\n"
        "from outlierq.ops.compiled import products as p\n"
        "torch.set_num_threads(3)\n"
        "codes = p.pack_panels(torch.randint(-8, 8, (520, 64)), 'int4')\n"
        "held = p.Packed(codes, p.by_panel(torch.rand(520, 1)), None, 'int4')\n"
        "x = torch.randn(3, 64)\n"
        "y = p.multiply(x, held, 520)\n"
        "child = os.fork()\n"
        "same = torch.equal(p.multiply(x, held, 520), y)\n"
        "os._exit(not same) if child == 0 else None\n"
        "assert same and os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("kind", products.CODES)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_decoded_panels_are_the_weight(kind, dtype):
    codes = random_codes(kind, 32, 96)
    scale, offset = torch.rand(32, 3) / 512, torch.randn(32, 3)
    out = torch.empty(32, 96, dtype=dtype)
    words = products.pack_panels(codes, kind)
    packed = products.Packed(words, products.by_panel(scale), products.by_panel(offset), kind)
    dense = (codes.float().view(32, 3, -1) * scale[..., None] + offset[..., None]).view(32, 96)
    assert torch.equal(products.decode(packed, out), dense.to(dtype))
    assert torch.equal(products.decode(products.Packed(words, None, None, kind), out), codes.to(dtype))


@pytest.mark.parametrize("check", ["_float_is_right", "_int8_is_right"])
def test_a_kernel_that_gives_something_else_is_dropped_with_one_line(monkeypatch, check):
    find = products.int8_kernel if "int8" in check else lambda: products.float_kernel(torch.bfloat16)
    products._runs.cache_clear()
    right = getattr(products, check)
    monkeypatch.setattr(products, check, lambda name: name == "portable" and right(name))
    with collecting() as notes:
        assert find() == find() == "portable"
    products._runs.cache_clear()
    assert len(notes) == len(INT8 if "int8" in check else FLOAT) - 1
    assert all("is not used: it differs from torch's on a small case" in text for text in notes)


def test_the_self_tests_notice_a_wrong_number(monkeypatch):
    """As a compiler that miscompiles would give it."""
    for function, check in (("multiply", products._float_is_right), ("multiply_int8", products._int8_is_right)):
        right = getattr(products, function)

        def wrong(*arguments, right=right):
            y = right(*arguments)
            y[-1, -1] += 1
            return y

        assert check("portable")
        monkeypatch.setattr(products, function, wrong)
        assert not check("portable")


def test_the_fastest_way_is_taken_and_nothing_slower_than_decoding():
    never = float("inf")
    measured = {
        "good": [(1.0, 9.0), (2.0, 9.0), (3.0, 9.0), (9.0, 8.0), (20.0, 10.0)],
        "one token": [(0.9, never), (900.0, never), (900.0, never), (900.0, never), (900.0, never)],
    }
    assert choice.fastest(measured) == choice.Choice("good", 0b00111, measured)
    assert [cpu.is_direct(0b00111, tokens) for tokens in (1, 2, 16, 17, 64, 65, 5000)] == [True] * 3 + [False] * 4


def test_a_hopeless_call_is_not_made_again_and_again():
    now, calls = [0.0], []

    def taking(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    waits = {"fast": 0.001, "near": 0.003, "slow": 0.01, "endless": 9.0}
    named = {name: partial(taking, name, seconds) for name, seconds in waits.items()}
    assert timing.least_seconds(named, 5, lambda: now[0]) == pytest.approx(waits)
    assert [calls.count(name) for name in waits] == [6, 6, 3, 1]


def test_choices_are_measured_once(fresh_choices, monkeypatch):
    stored = choice.random_weight(QuantScheme(4, 32), (64, 64))
    first = QuantLinear(stored).choice
    kept = json.loads(fresh_choices.read_text())
    assert kept["machine"] == choice.machine() and len(kept["choices"]) == 1
    choice._kept.cache_clear()
    monkeypatch.setattr(choice, "measure", None)
    with collecting() as notes:
        again = QuantLinear(stored).choice
    assert (again.way, again.direct) == (first.way, first.direct) and not notes


@pytest.mark.parametrize("change", ["processor", "able", "torch", "compiled"])
def test_on_another_machine_choices_are_measured_anew_with_one_line(fresh_choices, change):
    stored = choice.random_weight(QuantScheme(4, 32), (64, 64))
    QuantLinear(stored)
    kept = json.loads(fresh_choices.read_text())
    kept["machine"][change] = "another"
    fresh_choices.write_text(json.dumps(kept))
    choice._kept.cache_clear()
    with collecting() as notes:
        QuantLinear(stored)
        QuantLinear(stored)
    assert len(notes) == 1 and "measured on another machine" in notes[0]
    assert json.loads(fresh_choices.read_text())["machine"] == choice.machine()


@pytest.mark.parametrize("text", ["{", "[]", '{"choices": {"a": {}}}', '{"choices": {"a": 3}}', '{"choices": 5}'])
def test_kept_choices_that_cannot_be_read_are_measured_anew(fresh_choices, text):
    fresh_choices.write_text(text)
    with collecting() as notes:
        layer = QuantLinear(choice.random_weight(QuantScheme(4, 32), (64, 64)))
    assert layer.choice is not None and len(notes) == 1 and "measured anew" in notes[0]


def test_a_kept_way_that_does_not_fit_is_not_taken(fresh_choices):
    """As one of a later version, or of a compiled part that is gone."""
    stored = choice.random_weight(QuantScheme(8, None, activations=ActivationScheme()), (64, 64))
    taken = QuantLinear(stored).choice.way
    kept = json.loads(fresh_choices.read_text())
    for row in kept["choices"].values():
        row["way"] = "torch int4"
    fresh_choices.write_text(json.dumps(kept))
    choice._kept.cache_clear()
    assert QuantLinear(stored).choice.way in {way.name for way in ways.WAYS if way.int8_inputs}
    assert taken in {way.name for way in ways.WAYS}


def test_a_folder_that_cannot_be_written_costs_a_note(fresh_choices, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUTLIERQ_CACHE", str(tmp_path / "file"))
    with collecting() as notes:
        layer = QuantLinear(choice.random_weight(QuantScheme(4, 32), (64, 64)))
    assert layer.choice is not None
    assert len(notes) == 1 and "are not kept" in notes[0]


def test_the_same_wheel_falls_back_to_what_the_processor_can():
    """torch's own choice of instructions does not matter to ours; without compiled code torch's ways are left."""
    code = (
        "from outlierq.ops.compiled import products\n"
        "products._compiled = lambda: None\n"
        "import torch\n"
        "from outlierq.core.scheme import QuantScheme\n"
        "from outlierq.runtime import QuantLinear, choice\n"
        "layer = QuantLinear(choice.random_weight(QuantScheme(8, None), (64, 64)))\n"
        "print(layer.choice.way, layer(torch.ones(3, 64).bfloat16()).shape)\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "torch int8 torch.Size([3, 64])"


def test_random_weights_are_weights_of_their_scheme():
    stored = choice.random_weight(QuantScheme(4, 32, symmetric=False), (48, 64))
    assert isinstance(stored, QuantTensor) and stored.dequantize().shape == (48, 64)
