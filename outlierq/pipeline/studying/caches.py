"""`outlierq study cache`: what keys and values in fewer bits cost a model, and which flag of a server follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import ArgumentError, OutlierqError, during
from outlierq.core.model import Checkpoint
from outlierq.core.report import Shown
from outlierq.ops.caches.evaluated import EVALUATED
from outlierq.pipeline.asked.events import Event
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.measuring import models

if TYPE_CHECKING:
    import torch

# Bits of a number, those of a head beside its numbers, and the flag; see `load/model/attention.py`.
SERVED = {
    "fp8": (8.0, 32, "vllm serve --kv-cache-dtype fp8_per_token_head"),
    "int8": (8.0, 32, "vllm serve --kv-cache-dtype int8_per_token_head"),
    "int4": (4.0, 64, "vllm serve --kv-cache-dtype int4_per_token_head"),
    "nvfp4": (4.5, 0, "vllm serve --kv-cache-dtype nvfp4"),
}
# The nearest that a program runs.
NEAR = {
    "kivi-4": 'transformers: cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4}',
    "kivi-2": 'transformers: cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 2}',
}
BEARABLE = 0.01  # nats per token: with less, a flag is advised


@dataclass(frozen=True)
class CacheRow:
    """One cache. bits: of each number of keys and values, scales included. flag: what runs it; empty where nothing
    does. kl, perplexity: of the model through it; None where it cannot be had, and `note` says why."""

    name: str
    paper: str
    bits: float
    flag: str
    kl: float | None = None
    kl_standard_error: float | None = None
    perplexity: float | None = None
    note: str = ""


@dataclass(frozen=True)
class CacheStudy(Shown):
    """The table, on what it was measured, and the flag that follows, in words."""

    model: str
    text: str
    tokens: int
    reference_perplexity: float
    rows: tuple[CacheRow, ...]
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def study_caches(
    checkpoint: Checkpoint,
    *,
    text: str | None = None,
    windows: int | None = 24,
    window_length: int = 512,
    only: Sequence[str] = (),
    resources: Resources = USUAL,
) -> CacheStudy:
    """Measure the model through every cache of a server and of the literature. only: names; empty for all.

    ArgumentError for a name that there is not. A cache that this model cannot have has a row that says why.
    """
    from outlierq.load import load_tokenizer

    names = list(only) or [*SERVED, *EVALUATED]
    for name in names:
        if name not in SERVED and name not in EVALUATED:
            raise ArgumentError(f"there is no {name!r}; known: {', '.join([*SERVED, *EVALUATED])}", argument="only")
    content, title = models.evaluation_text(text)
    tokenizer = load_tokenizer(checkpoint)
    asked = models.checked_windows(checkpoint, tokenizer, content, window_length=window_length, windows=windows)
    original = models.load_for_evaluation(checkpoint, device=resources.device)
    rows = []
    for number, name in enumerate(names):
        resources.listen(Event("study", number, len(names), name))
        rows.append(_row(checkpoint, name, asked, original, resources))
    resources.listen(Event("study", len(names), len(names)))
    plain = models.measure_windows(original, asked).perplexity
    return CacheStudy(checkpoint.source, title, asked.ids.numel(), plain, tuple(rows), advice(rows))


def _row(
    checkpoint: Checkpoint, name: str, asked: models.Windows, original: torch.nn.Module, resources: Resources
) -> CacheRow:
    """One cache, measured."""
    heads, size = head_sizes(original)
    if name in SERVED:
        bits, beside, flag = SERVED[name]
        known = CacheRow(name, "", bits + beside / size, flag)
    else:
        known = CacheRow(name, EVALUATED[name].paper, EVALUATED[name].bits(heads, size), NEAR.get(name, ""))
    try:
        with during("study", name):
            model = models.load_for_evaluation(checkpoint, device=resources.device, kv_cache=name)
            measured = models.measure_windows(model, asked, reference=original)
    except OutlierqError as error:
        return CacheRow(known.name, known.paper, known.bits, known.flag, note=f"did not run: {error.what}")
    figures = measured.kl_per_token, measured.kl_standard_error, measured.perplexity
    return CacheRow(known.name, known.paper, known.bits, known.flag, *figures)


def head_sizes(model: torch.nn.Module) -> tuple[int, int]:
    """Heads of keys, and channels of one, as the config names them."""
    from outlierq.core.windows import limit_of

    heads = limit_of(model, "num_attention_heads") or 1
    size = limit_of(model, "head_dim") or (limit_of(model, "hidden_size") or heads) // heads
    return limit_of(model, "num_key_value_heads") or heads, size


def advice(rows: Sequence[CacheRow]) -> str:
    """Which flag of a server takes the fewest bits and still costs little."""
    served = [row for row in rows if row.name in SERVED and row.kl is not None]
    if not served:
        return "no cache of a server was measured"
    bearable = [row for row in served if row.kl is not None and row.kl <= BEARABLE]
    if not bearable:
        least = min(served, key=lambda row: row.kl or 0.0)
        return f"keep 16 bits: every cache of a server costs more than {BEARABLE} nats ({least.name}: {least.kl:.4f})"
    best = min(bearable, key=lambda row: (round(row.bits), row.kl or 0.0))
    return f"{best.flag}: {best.bits:.2f} bits instead of 16, KL {best.kl:.4f} nats per token"
