"""Hessians of bfloat16 inputs: the compiled sums are those of float32 products, for any shape and number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outlierq.ops.compiled import gram as native
from outlierq.ops.gram import add_gram, mirror

needs_compiled = pytest.mark.skipif(native._compiled() is None, reason="no such processor, or nothing was compiled")


def inputs(tokens: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator).pow(4) * 50
    x[:, 0] = 0
    return x.bfloat16()


@needs_compiled
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (2, 63), (7, 64), (513, 65), (1100, 200), (64, 1030)])
def test_the_sums_are_those_of_float64_to_float32(tokens, columns):
    x, total = inputs(tokens, columns), torch.zeros(columns, columns)
    for _ in range(2):
        assert native.add_gram(total, x)
    expected = 2 * x.double().T @ x.double()
    assert torch.allclose(mirror(total).double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


@needs_compiled
def test_any_number_of_threads_gives_the_same_bits():
    x, before, found = inputs(700, 300), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.zeros(300, 300))
            native.add_gram(found[-1], x)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


@needs_compiled
def test_a_nan_among_the_inputs_reaches_the_sum():
    x, total = inputs(40, 70), torch.zeros(70, 70)
    x[3, 66] = float("nan")
    native.add_gram(total, x)
    assert total[:67, 66].isnan().all() and total[:66, :66].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_left_to_torch(dtype):
    total = torch.zeros(8, 8)
    assert not native.add_gram(total, torch.ones(4, 8, dtype=dtype))
    add_gram(total, torch.ones(4, 8, dtype=dtype))
    assert torch.all(total.triu() == torch.full((8, 8), 4.0).triu())


@needs_compiled
def test_code_that_was_compiled_wrongly_is_not_used(monkeypatch):
    real = native.library()

    class Faulty:
        """The library, with sums that stay as they are."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    class Idle:
        argtypes = ()

        def __call__(self, *given: Any) -> int:
            return 0

    faulty = Faulty()
    faulty.outlierq_add_gram = Idle()
    monkeypatch.setattr(native, "library", lambda: faulty)
    native._compiled.cache_clear()
    try:
        assert not native.add_gram(torch.zeros(8, 8), inputs(4, 8))
    finally:
        native._compiled.cache_clear()
