"""`outlierq study cache`: what keys and values in fewer bits cost a model, and which flag of a server follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import ArgumentError, OutlierqError, during
from outlierq.core.model import Checkpoint
from outlierq.core.report import Shown
from outlierq.ops.caches.evaluated import EVALUATED
from outlierq.pipeline.asked.events import Event
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.measuring import models
from outlierq.pipeline.measuring.measure import read_report, record

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
LOUD = 4.0  # times the noise of the layer in the middle: such layers are tried in 16 bits, where they are few
FEW = 0.25  # of all layers
WORTH = 0.75  # of the KL is left, or less: then skipping them is advised
SKIP = "--kv-cache-dtype-skip-layers"


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
    keep: bool = False,
    resources: Resources = USUAL,
) -> CacheStudy:
    """Measure the model through every cache of a server and of the literature. only: names; empty for all.

    keep: in the model's report, whose page and card then say it; OutlierqError before any work where there is none.
    ArgumentError for a name that there is not. A cache that this model cannot have has a row that says why.
    """
    from outlierq.load import load_tokenizer

    names = list(only) or [*SERVED, *EVALUATED]
    for name in names:
        if name not in SERVED and name not in EVALUATED:
            raise ArgumentError(f"there is no {name!r}; known: {', '.join([*SERVED, *EVALUATED])}", argument="only")
    if keep:
        read_report(checkpoint.path)
    content, title = models.evaluation_text(text)
    tokenizer = load_tokenizer(checkpoint)
    asked = models.checked_windows(checkpoint, tokenizer, content, window_length=window_length, windows=windows)
    original = models.load_for_evaluation(checkpoint, device=resources.device)
    rows = []
    for number, name in enumerate(names):
        resources.listen(Event("study", number, len(names), name))
        if name in SERVED:
            rows += _served_rows(checkpoint, name, asked, original, resources)
        else:
            rows.append(_row(checkpoint, name, asked, original, resources))
    resources.listen(Event("study", len(names), len(names)))
    plain = models.measure_windows(original, asked).perplexity
    study = CacheStudy(checkpoint.source, title, asked.ids.numel(), plain, tuple(rows), advice(rows))
    if keep:
        record(checkpoint.path, cache=study.to_dict())
    return study


def _row(
    checkpoint: Checkpoint, name: str, asked: models.Windows, original: torch.nn.Module, resources: Resources
) -> CacheRow:
    """One cache of the literature, measured."""
    heads, size = head_sizes(original)
    known = CacheRow(name, EVALUATED[name].paper, EVALUATED[name].bits(heads, size), NEAR.get(name, ""))
    try:
        with during("study", name):
            model = models.load_for_evaluation(checkpoint, device=resources.device, kv_cache=name)
            measured = models.measure_windows(model, asked, reference=original)
    except OutlierqError as error:
        return CacheRow(known.name, known.paper, known.bits, known.flag, note=f"did not run: {error.what}")
    figures = measured.kl_per_token, measured.kl_standard_error, measured.perplexity
    return CacheRow(known.name, known.paper, known.bits, known.flag, *figures)


def _served_rows(
    checkpoint: Checkpoint, name: str, asked: models.Windows, original: torch.nn.Module, resources: Resources
) -> list[CacheRow]:
    """A cache of a server; and the same with loud layers in 16 bits, where that leaves much less of the KL."""
    from outlierq.load import round_served_cache

    (bits, beside, flag), (_, size) = SERVED[name], head_sizes(original)
    bits += beside / size

    def measured(skip: Sequence[int]) -> tuple[CacheRow, dict[int, float]]:
        model = models.load_for_evaluation(checkpoint, device=resources.device)
        noise = round_served_cache(model, name, skip)
        found = models.measure_windows(model, asked, reference=original)
        layers = len(noise) + len(skip)
        mean = (bits * len(noise) + 16 * len(skip)) / layers if layers else bits
        flags = f"{flag} {SKIP} {' '.join(map(str, skip))}" if skip else flag
        title = f"{name}, layers {', '.join(map(str, skip))} in 16 bits" if skip else name
        return CacheRow(title, "", mean, flags, found.kl_per_token, found.kl_standard_error, found.perplexity), noise

    try:
        with during("study", name):
            plain, noise = measured(())
            loud = loud_layers(noise)
            rows = [plain, measured(loud)[0]] if loud else [plain]
    except OutlierqError as error:
        return [CacheRow(name, "", bits, flag, note=f"did not run: {error.what}")]
    return rows if (rows[-1].kl or 0) <= WORTH * (plain.kl or 0) else [plain]


def loud_layers(noise: Mapping[int, float]) -> list[int]:
    """Layers that lose far more than the one in the middle, if they are few; see `LOUD`. noise: by layer."""
    if not noise:
        return []
    middle = sorted(noise.values())[len(noise) // 2]
    loud = sorted(layer for layer, lost in noise.items() if lost > LOUD * middle)
    return loud if len(loud) <= FEW * len(noise) else []


def head_sizes(model: torch.nn.Module) -> tuple[int, int]:
    """Heads of keys, and channels of one, as the config names them."""
    from outlierq.core.windows import limit_of

    heads = limit_of(model, "num_attention_heads") or 1
    size = limit_of(model, "head_dim") or (limit_of(model, "hidden_size") or heads) // heads
    return limit_of(model, "num_key_value_heads") or heads, size


def advice(rows: Sequence[CacheRow]) -> str:
    """Which flag of a server takes the fewest bits and still costs little."""
    served = [row for row in rows if row.name.partition(",")[0] in SERVED and row.kl is not None]
    if not served:
        return "no cache of a server was measured"
    bearable = [row for row in served if row.kl is not None and row.kl <= BEARABLE]
    if not bearable:
        least = min(served, key=lambda row: row.kl or 0.0)
        return f"keep 16 bits: every cache of a server costs more than {BEARABLE} nats ({least.name}: {least.kl:.4f})"
    best = min(bearable, key=lambda row: (round(row.bits), row.kl or 0.0))
    return f"{best.flag}: {best.bits:.2f} bits instead of 16, KL {best.kl:.4f} nats per token"
