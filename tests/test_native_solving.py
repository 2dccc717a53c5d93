"""The compiled solver gives what torch gives, bit for bit, whatever the number of threads; a faulty one is not used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, row_errors, statistics_of

from outlierq.core.notes import collecting
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme, gguf_scheme
from outlierq.core.stats import InputStats
from outlierq.ops import precision
from outlierq.ops.compiled import solving as native
from outlierq.ops.errors import told_errors
from outlierq.ops.grid import in_groups, minmax_grid
from outlierq.ops.search import columns, refine, scale_search, sweep
from outlierq.ops.search.sweep import PANEL_ROWS
from outlierq.registry import method

COLUMNS = 320
needs_compiled = pytest.mark.skipif(not native.available(), reason="nothing was compiled")
SCHEMES = [
    *(QuantScheme(bits, size, symmetric) for bits in (2, 4, 8) for size in (32, None) for symmetric in (True, False)),
    QuantScheme(4, 64, scale_dtype="float16"),
    QuantScheme(4, 40, symmetric=False, scales="two-level", scale_dtype="float16"),
    QuantScheme(4, 16, kind="float", scales="two-level", scale_dtype="float32"),
    QuantScheme(4, 32, kind="float", scales="power-of-two"),
    QuantScheme(8, None, kind="float"),
    QuantScheme(8, None, kind="float", block=(16, 128)),
    gguf_scheme("Q4_1"),
    gguf_scheme("IQ4_NL"),
]
WIDE = [QuantScheme(4, 64), QuantScheme(3, 128, symmetric=False), QuantScheme(8, 32, kind="float")]


@pytest.fixture(scope="module")
def stats() -> InputStats:
    x = correlated_inputs(256, COLUMNS, outliers=2)
    x[:, [3, 100]] = 0  # dead channels
    x[:, 7] = x[:, 8]
    return statistics_of(x, sequence_length=64)


def weight(rows: int) -> torch.Tensor:
    w = random_weight(rows, COLUMNS)
    w[0], w[:, 5] = 0, 0
    w[-1] *= 1e-6
    w[rows // 2, 40] = 30.0
    return w


def solved(w: torch.Tensor, stats: InputStats, scheme: QuantScheme, **options: Any) -> QuantTensor:
    return method("quantize", "gptq").function(w, stats, scheme, **options)


def same(a: QuantTensor, b: QuantTensor) -> bool:
    parts = [(getattr(a, part), getattr(b, part)) for part in ("codes", "scale", "zero_point", "super_scale")]
    return all(x is y is None or torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in parts)


@needs_compiled
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_and_scales_are_those_of_torch(scheme, stats, monkeypatch):
    w, options = weight(37), {"refine_passes": 2}
    found = [solved(w, stats, scheme, order=order, **options) for order in ("none", "activation", "group-aware")]
    monkeypatch.setattr(columns, "_trusted", lambda: False)
    for order, each in zip(("none", "activation", "group-aware"), found, strict=True):
        assert same(each, solved(w, stats, scheme, order=order, **options)), order


@needs_compiled
@pytest.mark.parametrize("rows", [1, 15, 16, 17, PANEL_ROWS + 3])
def test_any_number_of_rows_is_solved_as_torch_does(rows, stats, monkeypatch):
    w, scheme = weight(rows), QuantScheme(3, 32)
    found = solved(w, stats, scheme)
    monkeypatch.setattr(columns, "_trusted", lambda: False)
    assert same(found, solved(w, stats, scheme))


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(3, None, symmetric=False)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(scheme, stats):
    w = weight(2 * PANEL_ROWS + 40)
    alone, before = solved(w, stats, scheme), torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert same(solved(w, stats, scheme), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(3, None, symmetric=False)], ids=str)
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_products_far_from_a_block_change_little_however_they_are_cut_and_rounded(scheme, passes, stats, monkeypatch):
    w, errors = weight(40), []
    short = precision.has_bfloat16()
    for wide, bfloat16 in ((COLUMNS, False), (128, False), (128, short), (256, short)):
        monkeypatch.setattr(sweep, "WIDE", wide)
        monkeypatch.setattr(refine, "WIDE", wide)
        monkeypatch.setattr(precision, "takes_bfloat16", lambda *given, answer=bfloat16: answer)
        with told_errors() as told:
            result = solved(w, stats, scheme, refine_passes=passes)
        found = row_errors(result.dequantize() - w, stats.hessian)
        errors.append(found.sum().item())
        assert told.errors.sum().item() == pytest.approx(errors[-1], rel=0.01 if bfloat16 else 1e-3)
    assert errors == pytest.approx([errors[0]] * 4, rel=0.03)


@needs_compiled
def test_wide_products_are_the_same_with_and_without_compiled_code(stats, monkeypatch):
    w, scheme = weight(40), QuantScheme(4, 32)
    for module in (sweep, refine):
        monkeypatch.setattr(module, "WIDE", 128)
    monkeypatch.setattr(precision, "takes_bfloat16", lambda *given: precision.has_bfloat16())
    found = solved(w, stats, scheme)
    monkeypatch.setattr(columns, "_trusted", lambda: False)
    assert same(found, solved(w, stats, scheme))


def test_narrow_and_foreign_products_stay_in_float32():
    cpu = torch.device("cpu")
    assert not precision.takes_bfloat16(precision.LEAST_WIDTH - 1, cpu)
    assert not precision.takes_bfloat16(1 << 14, torch.device("cuda"))
    assert precision.takes_bfloat16(precision.LEAST_WIDTH, cpu) == precision.has_bfloat16()


@needs_compiled
@pytest.mark.parametrize("scheme", columns._TRIED, ids=str)
def test_every_kind_of_grid_is_tried_before_compiled_code_is_used(scheme):
    assert columns._agrees(scheme)


@needs_compiled
@pytest.mark.parametrize("part", ["outlierq_sweep", "outlierq_descend"])
def test_code_that_was_compiled_wrongly_is_not_used_and_that_is_noted(part, stats, monkeypatch):
    w, scheme = weight(20), QuantScheme(4, 32)
    expected, real = solved(w, stats, scheme), native._compiled()

    class Faulty:
        """The library, one function of which changes a bit of what it was given."""

        def __getattr__(self, name: str) -> Any:
            return wrong if name == part else getattr(real, name)

    def wrong(grid: int, columns: int, rows: int, values: int, *rest: Any) -> int:
        import ctypes

        done = getattr(real, part)(grid, columns, rows, values, *rest)
        ctypes.cast(values, ctypes.POINTER(ctypes.c_float))[3] += 1
        return done

    monkeypatch.setattr(native, "_compiled", lambda: Faulty())
    columns._trusted.cache_clear()
    try:
        with collecting() as notes:
            assert same(solved(w, stats, scheme), expected)
        assert notes == ["the compiled solver does not give what torch gives: torch solves instead, slower"]
    finally:
        columns._trusted.cache_clear()


@pytest.mark.parametrize("scheme", [QuantScheme(4, 32), QuantScheme(4, 32, symmetric=False)], ids=str)
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_the_errors_that_are_told_are_those_of_the_result(scheme, passes, stats):
    w = weight(30)
    with told_errors() as told:
        result = solved(w, stats, scheme, refine_passes=passes)
    errors, power = told.of(result)
    assert not told.of(replace(result))
    assert torch.allclose(errors, row_errors(result.dequantize() - w, stats.hessian), rtol=1e-3, atol=1e-9)
    assert torch.allclose(power, row_errors(w, stats.hessian), rtol=1e-3, atol=1e-9)


@needs_compiled
@pytest.mark.parametrize("scheme", WIDE, ids=str)
def test_a_compiled_search_of_wide_weights_ends_where_that_of_torch_does(scheme, monkeypatch):
    w, root = random_weight(37, 1024), torch.randn(1024, 1200, generator=torch.Generator().manual_seed(0))
    start, blocks = minmax_grid(w, scheme), scale_search.group_blocks(root @ root.T, scheme)
    assert scale_search._is_compiled(w, scheme, blocks)
    found = scale_search.improved(w, start, blocks)
    parts = [
        scale_search.improved(w[rows], scale_search.rows_of(start, rows), blocks) for rows in (slice(16), slice(16, 37))
    ]
    assert torch.equal(found.scale, torch.cat([part.scale for part in parts])), "rows do not depend on each other"
    monkeypatch.setattr(scale_search, "_is_compiled", lambda *_: False)
    expected = scale_search.improved(w, start, blocks)
    errors = scale_search._Groups(in_groups(w, scheme), scheme, blocks).errors
    assert (errors(found) / errors(expected) - 1).abs().mean() < 0.01
    assert errors(found).sum() < 1.001 * errors(expected).sum() < errors(start).sum()


@needs_compiled
def test_a_compiled_search_that_errs_is_not_used_and_that_is_said(monkeypatch):
    w, scheme = random_weight(8, 1024), QuantScheme(4, 64)
    blocks = scale_search.group_blocks(torch.eye(1024), scheme)
    monkeypatch.setattr(native, "group_errors", lambda grid, *_: grid.scale)
    monkeypatch.setattr(scale_search, "_agrees", scale_search._agrees.__wrapped__)
    with collecting() as notes:
        scale_search.improved(w, minmax_grid(w, scheme), blocks)
    assert notes == ["the compiled scale search does not give what torch gives: torch searches instead, slower"]
