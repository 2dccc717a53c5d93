"""Learned rounding of a whole block. SignRound, Cheng et al. 2023, arXiv:2309.05516, from where GPTQ has ended.

Linears that are rounded one by one cannot make up for each other; here codes and scales of all linears of a block move
against the gradient of the squared error of the block's output, on the inputs behind quantized blocks. Codes that are
near their rounding limit move first: each weight begins where it lies between them, at most FAR from the code that
GPTQ gave it. What counts at last are batches of text that no gradient saw: of all states that were looked at the best
on them is taken, and that is the start where learning did not help.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt

from outlierq.core.model import LinearSite
from outlierq.core.notes import note
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.rounded_block import RoundedBlock
from outlierq.core.scheme import QuantScheme
from outlierq.ops.grid import code_dtype, nearest_code, stored
from outlierq.ops.search.descent import Adam, in_turn, split
from outlierq.quantize.moving import gathered, spread
from outlierq.registry import learner

FAR = 0.45  # of the way between two codes: how far from its own a weight may begin
LOOKS = 8  # how often the error on held-out batches is looked at


@learner("block_round", paper="arXiv:2309.05516")
def block_round(
    block: RoundedBlock,
    *,
    steps: Annotated[int, Ge(0)] = 60,
    step_tokens: Annotated[int, Ge(1)] = 2048,
    tune: Literal["codes", "scales", "codes and scales"] = "codes and scales",
    code_reach: Annotated[float, Gt(0)] = 0.3,
    scale_reach: Annotated[float, Gt(0)] = 0.12,
    seed: int = 0,
) -> dict[LinearSite, QuantTensor]:
    """The start with codes and scales [out, in] that err less at the output of the block, on text held out of learning.

    steps: of gradient descent, each on about `step_tokens` of text; steps fall linearly to 0. tune: what may move;
    scales do where they are plain numbers. code_reach: how far a weight may go in all steps together, in units of a
    scale; scale_reach: a scale, relative. More steps are finer, not longer: what goes farther leaves the start, whose
    errors make up for each other, without a way back (KL of a model of 0.94 M parameters: 0.0095 with a reach of 0.15,
    0.0092 with 0.3, 0.0099 with 0.6, 0.0100 with 0.7). step_tokens: of text, in each step. seed: of the order of the
    text. Linears whose codes stand for several weights, or lie in a table, stay as they are.
    """
    linears = {s: _Linear(block.weights[s], q, tune) for s, q in block.start.items() if _learnable(q)}
    if not steps or not linears:
        return dict(block.start)
    moving = [part for linear in linears.values() for part in linear.moving(code_reach, scale_reach)]
    learning, held_out = split(block.batches)
    best, first = dict(block.start), _error(block, block.start, held_out)
    least = first
    walk = _Walk(moving, steps)
    together = step_tokens // block.asked(0)[..., 0].numel()
    for step, some in enumerate(in_turn(learning, together, steps, seed)):
        trouble = _gradients(block, linears, some)
        if trouble:
            note(f"learning stopped at step {step} of {steps}: {trouble}")
            break
        walk.step(step)
        if (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps:
            now = {**block.start, **{site: linear.stored() for site, linear in linears.items()}}
            error = _error(block, now, held_out)
            if error < least:
                best, least = now, error
    note(f"learned: the block's held-out output error is {least / first if first else 1:.3f} of what it was")
    return best


def _learnable(quantized: QuantTensor) -> bool:
    """Whether each weight has a code of its own on a grid of steps."""
    return quantized.scheme.kind != "codebook" and quantized.scheme.vector == 1 and quantized.outlier_columns is None


@dataclass
class _Moving:
    """Numbers that learning moves, of any shape, against `gradient` of the same shape, by `reach` in all."""

    values: torch.Tensor
    gradient: torch.Tensor
    reach: float


class _Linear:
    """A linear while it is learned: W = (scale * codes + low) * (1 + change), low being what code 0 stands for.

    place: [out, in], what is rounded to codes. change: [rows, groups] of scales. scale, low: [out, in].
    """

    def __init__(self, w: torch.Tensor, start: QuantTensor, tune: str):
        self.start, self.scheme = start, start.scheme
        self.scale = spread(start.float_scale, self.scheme, w.shape)
        self.low = replace(start, codes=torch.zeros_like(start.codes)).dequantize()
        codes = start.codes.float()
        gap = _gap(codes, self.scheme)
        self.place = codes + ((w - self.low) / self.scale - codes).div_(gap).clamp_(-FAR, FAR).mul_(gap)
        self.change = torch.zeros_like(start.scale, dtype=torch.float32)
        self.moves_codes = "codes" in tune
        self.moves_scales = "scales" in tune and self.scheme.scales == "plain"
        self.by_place, self.by_change = torch.zeros_like(self.place), torch.zeros_like(self.change)

    def moving(self, code_reach: float, scale_reach: float) -> Iterator[_Moving]:
        """What learning moves."""
        if self.moves_codes:
            yield _Moving(self.place, self.by_place, code_reach)
        if self.moves_scales:
            yield _Moving(self.change, self.by_change, scale_reach)

    def _codes(self) -> torch.Tensor:
        """[out, in] float32."""
        if not self.moves_codes:
            return self.start.codes.float()
        return nearest_code(self.place.clone(), None, self.scheme)

    def _base(self) -> torch.Tensor:
        """The weight [out, in] before its scales change."""
        return torch.addcmul(self.low, self._codes(), self.scale)

    def weight(self) -> torch.Tensor:
        """The weight [out, in] as it is now, a leaf that gradients are of."""
        return self._base().mul_(1 + spread(self.change, self.scheme, self.place.shape)).requires_grad_()

    def take(self, gradient: torch.Tensor) -> None:
        """Add a gradient [out, in] of the weight to those of what moves; rounding is passed over (straight-through)."""
        if self.moves_codes:
            self.by_place.addcmul_(gradient, self.scale)
        if self.moves_scales:
            self.by_change += gathered(gradient * self._base(), self.scheme, self.change.shape)

    def stored(self) -> QuantTensor:
        """What the linear is now, as it will be read back."""
        codes = self._codes().to(code_dtype(self.scheme))
        if not self.moves_scales:
            return replace(self.start, codes=codes)
        scale = stored(self.start.scale.float() * (1 + self.change), self.scheme)
        return replace(self.start, codes=codes, scale=scale.to(self.start.scale.dtype))


def _gap(codes: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """How far a code [out, in] is from the next one: 1, of floats by their exponent and the bits behind it."""
    if scheme.kind == "int":
        return torch.ones_like(codes)
    behind, least = {4: (1, 0), 6: (3, 0), 8: (3, -6)}[scheme.bits]
    exponent = torch.frexp(codes).exponent - 1
    return torch.ldexp(torch.ones_like(codes), exponent.clamp(min=least) - behind)


class _Walk:
    """Adam (arXiv:1412.6980) in steps that fall linearly to 0.

    The paper steps by the sign of the gradient alone: the KL of a model of 0.94 M parameters was 7 % higher.
    """

    def __init__(self, moving: Sequence[_Moving], steps: int):
        self.moving, self.steps = moving, steps
        self.adams = [Adam(each.values) for each in moving]

    def step(self, number: int) -> None:
        """Step number `number`, from 0; gradients are zero after it."""
        share = (self.steps - number) / (self.steps * (self.steps + 1) / 2)
        for each, adam in zip(self.moving, self.adams, strict=True):
            each.values.sub_(adam.direction(each.gradient, number + 1), alpha=each.reach * share)
            each.gradient.zero_()


def _gradients(block: RoundedBlock, linears: Mapping[LinearSite, _Linear], batches: Sequence[int]) -> str:
    """Give every linear the gradient of the mean error of some batches; why there is none, empty where there is."""
    weights = {site: linear.weight() for site, linear in linears.items()}
    others = {site: q.dequantize() for site, q in block.start.items() if site not in linears}
    for batch in batches:
        try:
            with torch.enable_grad():
                (_lost(block, {**others, **weights}, batch) / len(batches)).backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what autograd raises where it meets what it cannot differentiate
            return f"the block cannot be differentiated ({str(error).splitlines()[0]})"
    gradients = {site: weight.grad for site, weight in weights.items() if weight.grad is not None}
    if not all(gradient.isfinite().all() for gradient in gradients.values()):
        return "a gradient was not finite"
    for site, gradient in gradients.items():
        linears[site].take(gradient)
    return ""


def _lost(block: RoundedBlock, weights: Mapping[LinearSite, torch.Tensor], batch: int) -> torch.Tensor:
    """The mean over the tokens of a batch of |error|^2 / |asked|^2 at the output of the block with weights [out, in].

    Relative, since a norm follows: a first token, which others attend to, may be a thousand times as large. With
    absolute errors the KL of a model of 0.94 M parameters was 0.0104, with relative ones 0.0095 after a third of the
    steps. That first token counts more often instead.
    """
    asked = block.asked(batch).float()
    change = block.run(weights, batch).float() - asked
    lost = change.square().sum(-1) / asked.square().sum(-1).clamp(min=1e-30)
    counts = torch.ones_like(lost)
    if lost.dim() == 2:  # [sequences, tokens], and no streams beside them
        counts[:, 0] = block.first_counts
    return (lost * counts).sum() / counts.sum()


@torch.no_grad()
def _error(block: RoundedBlock, quantized: Mapping[LinearSite, QuantTensor], batches: Sequence[int]) -> float:
    """The mean error of the output over some batches."""
    dense = {site: each.dequantize() for site, each in quantized.items()}
    return sum(_lost(block, dense, batch).item() for batch in batches) / len(batches)
