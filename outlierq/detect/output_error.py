"""Predicted relative output error of a site in W8A8, W4A16, NVFP4 and MXFP4, as it is and after the cheapest remedies.

sum over tokens of ||Q(x) Q(W)^T - x W^T||^2 / sum ||x W^T||^2 (ops/search/site_error.py): from the reservoir for W8A8
(int8 per token and per output channel) and for both operands in NVFP4 or MXFP4, from the hessian as
tr(D H D^T) / tr(W H W^T) for W4A16, where D is what rounding does to W. Rounding is to nearest; GPTQ and searched
scales end lower, so the figures rank sites and predict no method.

Remedies, in the order of what they change:
  smoothquant  s_j = max|x_j|^0.5 / max|W_j|^0.5 (Xiao et al. 2022, arXiv:2211.10438, Eq. 4), folded into the producer
  awq          s_j = mean|x_j|^0.5, the middle of its grid (Lin et al. 2023, arXiv:2306.00978, Eq. 5); W4A16 only
  split        the columns that matter most stay in 16 bits (Dettmers et al. 2022, arXiv:2208.07339, section 3)
  rotation     x H, W H with a randomised Hadamard matrix H (Ashkboos et al. 2024, arXiv:2404.00456)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.core.stats import InputStats
from outlierq.detect.sample import spread
from outlierq.ops.hadamard import hadamard_transform
from outlierq.ops.search.site_error import SiteError

NVFP4_INPUTS = ActivationScheme("float", 4, False, "group", 16, "two-level")
MXFP4_INPUTS = ActivationScheme("float", 4, True, "group", 32, "power-of-two")
W8A8 = QuantScheme(bits=8, group_size=None, activations=ActivationScheme())
BLOCK_FLOATS = {
    "nvfp4": QuantScheme(4, 16, kind="float", scales="two-level", activations=NVFP4_INPUTS),
    "mxfp4": QuantScheme(4, 32, kind="float", scales="power-of-two", activations=MXFP4_INPUTS),
}
# Output rows that are tried; the error is a mean over all of them.
ROWS = 256
# LLM.int8() keeps at most 7 columns of the models in the paper; wide layers get 0.5 %.
SPLIT_COLUMNS, SPLIT_SHARE = 8, 0.005


def w4a16(in_features: int) -> QuantScheme:
    """4 bits with the largest group of 128, 64 or 32 columns that fits, else one scale a row."""
    fitting = (size for size in (128, 64, 32) if in_features % size == 0)
    return QuantScheme(bits=4, group_size=next(fitting, None))


def block_floats(in_features: int) -> dict[str, QuantScheme]:
    """Both operands in 4-bit floats, by name; what no block of columns divides is left out."""
    return {name: scheme for name, scheme in BLOCK_FLOATS.items() if in_features % (scheme.group_size or 1) == 0}


def predicted_error(
    weight: torch.Tensor, stats: InputStats, scheme: QuantScheme, scale: torch.Tensor | None = None
) -> float:
    """Relative output error with x / scale and W * scale. weight: [out, in] float32; scale: [in], None for no remedy.

    First tokens of sequences count as often as calibration counts them. 0 for a site whose output is 0 anyway.
    """
    site = SiteError(spread(weight, ROWS), stats, scheme)
    return site(torch.ones(weight.shape[1]) if scale is None else scale)


def smoothquant_scale(stack: torch.Tensor, stats: InputStats, tie: torch.Tensor) -> torch.Tensor:
    """[in] at alpha = 0.5. stack: [out, in] of all sites that read the input. tie: [in] producer of every channel."""
    inputs = over_producer(stats.need("abs_max"), tie)
    columns = over_producer(stack.abs().amax(0), tie)
    alive = (inputs > 0) & (columns > 0)
    return torch.where(alive, (inputs / columns.clamp(min=1e-5)).clamp(min=1e-5).sqrt(), 1.0)


def awq_scale(stats: InputStats, tie: torch.Tensor) -> torch.Tensor:
    """[in] mean|x_j|^0.5; a common factor does not matter."""
    mean = over_producer(stats.need("abs_mean"), tie)
    return torch.where(mean > 0, mean.clamp(min=1e-6).sqrt(), 1.0)


def over_producer(values: torch.Tensor, tie: torch.Tensor) -> torch.Tensor:
    """The largest of `values` [in] among the channels that one producer channel feeds; they have to share a scale."""
    producers = torch.zeros(int(tie.max()) + 1, dtype=values.dtype)
    return producers.scatter_reduce_(0, tie, values, "amax")[tie]


def split_columns(stack: torch.Tensor, stats: InputStats) -> torch.Tensor:
    """The channels to keep in 16 bits, by max|x_j| rms(x_j) ||W_j||. stack: [out, in] of all sites."""
    rms = (stats.need("sum_sq") / stats.tokens).sqrt().float()
    count = min(max(SPLIT_COLUMNS, int(SPLIT_SHARE * stack.shape[1])), stack.shape[1])
    return (stats.need("abs_max") * rms * stack.square().sum(0).sqrt()).topk(count).indices


def split_error(weight: torch.Tensor, stats: InputStats, columns: torch.Tensor) -> float:
    """W8A8 of the other columns; those in 16 bits add no error, and no range to the others' scales.

    weight: [out, in]. columns: [k] indices.
    """
    part = spread(weight, ROWS)
    rest = SiteError(part.index_fill(1, columns, 0.0), _with_rows(stats, lambda x: x.index_fill(1, columns, 0.0)), W8A8)
    power = SiteError(part, stats, W8A8).power
    return rest(torch.ones(weight.shape[1])) * rest.power / power if power > 0 else 0.0


def rotated_error(weight: torch.Tensor, stats: InputStats) -> float:
    """W8A8 of x D H and W D H: D seeded signs, H Hadamard. The product x W^T is the same. weight: [out, in]."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (weight.shape[1],), generator=generator).float() * 2 - 1
    turned = _with_rows(stats, lambda x: hadamard_transform(x.float() * signs))
    return predicted_error(hadamard_transform(spread(weight, ROWS) * signs), turned, W8A8)


def _with_rows(stats: InputStats, change: Callable[[torch.Tensor], torch.Tensor]) -> InputStats:
    """Only the sampled tokens, changed; they are all that a W8A8 error is computed from."""
    first = None if stats.first_rows is None else change(stats.need("first_rows"))
    return InputStats(stats.tokens, stats.sequences, rows=change(stats.need("rows")), first_rows=first)
