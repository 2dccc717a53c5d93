"""Numbers that break quantizers: denormals, float16 overflow, dead channels, zero groups, constant columns.

What comes out is finite and near what went in, or a `NumbersError` says that the scale cannot be stored.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.statistics import correlated_inputs, random_weight, row_errors, statistics_of

from outlierq.core.errors import NumbersError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.registry import Method, methods
from outlierq.transform.stage import choose_move

ROWS, COLUMNS, GROUP = 6, 64, 16
INT_SCHEMES = [
    QuantScheme(4, GROUP, True),
    QuantScheme(4, GROUP, False),
    QuantScheme(3, None, False, "float16"),
    QuantScheme(8, None, True, "float16"),
    QuantScheme(2, GROUP, True, "float32"),
]
FLOAT_SCHEMES = [QuantScheme(8, None, kind="float"), QuantScheme(8, None, kind="float", block=(4, 16))]
QUANTIZERS = [m for m in methods("quantize").values() if m.name != "int8_split"]


def plain() -> torch.Tensor:
    return random_weight(ROWS, COLUMNS)


def placed(value: float, where: tuple) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        w = plain()
        w[where] = value
        return w

    return make


WEIGHTS: dict[str, Callable[[], torch.Tensor]] = {
    "all zero": lambda: torch.zeros(ROWS, COLUMNS),
    "a zero group": placed(0.0, (2, slice(GROUP, 2 * GROUP))),
    "a zero row": placed(0.0, (slice(3, 4),)),
    "a constant column": placed(0.5, (slice(None), 7)),
    "a constant group": placed(0.25, (1, slice(0, GROUP))),
    "all one value": lambda: torch.full((ROWS, COLUMNS), -0.3),
    "one sign": lambda: plain().abs() + 1,
    "nearly equal and far from zero": lambda: 100 + plain() * 1e-3,
    "one huge weight": placed(3e4, (2, 5)),
    "one huge weight in float16's last octave": placed(65504.0, (2, 5)),
    "denormals": lambda: plain() * 1e-39,
    "denormals beside others": placed(1e-42, (slice(None), slice(0, GROUP))),
    "below float16": lambda: plain() * 1e-12,
    "below bfloat16's codes": lambda: plain() * 1e-37,
    "beyond float16": lambda: plain() * 1e8,
    "near the end of float32": lambda: plain() * 1e30,
    "minus zero": lambda: -torch.zeros(ROWS, COLUMNS),
}


def inputs(change: Callable[[torch.Tensor], object]) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        x = correlated_inputs(96, COLUMNS)
        change(x)
        return x

    return make


INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "dead channels": inputs(lambda x: x[:, 4:9].zero_()),
    "all dead": inputs(lambda x: x.zero_()),
    "constant columns": inputs(lambda x: x[:, :8].fill_(3.0)),
    "equal columns": inputs(lambda x: x.copy_(x[:, :1].expand_as(x).clone())),
    "one token": lambda: correlated_inputs(1, COLUMNS),
    "denormal channels": inputs(lambda x: x[:, :8].mul_(1e-40)),
    "huge channels": inputs(lambda x: x[:, 11].mul_(1e4)),
    "beyond float16": inputs(lambda x: x.mul_(1e5)),
    "tiny": inputs(lambda x: x.mul_(1e-12)),
}


def largest_of_group(w: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """[out, in] the largest |w| of what shares a scale with each weight."""
    height, width = scheme.block or (1, scheme.columns_per_group(w.shape[1]))
    padded = torch.nn.functional.pad(w.abs(), (0, -w.shape[1] % width, 0, -w.shape[0] % height))
    pooled = torch.nn.functional.max_pool2d(padded[None, None], (height, width))[0, 0]
    return pooled.repeat_interleave(height, 0).repeat_interleave(width, 1)[: w.shape[0], : w.shape[1]]


def check(result: QuantTensor, w: torch.Tensor, scheme: QuantScheme, stats: InputStats | None = None) -> None:
    """Finite, a scale that divides, and no weight further out than its group reached, or lost by more than that.

    With statistics weights may stray, where inputs are alike, as long as the output errs no more than plain rounding's.
    """
    dense = result.dequantize()
    assert result.scale.float().isfinite().all() and (result.scale.float() != 0).all()
    assert dense.isfinite().all()
    if stats is not None:
        rounded = methods("quantize")["rtn"].function(w, None, scheme).dequantize()
        allowed = 1.02 * row_errors(rounded - w, stats.hessian).sum() + 1e-9 * row_errors(w, stats.hessian).sum()
        assert row_errors(dense - w, stats.hessian).sum() <= allowed
        return
    # The smallest scale of the dtype cannot hold smaller weights; two steps of it are all that may be added.
    smallest = torch.finfo(result.scale.dtype).smallest_normal * 2 * abs(scheme.code_max)
    reach = largest_of_group(w, scheme)
    assert (dense.abs() <= 2.2 * reach + smallest).all()
    assert ((dense - w).abs() <= 2.2 * reach + smallest).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
@pytest.mark.parametrize("chosen", QUANTIZERS, ids=lambda m: m.name)
def test_weights_at_the_edge_are_rounded_or_refused(chosen: Method, scheme: QuantScheme, kind: str):
    w = WEIGHTS[kind]()
    stats = statistics_of(correlated_inputs(96, COLUMNS), sequence_length=32)
    try:
        result = chosen.function(w, stats, scheme)
    except NumbersError:
        assert (scheme.scale_dtype == "float16" and w.abs().max() > 60000) or w.abs().max() > 1e25
        return
    check(result, w, scheme, stats if chosen.needs else None)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scheme", FLOAT_SCHEMES, ids=str)
def test_weights_at_the_edge_become_fp8_or_are_refused(scheme: QuantScheme, kind: str):
    w = WEIGHTS[kind]()
    try:
        result = methods("quantize")["rtn"].function(w, None, scheme)
    except NumbersError:
        assert w.abs().max() > 1e25
        return
    check(result, w, scheme)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chosen", QUANTIZERS, ids=lambda m: m.name)
def test_inputs_at_the_edge_leave_weights_near_themselves(chosen: Method, symmetric: bool, kind: str):
    w, stats, scheme = plain(), statistics_of(INPUTS[kind]()), QuantScheme(4, GROUP, symmetric)
    check(chosen.function(w, stats, scheme), w, scheme, stats if chosen.needs else None)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("chosen", methods("transform").values(), ids=lambda m: m.name)
def test_inputs_at_the_edge_are_moved_by_finite_scales(chosen: Method, kind: str):
    w, stats = plain(), statistics_of(INPUTS[kind]())
    move = choose_move(w, stats, QuantScheme(8, None), None, [(chosen, {})], "group")
    assert move.scale.isfinite().all() and (move.scale > 0).all()
    moved = stats.scaled(move.scale)
    assert all(value.isfinite().all() for value in moved.tensors().values())
    assert (w * move.scale).isfinite().all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("chosen", methods("transform").values(), ids=lambda m: m.name)
def test_weights_at_the_edge_are_moved_by_finite_scales_or_refused(chosen: Method, kind: str):
    w, stats = WEIGHTS[kind](), statistics_of(correlated_inputs(96, COLUMNS))
    try:
        move = choose_move(w, stats, QuantScheme(8, None), None, [(chosen, {})], "group")
    except NumbersError:
        assert w.abs().max() > 1e10
        return
    assert move.scale.isfinite().all() and (move.scale > 0).all()
    assert (w * move.scale).isfinite().all()


@pytest.mark.parametrize("scheme", INT_SCHEMES, ids=str)
@given(
    magnitudes=st.lists(st.sampled_from([0.0, 1e-45, 1e-38, 1e-8, 1e-3, 1.0, 1e3, 6e4]), min_size=4, max_size=4),
    offset=st.sampled_from([0.0, 1.0, -50.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_groups_of_any_magnitudes_are_rounded_within_one_step(scheme, magnitudes, offset, seed):
    spread = torch.tensor(magnitudes).repeat_interleave(GROUP)
    w = (random_weight(ROWS, COLUMNS, seed=seed) * 20 + offset) * spread
    try:
        result = methods("quantize")["rtn"].function(w, None, scheme)
    except NumbersError:
        assert w.abs().max() > 60000
        return
    check(result, w, scheme)
    # Rounding to nearest errs by a step at most; the zero point of an asymmetric grid adds its own rounding.
    step = result.scale.float().repeat_interleave(scheme.columns_per_group(COLUMNS), 1)
    # A scale among the denormals of its dtype is rounded by up to half of the smallest one, for each code.
    coarse = scheme.code_max * torch.finfo(result.scale.dtype).smallest_normal * torch.finfo(result.scale.dtype).eps
    assert ((result.dequantize() - w).abs() <= 1.05 * step + coarse).all()
