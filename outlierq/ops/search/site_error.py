"""What quantizing one linear input and the weights that read it will cost, predicted from calibration rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from outlierq.core.errors import NumbersError
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.activations import fake_quantize
from outlierq.ops.grid import Grid, from_groups, in_groups, minmax_grid, stored
from outlierq.ops.precision import matmul_operands
from outlierq.ops.search.clip_search import weighed_rows
from outlierq.ops.search.scale_search import search_grid

# Output rows and tokens that judge: the error is a mean over both, and ranks moves just as well on a part of them.
OUTPUT_ROWS = 1024
TOKENS = 384
# Share of the range that a judging grid of few bits covers. Symmetric: KL 0.1435 at 0.9 against 0.1470 for the min-max
# grid; asymmetric grids are best judged at their full range: 0.1318 against 0.1482 at 0.9 (AWQ, SmolLM2-135M, g64).
SYMMETRIC_RANGE = 0.9
FEW_BITS = 6
# Shares of the largest |x| that a static scale may span: steps of 2^(1/4) down to 1/16.
STATIC_SHARES = tuple(2 ** (-step / 4) for step in range(17))


class SiteError:
    """Relative output error of one input group, both operands quantized, as a function of what is moved.

    For scale s and shift z: sum over tokens of ||Qx((x - z) / s) Qw(W s)^T - (x - z) W^T||^2 / sum ||x W^T||^2, with Qx
    the scheme's activation grid (ops/activations.py) and Qw rounding to the nearest point of its weight grid.
    Tokens are rows of the reservoir, and the first tokens of sequences.
    Without an activation scheme the sum is tr(D H D^T), with D the rounding error of the weights and H the hessian, if
    that is held.

    w: [out, in] float32, every linear that reads the input, stacked. NumbersError when something is not finite.
    """

    def __init__(self, w: torch.Tensor, stats: InputStats, scheme: QuantScheme):
        if len(w) > OUTPUT_ROWS:
            w = w[torch.linspace(0, len(w) - 1, OUTPUT_ROWS, device=w.device).long()]
        self.w, self.scheme, self.stats = w, scheme, stats
        self.hessian = None
        if scheme.activations is None and stats.hessian is not None:
            self.hessian = stats.need("hessian")
            self.power = _power(w, self.hessian)
        else:
            self.x, self.weights = judging_tokens(stats)
            self.x, self.weights = self.x.to(w.device), self.weights.to(w.device)
            with matmul_operands(torch.bfloat16):
                self.power = ((self.x @ w.T).square().sum(1) * self.weights).sum().item()

    def __call__(
        self, scale: torch.Tensor, shift: torch.Tensor | None = None, *, grid: Callable[..., Grid] | None = None
    ) -> float:
        """The relative error of this move; 0 where the output is 0 anyway. grid: of a weight, or the judging one."""
        scaled = self.w * scale
        rounded = rounded_by((grid or judging_grid)(scaled, self.scheme), scaled)
        if self.hessian is not None:
            error = _power((rounded - scaled) / scale, self.hessian)
        else:
            error = self._token_error(scaled, rounded, scale, shift)
        if not math.isfinite(error):
            raise NumbersError("the predicted output error is not finite", hint="look for a NaN or Inf in the weights")
        return error / self.power if self.power > 0 else 0.0

    def helps(self, scale: torch.Tensor, shift: torch.Tensor | None = None) -> bool:
        """Whether a move also helps grids of few bits whose scale is searched, which profit from searching most."""
        if self.scheme.bits > FEW_BITS:
            return True

        def searched(w: torch.Tensor, scheme: QuantScheme, by: torch.Tensor) -> Grid:
            hessian = None if self.hessian is None else self.hessian / (by[:, None] * by)
            return search_grid(w, scheme, hessian)

        none = torch.ones_like(scale)
        before = self(none, grid=partial(searched, by=none))
        return self(scale, shift, grid=partial(searched, by=scale)) < before

    def _token_error(
        self, scaled: torch.Tensor, rounded: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None
    ) -> float:
        """The weighted sum over tokens, split so that operands of 16 bits do not drown small errors."""
        x = (self.x if shift is None else self.x - shift) / scale
        change = self._round_input(x, rounded) - x
        with matmul_operands(torch.bfloat16):
            error = (change @ rounded.T).addmm_(x, (rounded - scaled).T)
        return (error.square_().sum(1) * self.weights).sum().item()

    def _round_input(self, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        """Qx(x); a static scale is the one of `STATIC_SHARES` that errs least, weighed by the size of the columns."""
        scheme = self.scheme.activations
        if scheme is None:
            return x
        if scheme.per != "tensor":
            return fake_quantize(x, scheme)
        full = x.abs().amax().clamp(min=torch.finfo(torch.float32).tiny) / scheme.code_max
        if scheme.dynamic:
            return fake_quantize(x, scheme, full)
        importance = rounded.square().sum(0)
        candidates = (fake_quantize(x, scheme, full * share) for share in STATIC_SHARES)
        return min(candidates, key=lambda q: ((q - x).square_() @ importance * self.weights).sum().item())


def _power(w: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H W^T)."""
    with matmul_operands(torch.bfloat16):
        return (w @ hessian).mul_(w).sum().item()


def judging_tokens(stats: InputStats) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, K] float32 and how many calibration tokens each stands for; StatsError without a reservoir."""
    rows, counts = weighed_rows(stats)
    if len(rows) > TOKENS:
        places = torch.linspace(0, len(rows) - 1, TOKENS, device=rows.device).long()
        rows, counts = rows[places], counts[places]
    return rows, counts


def rounded_by(grid: Grid, w: torch.Tensor) -> torch.Tensor:
    """`w` [out, in] rounded to the nearest points of a grid."""
    return from_groups(grid.round(in_groups(w, grid.scheme)), w.shape[1])


def judging_grid(w: torch.Tensor, scheme: QuantScheme) -> Grid:
    """A grid close to the one that a scale search would end at for w [out, in], without searching."""
    if not scheme.symmetric or scheme.bits > FEW_BITS or scheme.kind == "float":
        return minmax_grid(w, scheme)
    largest = in_groups(w, scheme).abs().amax(-1)
    return Grid(stored(SYMMETRIC_RANGE * largest / (scheme.code_max + 0.5), scheme), None, scheme)
