"""Hadamard matrices of the widths that language models have, and rotations made of them.

A Hadamard matrix M of order n has entries +-1 and M M^T = n I; orders are 1, 2 and multiples of 4. Here n = K 2^a with
M = core_K (x) Sylvester_(2^a), the core by Paley's two constructions (Paley 1933) or from a table of Goethals-Seidel
sequences (`data/goethals_seidel.json`). Most cores are not symmetric: M and M^T must not be mixed up, which no test
with a power of two would notice. So nothing here is merged by formula: a weight is rotated by the very routine that
rotates the vectors it reads or writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product
from typing import Any

import torch

# Largest core that is built: 924 is the largest that a known model needs (a feed-forward width of 29568).
LARGEST_CORE = 1024


class NoHadamardError(ValueError):
    """No construction here gives a Hadamard matrix of this order."""


def hadamard(n: int) -> torch.Tensor:
    """M, [n, n] int64 with entries +-1 and M M^T = n I; its first row is all ones. NoHadamardError."""
    order = core_order(n)
    matrix = hadamard_core(order)
    for _ in range((n // order).bit_length() - 1):
        matrix = torch.kron(matrix, torch.tensor([[1, 1], [1, -1]]))
    return matrix


@cache
def core_order(n: int) -> int:
    """The smallest order K with a construction of its own such that n = K 2^a. NoHadamardError when there is none."""
    if n < 1:
        raise NoHadamardError(f"{n} is not an order")
    odd = n // (n & -n)
    order = odd
    while order <= min(n, LARGEST_CORE):
        if order == 1 or _construction(order) is not None:
            return order
        order *= 2
    raise NoHadamardError(f"no Hadamard matrix of order {n} is known here")


@cache
def hadamard_core(order: int) -> torch.Tensor:
    """The core of that order, [K, K] int64, columns signed so that the first row is all ones."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    build = _construction(order)
    if build is None:
        raise NoHadamardError(f"there is no construction of order {order}")
    core = build()
    core = core * core[:1]
    wide = core.double()
    assert torch.equal(wide @ wide.T, order * torch.eye(order, dtype=torch.float64)), f"core {order} is no Hadamard"
    return core


def largest_order(n: int) -> int:
    """The largest divisor of n that is a Hadamard order: n itself, or the width of the blocks of a fallback."""
    for parts in range(1, n + 1):
        if n % parts == 0 and _has_order(n // parts):
            return n // parts
    raise NoHadamardError(f"{n} is not a width")


def _has_order(n: int) -> bool:
    try:
        core_order(n)
    except NoHadamardError:
        return False
    return True


def _construction(order: int) -> Callable[[], torch.Tensor] | None:
    """The function that builds a core of this order, or None."""
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and prime_power(order - 1):
        return lambda: paley_one(order - 1)
    half = order // 2 - 1
    if half % 4 == 1 and prime_power(half):
        return lambda: paley_two(half)
    if order in goethals_seidel_orders():
        return lambda: goethals_seidel(order)
    return None


def paley_one(q: int) -> torch.Tensor:
    """I + S of order q + 1 for a prime power q = 3 mod 4; S = [0 1; -1 Q] is skew, Q_ij = chi(i - j).

    int64 [q + 1, q + 1].
    """
    skew = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, quadratic_characters(q)
    return skew + torch.eye(q + 1, dtype=torch.int64)


def paley_two(q: int) -> torch.Tensor:
    """C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1] of order 2 (q + 1), q = 1 mod 4; C = [0 1; 1 Q] is symmetric.

    int64 [2 (q + 1), 2 (q + 1)].
    """
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, quadratic_characters(q)
    one, two = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(conference, one) + torch.kron(torch.eye(q + 1, dtype=torch.int64), two)


def quadratic_characters(q: int) -> torch.Tensor:
    """Q_ij = chi(i - j), [q, q], over the elements of GF(q): 0 on the diagonal, 1 for squares, -1 for the others."""
    field = prime_power(q)
    assert field is not None, f"{q} is no power of a prime"
    prime, degree = field
    elements = torch.tensor(list(product(range(prime), repeat=degree)))  # coefficients, [q, degree]
    places = prime ** torch.arange(degree - 1, -1, -1)
    chi = torch.zeros(q, dtype=torch.int64)
    for power, element in enumerate(_powers_of_a_generator(prime, degree)):
        chi[(torch.tensor(element) * places).sum()] = 1 if power % 2 == 0 else -1
    differences = (elements[:, None] - elements[None, :]) % prime
    return chi[(differences * places).sum(-1)]


def _powers_of_a_generator(prime: int, degree: int) -> list[tuple[int, ...]]:
    """1, g, g^2, ... : every non-zero element of GF(prime^degree) once; even powers are the squares.

    Elements are polynomials (coefficients, highest power first) modulo the first monic polynomial for which x
    generates all of them. For a prime field that is x - g, so x is the primitive root g.
    """
    count = prime**degree - 1
    for tail in product(range(prime), repeat=degree):  # x^degree = tail
        element: tuple[int, ...] = (0,) * (degree - 1) + (1,)
        powers: list[tuple[int, ...]] = []
        while element not in powers[:1] and any(element) and len(powers) < count:
            powers.append(element)
            lead = element[0]
            shifted = (*element[1:], 0)
            element = tuple((s + lead * t) % prime for s, t in zip(shifted, tail, strict=True))
        if len(powers) == count and element == powers[0]:
            return powers
    raise ValueError(f"{prime}^{degree} has no field")


@cache
def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    prime = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    degree, rest = 0, q
    while rest > 1 and rest % prime == 0:
        rest, degree = rest // prime, degree + 1
    return (prime, degree) if rest == 1 and degree else None


@cache
def _table() -> dict[str, dict[str, Any]]:
    """The table of Goethals-Seidel sequences, by order."""
    path = resources.files("outlierq") / "data" / "goethals_seidel.json"
    table: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["orders"]
    return table


def goethals_seidel_orders() -> tuple[int, ...]:
    """Orders of the table."""
    return tuple(int(order) for order in _table())


def goethals_seidel(order: int) -> torch.Tensor:
    """[A BJ CJ DJ; -BJ A D'J -C'J; -CJ -D'J A B'J; -DJ C'J -B'J A] of four circulants; J reverses, ' transposes.

    int64 [order, order].
    """
    entry = _table()[str(order)]
    a, b, c, d = (_circulant(entry["n"], entry["subgroup"], minus) for minus in entry["minus"])

    def flip(block: torch.Tensor) -> torch.Tensor:
        return block.flip(1)  # times J

    rows = [
        [a, flip(b), flip(c), flip(d)],
        [-flip(b), a, flip(d.T), -flip(c.T)],
        [-flip(c), -flip(d.T), a, flip(b.T)],
        [-flip(d), flip(c.T), -flip(b.T), a],
    ]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _circulant(n: int, subgroup: list[int], minus: list[int]) -> torch.Tensor:
    """A_ij = s[(j - i) mod n], s = -1 on the orbits of `minus` under multiplication by the subgroup."""
    sequence = torch.ones(n, dtype=torch.int64)
    for representative in minus:
        for factor in subgroup:
            sequence[representative * factor % n] = -1
    places = torch.arange(n)
    return sequence[(places[None, :] - places[:, None]) % n]


def hadamard_transform(x: torch.Tensor, *, transpose: bool = False) -> torch.Tensor:
    """x M^T / sqrt(n) over the last axis, or x M / sqrt(n) with `transpose`; the two are inverse to each other.

    x: [..., n]. Butterflies over the power of two, then a product with the core: n (log2(n / K) + K) operations a row.
    """
    n = x.shape[-1]
    order = core_order(n)
    size = n // order
    y, step = x.reshape(-1, n), 1
    while step < size:
        even, odd = y.reshape(-1, 2, step).unbind(1)
        y = torch.stack([even + odd, even - odd], 1)
        step *= 2
    if order > 1:
        core = hadamard_core(order).to(y.device, y.dtype)
        y = (core.T if transpose else core) @ y.reshape(-1, order, size)
    root: float = n**0.5
    return y.reshape(x.shape) / root


@dataclass(frozen=True)
class Rotation:
    """A random orthogonal matrix R of size n made of Hadamard matrices, applied without being formed.

    n: width. block: order of the Hadamard matrix, n, or a divisor of n where there is none of order n: R is then block
    diagonal. seed: of the signs, diag(d) below; it decides R. keeps_mean: R also fixes the all-ones vector, so that a
    vector without mean stays without.

    x R = (x * d) M^T / sqrt(block); with keeps_mean x R = ((x M^T) * d) M / block, where d is 1 for the row of ones.
    """

    n: int
    block: int
    seed: int
    keeps_mean: bool = False

    @classmethod
    def of(cls, n: int, seed: int, *, keeps_mean: bool = False) -> Rotation:
        """With the largest Hadamard matrix that fits the width."""
        return cls(n, largest_order(n), seed, keeps_mean)

    @property
    def signs(self) -> torch.Tensor:
        """[n] float64, +-1."""
        drawn = torch.randint(0, 2, (self.n,), generator=torch.Generator().manual_seed(self.seed))
        signs = drawn.double() * 2 - 1
        if self.keeps_mean:
            signs[:: self.block] = 1
        return signs

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x R over the last axis of x [..., n], in its dtype."""
        if x.shape[-1] != self.n:
            raise ValueError(f"the last axis has {x.shape[-1]} entries, the rotation {self.n}")
        signs = self.signs.to(x.device, x.dtype).reshape(-1, self.block)
        blocks = x.reshape(*x.shape[:-1], -1, self.block)
        if self.keeps_mean:
            rotated = hadamard_transform(hadamard_transform(blocks) * signs, transpose=True)
        else:
            rotated = hadamard_transform(blocks * signs)
        return rotated.reshape(x.shape)

    def __str__(self) -> str:
        if self.block == self.n:
            order = core_order(self.n)
            kind = f"Hadamard {self.n}" + (f" = {order} x {self.n // order}" if 1 < order < self.n else "")
        else:
            kind = f"{self.n // self.block} Hadamard blocks of {self.block} ({self.n} is no order that can be built)"
        return kind + (", keeping the mean" if self.keeps_mean else "")
