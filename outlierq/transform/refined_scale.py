"""Channel scales that minimise the rounding noise of both operands: a geometric program, solved by gradient descent.

Rounding a value to a grid of step d adds noise of variance d^2 / 12. The steps follow the largest value of a token and
of a weight group, so the expected output error of scales s is, up to that factor,

    sum_t (max_j |x_tj| / s_j)^2 / a^2  *  sum_j s_j^2 |W_j|^2
  + sum_og (max_{j in g} |W_oj| s_j)^2 / b^2  *  sum_{j in g} E[x_j^2] / s_j^2

with a and b the largest codes of the two grids. Every term is a product of powers, maxima and sums of s, hence convex
in log s (Boyd et al. 2007, A tutorial on geometric programming), so descent from any start ends at the same place.
SmoothQuant (arXiv:2211.10438) looks along one line of this space only. Static grids have one maximum over all tokens.
E4M3 noise is relative to each value and hardly depends on s; there is nothing to refine.
"""

from __future__ import annotations

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.grid import in_groups

LEARNING_RATE = 0.1  # of Adam on log s, falling to 0
WEIGHT_ROWS = 512


def refined_scale(
    scale: torch.Tensor,
    w: torch.Tensor,
    x: torch.Tensor,
    counts: torch.Tensor,
    scheme: QuantScheme,
    tie: torch.Tensor | None,
    *,
    steps: int,
) -> torch.Tensor:
    """The scale [in] after `steps` steps of descent from `scale`.

    w: [out, in]. x: [tokens, in] with their weights `counts`. tie: [in] producer channel of every input channel;
    channels with one producer keep one scale. Channels that are 0 in all tokens keep theirs.
    """
    noise = _Noise(w, x, counts, scheme)
    tie = torch.arange(len(scale), device=scale.device) if tie is None else tie
    by_producer = scale.new_zeros(int(tie.max()) + 1)
    by_producer[tie] = scale.log()
    logs = torch.nn.Parameter(by_producer)
    optimizer = torch.optim.Adam([logs], lr=LEARNING_RATE)
    for step in range(steps):
        slope = noise.slope(logs.detach()[tie])
        logs.grad = torch.zeros_like(by_producer).index_add_(0, tie, slope)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        optimizer.step()
    return torch.where(noise.alive, logs.detach()[tie].exp(), scale)


class _Noise:
    """The expected output error as a function of log s, and the slope of its logarithm."""

    def __init__(self, w: torch.Tensor, x: torch.Tensor, counts: torch.Tensor, scheme: QuantScheme):
        inputs = scheme.activations
        assert inputs is not None, "the noise of inputs that are not quantized"
        self.one_step = inputs.per == "tensor"
        self.counts = counts / counts.sum()
        self.column_power = w.square().sum(0)
        self.channel_power = (x.square() * self.counts[:, None]).sum(0)
        self.alive = self.channel_power > 0
        if len(w) > WEIGHT_ROWS:
            rows = torch.linspace(0, len(w) - 1, WEIGHT_ROWS, device=w.device).long()
            self.weight_share, w = len(w) / WEIGHT_ROWS, w[rows]
        else:
            self.weight_share = 1.0
        self.columns = w.shape[1]
        self.log_inputs = x.abs().log()
        self.log_weights = in_groups(w, scheme).abs().log()  # [out, groups, columns]
        largest = scheme.code_max if scheme.symmetric else scheme.code_max / 2
        self.weight_factor = self.weight_share / largest**2
        self.input_factor = 1 / inputs.code_max**2
        self.scheme = scheme

    def slope(self, logs: torch.Tensor) -> torch.Tensor:
        """[in] gradient of log(error)."""
        scale = logs.exp()
        from_inputs, inputs_slope = self._input_term(logs, scale)
        from_weights, weights_slope = self._weight_term(logs, scale)
        return (inputs_slope + weights_slope) / (from_inputs + from_weights)

    def _input_term(self, logs: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise of the rounded input and its gradient."""
        largest, place = (self.log_inputs - logs).max(1)
        step = (2 * largest).exp()
        counts = self.counts
        if self.one_step:
            top = step.argmax()
            step, place, counts = step[top][None], place[top][None], torch.ones_like(step[:1])
        steps = step * counts
        spread = scale.square() * self.column_power
        total = steps.sum() * spread.sum() * self.input_factor
        slope = 2 * self.input_factor * steps.sum() * spread
        slope = slope.index_add(0, place, steps, alpha=-2 * self.input_factor * spread.sum().item())
        return total, slope

    def _weight_term(self, logs: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise of the rounded weights and its gradient."""
        power = in_groups((self.channel_power / scale.square())[None], self.scheme)[0]  # [groups, columns]
        largest, place = (self.log_weights + in_groups(logs[None], self.scheme)).max(-1)
        steps = (2 * largest).exp()  # [out, groups]
        group_power = power.sum(1)
        total = (steps.sum(0) * group_power).sum() * self.weight_factor
        slope = -2 * self.weight_factor * steps.sum(0)[:, None] * power
        pulled = 2 * self.weight_factor * steps * group_power
        slope = slope.scatter_add(1, place.T, pulled.T)
        return total, slope.flatten()[: self.columns]
