"""Scale search for the types of GGUF: scales and minima as real numbers first, then the small numbers they count in.

The error is that of `scale_search.py`, d^T H_gg d of each group. A real scale and a real minimum are tried over shares
of the range and then fitted to their own codes in closed form. Only then are units chosen, which the largest of them
decide, and around the nearest small numbers the neighbours are tried, since what is nearest for a scale alone need not
be for its codes. llama.cpp's own search (`make_qkx2_quants` and others of `ggml-quants.c`) does the same under a
diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outlierq.core.gguf.types import BlockType
from outlierq.core.scheme import QuantScheme
from outlierq.ops.codebooks import nearest_vectors
from outlierq.ops.grid import Grid, joined, nearest_code, row_units, small_scale, stored

# Shares of the range: first these, then steps around the best.
COARSE = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62, 0.54, 0.45, 0.35)
FINE = (-0.03, 0.03, -0.015, 0.015)
FITS = 3
NEIGHBOURS = (-1, 1)
# Weights searched at a time, as in `scale_search.py`.
PIECE_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Reals:
    """Scales and minima as real numbers, [out, groups] each: a weight is scale * code - minimum; None: none."""

    scale: torch.Tensor
    minimum: torch.Tensor | None

    def where(self, better: torch.Tensor, other: Reals) -> Reals:
        """These, with `other`'s at the [out, groups] places where `better` is true."""
        minimum = None
        if self.minimum is not None and other.minimum is not None:
            minimum = torch.where(better, other.minimum, self.minimum)
        return Reals(torch.where(better, other.scale, self.scale), minimum)


def search_types(w: torch.Tensor, grouped: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor | None) -> Grid:
    """The best grid found for every group of a weight [out, in]; `grouped` is its view [out, groups, columns].

    blocks: [groups, columns, columns] diagonal blocks of the hessian, [groups, columns] its diagonal where no more is
    known, None for the weight error.
    """
    rows = max(1, PIECE_WEIGHTS // w.shape[1])
    return joined([_TypeSearch(part, scheme, blocks).grid() for part in torch.split(grouped, rows)])


class _TypeSearch:
    """The best scales and minima so far, and their error; all [out, groups]."""

    def __init__(self, grouped: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor | None):
        self.grouped, self.scheme, self.blocks = grouped, scheme, blocks
        self.importance = None if blocks is None else _importance(grouped, blocks)
        self.low, self.high = grouped.amin(-1) + 0.0, grouped.amax(-1) + 0.0  # no negative zeros
        if not scheme.symmetric and scheme.scales == "two-level":  # stored minima have no sign
            self.low, self.high = self.low.clamp(max=0), self.high.clamp(min=0)

    def grid(self) -> Grid:
        """Real numbers by search, then what can be stored."""
        best = self._searched()
        if self.scheme.has_units:
            return self._in_units(best)
        scale = stored(best.scale, self.scheme)
        if self.scheme.kind == "codebook":
            scale = torch.where(best.scale == 0, 2.0**-24, scale)
        if best.minimum is None:
            return Grid(scale, None, self.scheme)
        return Grid(scale, best.minimum.half().float() / scale, self.scheme)

    def _searched(self) -> Reals:
        """The best real numbers."""
        shares = [(share, share) for share in COARSE]
        best, share = self._range(1.0, 1.0), torch.ones(2, *self.low.shape, device=self.low.device)
        least = self._error(best)
        for turned in (False, True) if self._turns else (False,):
            for low, high in shares[1 - turned * 1 :]:
                best, least, share = self._try(best, least, share, (low, high), turned=turned)
        for step in FINE:
            for low, high in ((step, step),) if self.scheme.symmetric else ((step, 0.0), (0.0, step)):
                best, least, share = self._try(best, least, share, (share[0] + low, share[1] + high))
        codes = self._codes(best)
        for _ in range(FITS):
            fitted = self._fitted(best, codes)
            others = self._codes(fitted)
            error = self._error_of(fitted, others)
            better = error < least
            best, least = best.where(better, fitted), torch.minimum(least, error)
            codes = torch.where(better[..., None], others, codes)
        return best

    @property
    def _turns(self) -> bool:
        """Whether a scale of the other sign is worth a try: codes that reach farther on one side, and few of them."""
        return self.scheme.symmetric and self.scheme.vector == 1 and self.scheme.bits <= 4

    def _try(
        self,
        best: Reals,
        least: torch.Tensor,
        share: torch.Tensor,
        shares: tuple[torch.Tensor | float, torch.Tensor | float],
        *,
        turned: bool = False,
    ) -> tuple[Reals, torch.Tensor, torch.Tensor]:
        """The better of `best` and the range of `shares`, with its error and its shares [2, out, groups]."""
        other = self._range(*shares, turned=turned)
        error = self._error(other)
        better = error < least
        asked = torch.stack([torch.as_tensor(each).expand_as(error).to(error) for each in shares])
        return best.where(better, other), torch.minimum(least, error), torch.where(better, asked, share)

    def _range(self, low: torch.Tensor | float, high: torch.Tensor | float, *, turned: bool = False) -> Reals:
        """The numbers that put these shares of the range on the ends of the codes.

        turned: of a symmetric grid, the largest weight on the end that does not reach as far.
        """
        scheme = self.scheme
        if not scheme.symmetric:
            bottom, top = self.low * low, self.high * high
            return Reals((top - bottom).clamp(min=0) / scheme.code_max, -bottom)
        extreme = torch.where(self.high >= -self.low, self.high, self.low)
        if scheme.vector > 1:
            return Reals(extreme.abs() * high / scheme.code_max, None)
        return Reals(extreme * high / (scheme.code_max if turned else scheme.code_min), None)

    def _codes(self, numbers: Reals) -> torch.Tensor:
        """Nearest codes, [out, groups, columns]."""
        scale = torch.where(numbers.scale == 0, 1.0, numbers.scale)[..., None]
        if self.scheme.vector > 1:
            ratio = (self.grouped / scale).view(-1, self.scheme.together)
            importance = None if self.importance is None else self.importance.reshape(-1, self.scheme.together)
            return nearest_vectors(ratio, self.scheme.blocks, importance).view(self.grouped.shape)
        zero = None if numbers.minimum is None else numbers.minimum[..., None] / scale
        return nearest_code(self.grouped / scale, zero, self.scheme)

    def _change(self, numbers: Reals, codes: torch.Tensor) -> torch.Tensor:
        """Rounding errors [out, groups, columns]."""
        change = codes * numbers.scale[..., None]
        if numbers.minimum is not None:
            change.sub_(numbers.minimum[..., None])
        return change.sub_(self.grouped)

    def _error(self, numbers: Reals) -> torch.Tensor:
        """[out, groups] error with the nearest codes."""
        return self._error_of(numbers, self._codes(numbers))

    def _error_of(self, numbers: Reals, codes: torch.Tensor) -> torch.Tensor:
        """[out, groups] error with some codes [out, groups, columns]."""
        change = self._change(numbers, codes)
        return tree_sum(change * self._weighted(change))

    def _weighted(self, change: torch.Tensor) -> torch.Tensor:
        """Each group times its block of the hessian."""
        if self.blocks is None or self.importance is None:
            return change
        if self.blocks.dim() == 2:
            return change * self.importance
        return (change.transpose(0, 1) @ self.blocks).transpose(0, 1)

    def _fitted(self, numbers: Reals, codes: torch.Tensor) -> Reals:
        """The real numbers that fit the codes best, in closed form; those given where there is no solution."""
        weighted = self._weighted(codes)
        power, target = tree_sum(weighted * codes), tree_sum(weighted * self.grouped)
        if numbers.minimum is None:
            scale = torch.where(power > 0, target / power, numbers.scale)
            return Reals(scale, None)
        ones = self._weighted(torch.ones_like(codes))
        cross, whole, level = tree_sum(weighted), tree_sum(ones), tree_sum(ones * self.grouped)
        determinant = power * whole - cross.square()
        usable = determinant > 1e-6 * power * whole
        scale = torch.where(usable, (target * whole - level * cross) / determinant, numbers.scale)
        minimum = torch.where(usable, (cross * target - power * level) / determinant, numbers.minimum)
        if self.scheme.scales == "two-level":
            usable = (minimum >= 0) & (scale > 0)
            minimum = torch.where(usable, minimum, numbers.minimum)
            scale = torch.where(usable, scale, numbers.scale)
        return Reals(scale, minimum)

    def _in_units(self, best: Reals) -> Grid:
        """Small numbers near the best real ones, in units of the largest of every block."""
        kind = self.scheme.blocks
        low = None if best.minimum is None else -best.minimum
        units = row_units(best.scale, low, kind)
        unit = units.repeat_interleave(kind.groups, 1).unbind(-1)
        small = [(best.scale / unit[0]), *([] if best.minimum is None else [best.minimum / unit[1]])]
        small = [_small(each, kind, number) for number, each in enumerate(small)]
        for number in reversed(range(len(small))):
            small = self._with_neighbours(small, unit, kind, number)
        numbers = _reals(small, unit)
        zero_point = None if numbers.minimum is None else numbers.minimum / numbers.scale
        return Grid(numbers.scale, zero_point, self.scheme, units)

    def _with_neighbours(
        self, small: list[torch.Tensor], unit: tuple[torch.Tensor, ...], kind: BlockType, number: int
    ) -> list[torch.Tensor]:
        """The same with one of its numbers, scale or minimum, a step lower or higher where that errs less.

        The largest of a block stays: the unit is chosen for it.
        """
        least, fixed = self._error(_reals(small, unit)), small[number].abs() >= kind.small[1]
        for step in NEIGHBOURS:
            other = list(small)
            moved = _small(small[number] + step * kind.step, kind, number)
            other[number] = torch.where(fixed, small[number], moved)
            error = self._error(_reals(other, unit))
            small[number] = torch.where(error < least, other[number], small[number])
            least = torch.minimum(least, error)
        return small


def _importance(grouped: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Weights of squared errors [groups, columns], the diagonals of blocks; [out, groups, columns] where no more than a
    diagonal is known.

    Large weights then count more: llama.cpp's rule, h * sqrt(2 * mean(w^2) + w^2), which takes the place of what the
    other entries would say. Without it BabyLlama in Q2_K has a KL of 0.47, with it 0.38.
    """
    if blocks.dim() == 3:
        return blocks.diagonal(dim1=1, dim2=2)
    square = grouped.square()
    return blocks * (2 * square.mean(-1, keepdim=True) + square).sqrt()


def tree_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sums over the last of [..., columns], a power of two: the second half is added to the first until one is left.

    As native/types.c adds, so that both agree in the last bit; torch's own order differs by processor.
    """
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def _reals(small: list[torch.Tensor], unit: tuple[torch.Tensor, ...]) -> Reals:
    """The numbers that small ones stand for."""
    minimum = small[1] * unit[1] if len(small) > 1 else None
    return Reals(small[0] * unit[0], minimum)


def _small(ratio: torch.Tensor, kind: BlockType, number: int) -> torch.Tensor:
    """The nearest small scale (number 0; never 0) or minimum (1)."""
    return small_scale(ratio.clone(), kind) if number == 0 else ratio.round().clamp(0, kind.small[1])
