"""The caches that are judged, by name: what each keeps of a token, and what it has to learn beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from outlierq.ops.caches import k_sort, kivi, kvquant, rotate_kv

if TYPE_CHECKING:
    import torch

KeysValues = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class EvaluatedCache:
    """How keys and values [sequences, kv heads, tokens, D] are kept.

    rounded: makes of both, and of what was learned, what is read back. learn: from keys and values of some tokens,
    [tokens, kv heads, D]; None where nothing is. before_rope: keys are those before RoPE. recent: newest tokens as they
    are. first: tokens at the beginning as they are. largest: so many of the largest entries of what enters the block
    decide which tokens of a sequence are kept as they are. bits: stored for each number of a head of D channels; tokens
    kept apart are not counted.
    """

    paper: str
    rounded: Callable[[torch.Tensor, torch.Tensor, Any], KeysValues]
    bits: Callable[[int, int], float]
    learn: Callable[[torch.Tensor, torch.Tensor], Any] | None = None
    before_rope: bool = False
    recent: int = 0
    first: int = 0
    largest: int = 0


def _kivi(bits: int) -> EvaluatedCache:
    def both(key: torch.Tensor, value: torch.Tensor, _: Any) -> KeysValues:
        return kivi.keys(key, bits), kivi.values(value, bits)

    return EvaluatedCache("arXiv:2402.02750", both, lambda heads, size: bits + 32 / kivi.GROUP, recent=kivi.RECENT)


def _rotate_kv(bits: int) -> EvaluatedCache:
    def both(key: torch.Tensor, value: torch.Tensor, order: torch.Tensor) -> KeysValues:
        return rotate_kv.keys(key, bits, order), rotate_kv.values(value, bits)

    def learn(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return rotate_kv.channel_order(keys)

    def stored(heads: int, size: int) -> float:
        return bits + 32 / (rotate_kv.GROUP if heads * size % rotate_kv.GROUP == 0 else heads * size)

    return EvaluatedCache("arXiv:2501.16383", both, stored, learn, before_rope=True, largest=20)


def _kvquant(bits: int) -> EvaluatedCache:
    def both(key: torch.Tensor, value: torch.Tensor, levels: kvquant.Levels) -> KeysValues:
        return kvquant.keys(key, levels), kvquant.values(value, levels)

    def stored(heads: int, size: int) -> float:
        return bits + 32 * kvquant.OUTLIERS + 16 / (heads * size)  # an outlier with its place; ranges of values

    learn = partial(kvquant.learned, bits=bits)
    return EvaluatedCache("arXiv:2401.18079", both, stored, learn, before_rope=True, first=1)


def _block_floating_point(in_order: bool) -> EvaluatedCache:
    def both(key: torch.Tensor, value: torch.Tensor, orders: KeysValues | None) -> KeysValues:
        if orders is None:
            return k_sort.block_floating_point(key), k_sort.block_floating_point(value)
        return k_sort.sorted_blocks(key, orders[0]), k_sort.sorted_blocks(value, orders[1])

    def learn(keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        return k_sort.channel_order(keys), k_sort.channel_order(values)

    def stored(heads: int, size: int) -> float:
        return k_sort.MANTISSA + 8 / (k_sort.BLOCK if size % k_sort.BLOCK == 0 else size)

    return EvaluatedCache("arXiv:2403.20137", both, stored, learn if in_order else None)


EVALUATED: Mapping[str, EvaluatedCache] = {
    **{f"kivi-{bits}": _kivi(bits) for bits in (4, 2)},
    **{f"rotatekv-{bits}": _rotate_kv(bits) for bits in (4, 3, 2)},
    **{f"kvquant-{bits}": _kvquant(bits) for bits in (4, 3, 2)},
    "bfp-4": _block_floating_point(in_order=False),
    "ksort-4": _block_floating_point(in_order=True),
}
