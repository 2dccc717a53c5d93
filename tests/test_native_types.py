"""Weights on the grids of GGUF's types: the compiled pass gives what torch gives, bit for bit, searched or not."""

from __future__ import annotations

import pytest
import torch

from outlierq.core.gguf.types import block_types
from outlierq.core.scheme import gguf_scheme
from outlierq.ops.compiled import typed
from outlierq.quantize.rtn import rtn

needs_compiled = pytest.mark.skipif(typed._rounding() is None, reason="nothing was compiled")
NAMES = [name for name, kind in block_types().items() if kind.vector == 1 and kind.kind != "float"]
ROWS, COLUMNS = 19, 512


def weights() -> torch.Tensor:
    """[out, in] with rows of zeros of both signs, of one sign, of two values, huge, tiny, and on a lattice."""
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.05
    w[1], w[2] = 0, -0.0
    w[3], w[4] = w[3].abs(), -w[4].abs()
    w[5], w[6] = w[5].sign(), 0.25
    w[7], w[8], w[9] = w[7] * 4e4, w[8] * 1e-7, w[9] * 1e-30
    w[10, :300], w[11, 5] = 0, -0.0
    w[12], w[13] = (w[12] * 40).round() / 64, w[13] ** 3 * 1e3
    return w


@needs_compiled
@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_pass_gives_the_bytes_of_torch(name, dtype, searched):
    w, scheme = weights().to(dtype), gguf_scheme(name)
    found = typed.round_types(w, scheme, searched=searched)
    assert found is not None
    made, squares, lost = found
    meant = rtn(w.float(), None, scheme, scale_search="mse" if searched else "minmax")
    for field in ("codes", "scale", "zero_point", "super_scale"):
        one, other = getattr(made, field), getattr(meant, field)
        assert (one is None) == (other is None), field
        if one is not None and other is not None:
            assert one.dtype == other.dtype and one.shape == other.shape
            assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), field
    assert squares == pytest.approx(w.double().square().sum().item(), rel=1e-5)
    assert lost == pytest.approx((meant.dequantize() - w.float()).double().square().sum().item(), rel=1e-3)


@needs_compiled
def test_numbers_that_something_is_wrong_with_are_left_to_torch():
    scheme = gguf_scheme("Q4_K")
    for bad in (float("nan"), float("inf"), 3e38):
        w = weights()
        w[18, 511] = bad
        assert typed.round_types(w, scheme, searched=True) is None
    assert typed.round_types(weights(), gguf_scheme("IQ3_S"), searched=True) is None
    assert typed.round_types(weights().T, scheme, searched=True) is None
