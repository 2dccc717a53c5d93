"""Hadamard matrices of every order that language models need, and rotations made of them."""

from __future__ import annotations

import pytest
import torch

from outlierq.ops.hadamard import (
    NoHadamardError,
    Rotation,
    core_order,
    goethals_seidel,
    goethals_seidel_orders,
    hadamard,
    hadamard_core,
    hadamard_transform,
    largest_order,
    paley_one,
    paley_two,
    prime_power,
    quadratic_characters,
)

CORES = (12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 92, 100, 108, 140, 148, 156, 172)
# core -> widths of published models (hidden and feed-forward)
WIDTHS = {
    1: (64, 2048, 4096, 16384),
    12: (768, 1536, 3072, 12288),
    20: (1280, 2560, 5120, 10240),
    28: (896, 3584, 7168, 14336, 28672),
    36: (576, 1152, 2304, 9216),
    44: (1408, 5632),
    60: (960, 3840, 15360),
    68: (17408,),
    76: (4864, 9728),
    84: (5376, 21504),
    100: (1600, 25600),
    108: (6912, 13824, 27648),
    140: (8960,),
    148: (18944,),
    172: (11008,),
    924: (29568,),
}


def check(matrix: torch.Tensor, order: int) -> None:
    """A Hadamard matrix, in whole numbers."""
    assert matrix.dtype == torch.int64 and matrix.shape == (order, order)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64))


@pytest.mark.parametrize("order", CORES)
def test_rows_of_a_core_are_orthogonal_in_whole_numbers(order):
    check(hadamard_core(order), order)
    assert hadamard_core(order)[0].eq(1).all()


@pytest.mark.parametrize("core", CORES)
def test_a_core_times_a_power_of_two_is_an_order(core):
    for power in (2, 4):
        assert core_order(core * power) == core
        check(hadamard(core * power), core * power)


def test_powers_of_two_need_no_core():
    for order in (1, 2, 4, 8, 128):
        assert core_order(order) == 1
        check(hadamard(order), order)


def test_the_largest_core_is_one_too():
    check(hadamard_core(924), 924)


@pytest.mark.parametrize(("core", "width"), [(core, width) for core, widths in WIDTHS.items() for width in widths])
def test_every_width_of_known_models_has_its_core(core, width):
    assert core_order(width) == core
    assert largest_order(width) == width


@pytest.mark.parametrize("q", [25, 27, 49, 9, 13, 43])
def test_quadratic_characters_are_those_of_a_field(q):
    # Q Q^T = q I - J and Q J = 0 hold for the characters of GF(q) (Paley 1933); integers mod 25, 27 or 49 fail it.
    characters = quadratic_characters(q)
    ones = torch.ones(q, q, dtype=torch.int64)
    assert torch.equal(characters @ characters.T, q * torch.eye(q, dtype=torch.int64) - ones)
    assert not (characters @ ones).any()
    assert torch.equal(characters.T, characters if q % 4 == 1 else -characters)


@pytest.mark.parametrize("q", [3, 7, 11, 19, 23, 27])
def test_paleys_first_construction_gives_order_q_plus_one(q):
    check(paley_one(q), q + 1)


@pytest.mark.parametrize("q", [5, 9, 13, 17, 25, 37, 49])
def test_paleys_second_construction_gives_order_two_q_plus_two(q):
    check(paley_two(q), 2 * q + 2)


def test_all_five_goethals_seidel_orders_are_built_from_the_table():
    assert goethals_seidel_orders() == (52, 92, 100, 156, 172)
    for order in goethals_seidel_orders():
        check(goethals_seidel(order), order)


def test_prime_powers_are_told_from_other_numbers():
    assert [prime_power(q) for q in (2, 25, 27, 49, 461)] == [(2, 1), (5, 2), (3, 3), (7, 2), (461, 1)]
    assert [prime_power(q) for q in (1, 6, 45, 91)] == [None] * 4


@pytest.mark.parametrize("n", [2, 12, 44, 64, 96, 172, 576])
def test_the_fast_transform_is_the_product_with_the_matrix(n):
    x = torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = hadamard(n).double() / n**0.5
    assert torch.allclose(hadamard_transform(x), x @ matrix.T, atol=1e-12)
    assert torch.allclose(hadamard_transform(x, transpose=True), x @ matrix, atol=1e-12)


def test_the_test_above_can_tell_a_matrix_from_its_transpose():
    assert any(not torch.equal(hadamard(n), hadamard(n).T) for n in (12, 44, 172))


@pytest.mark.parametrize("n", [44, 576])
def test_inputs_and_weights_that_are_transformed_alike_give_the_same_products(n):
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(4, n, dtype=torch.float64, generator=generator), torch.randn(6, n, generator=generator).double()
    assert torch.allclose(hadamard_transform(x) @ hadamard_transform(w).T, x @ w.T, atol=1e-11)
    # One of them transposed is the classic mistake; powers of two would not show it.
    assert not torch.allclose(hadamard_transform(x) @ hadamard_transform(w, transpose=True).T, x @ w.T, atol=1)


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("n", [44, 64, 188])
def test_a_rotation_is_orthogonal_and_keeps_the_mean_where_asked(n, keeps_mean):
    rotation = Rotation.of(n, 7, keeps_mean=keeps_mean)
    matrix = rotation.apply(torch.eye(n, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    ones = torch.ones(n, dtype=torch.float64)
    assert torch.allclose(rotation.apply(ones), ones, atol=1e-12) == keeps_mean


def test_one_spike_is_spread_evenly_over_all_channels():
    spike = torch.zeros(576, dtype=torch.float64)
    spike[100] = 24.0
    assert torch.allclose(Rotation.of(576, 0).apply(spike).abs(), torch.ones(576, dtype=torch.float64), atol=1e-12)
    assert Rotation.of(576, 0, keeps_mean=True).apply(spike).abs().max() < 5


def test_the_seed_decides_the_rotation():
    x = torch.randn(60, dtype=torch.float64)
    assert torch.equal(Rotation.of(60, 3).apply(x), Rotation.of(60, 3).apply(x))
    assert not torch.allclose(Rotation.of(60, 3).apply(x), Rotation.of(60, 4).apply(x))


def test_a_width_without_a_matrix_is_rotated_in_blocks():
    with pytest.raises(NoHadamardError, match="no Hadamard matrix of order 188 is known here"):
        core_order(188)
    rotation = Rotation.of(376, 0)
    assert rotation.block == 8 and str(rotation) == "47 Hadamard blocks of 8 (376 is no order that can be built)"
    spike = torch.zeros(376, dtype=torch.float64)
    spike[40] = 1.0
    touched = rotation.apply(spike).nonzero().flatten()
    assert touched.tolist() == list(range(40, 48))


def test_an_odd_width_has_no_rotation_but_signs():
    assert largest_order(49) == 1
    with pytest.raises(NoHadamardError):
        core_order(0)


def test_an_input_of_another_width_is_our_own_mistake():
    with pytest.raises(ValueError, match="the last axis has 8 entries, the rotation 4"):
        Rotation.of(4, 0).apply(torch.ones(8))
