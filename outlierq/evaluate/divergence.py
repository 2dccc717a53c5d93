"""Perplexity of a model, and its KL divergence per token from a reference model on the same windows.

Convention: non-overlapping windows of one token stream, tokens 1..L-1 of every window predicted (GPTQ,
arXiv:2210.17323, section 4); each window begins as the tokenizer begins a text, which is how a model is served. A model
that never saw a text without its begin-of-text token loses half of its quality without it. Not comparable with
lm-eval's word perplexity.

Models that see later tokens are asked for hidden ones instead (`core/masking.py`): the mean over windows of the mean
loss of what is hidden bounds the likelihood of the text (LLaDA, arXiv:2502.09992, equation 3).

Both models run side by side, batch by batch, and only sums are kept: caching the reference's logits instead would
save its second run, but takes 2 bytes x tokens x vocabulary (20 GB for WikiText-2 at 32 k).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import NumbersError, OutlierqError
from outlierq.core.forward import forward_of
from outlierq.core.masking import PROBE_TOKENS, Hidden, sees_later_tokens
from outlierq.core.windows import begun, check_ids, check_length, room_beside
from outlierq.evaluate.depth import HiddenDifference

if TYPE_CHECKING:
    import torch

# Elements of one float32 log-softmax at a time: 8 MiB; about four such tensors live at once.
# Larger ones do not stay in a cache and take half as much time again.
CHUNK_ELEMENTS = 1 << 21
SHIFT_WINDOWS = 4  # that say whether a hidden token is predicted at its place, or at the one before


@dataclass(frozen=True)
class Divergence:
    """How well a model predicts a text, and how far it is from a reference; None where no reference was given.

    tokens: predicted tokens, windows * (window_length - 1); half of that as llama.cpp counts, and the hidden ones of a
    masked-diffusion model. perplexity: exp of the
    mean negative log-likelihood. kl_per_token: mean of KL(reference || model) in nats; kl_standard_error: over windows,
    None for a single window. top1_agreement: share of positions with the same most likely token, 0..1.
    flips_to_wrong: positions where the reference's most likely token is the true one and the model's is not;
    flips_to_right: the reverse. seconds: wall time of the whole measurement, both models. opening: the tokens that
    every window begins with, among its window_length; empty where it begins with text. hidden_behind: the mask token,
    where hidden tokens were predicted; shift: how many places before its own a token is predicted then.
    hidden_errors: after each block, squared difference of the hidden states over the power of the reference's; empty
    where the models have no blocks in common that are known.
    """

    tokens: int
    windows: int
    window_length: int
    perplexity: float
    seconds: float
    reference_perplexity: float | None = None
    kl_per_token: float | None = None
    kl_standard_error: float | None = None
    top1_agreement: float | None = None
    flips_to_wrong: int | None = None
    flips_to_right: int | None = None
    opening: str = ""
    hidden_errors: tuple[float, ...] = ()
    hidden_behind: str = ""
    shift: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        values = asdict(self) | {"hidden_errors": list(self.hidden_errors)}
        return (
            values if self.hidden_behind else {k: v for k, v in values.items() if k not in ("hidden_behind", "shift")}
        )


@dataclass(frozen=True)
class _Window:
    """Sums over the predicted tokens of one window, in nats and positions. count: how many there are."""

    count: int
    nll: float
    reference_nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    flips_to_wrong: int = 0
    flips_to_right: int = 0


def measure(
    model: torch.nn.Module,
    ids: torch.Tensor,
    *,
    reference: torch.nn.Module | None = None,
    hidden: Hidden | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Perplexity of `model` on `ids`, and its divergence from `reference` when one is given.

    hidden: the tokens to be predicted, instead of every next one (see `prediction_shift`).

    ids: [windows, length] int64. batch_size: windows in one forward pass; it bounds the logits held at a time
    ([batch, length, vocabulary] in the model's dtype, twice with a reference).
    progress: called with (windows done, windows in all) after each batch.
    NumbersError names the window in which logits or divergence are not finite.
    """
    import torch

    _check_ids(model, ids)
    start = time.perf_counter()
    asked = _asked(reference or model, ids, hidden)
    windows: list[_Window] = []
    depths = HiddenDifference()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for module in (model, reference):
            if module is not None:
                stack.enter_context(evaluating(module))
        if reference is not None and reference is not model:
            stack.enter_context(depths.watching(model, reference))
        for batch in asked.inputs.split(batch_size):
            reference_logits = None if reference is None else _logits(reference, batch)
            logits = _logits(model, batch)
            depths.batch_done()
            for row in range(len(batch)):
                places, target = asked.of_window(len(windows))
                beside = None if reference_logits is None else reference_logits[row][places]
                windows.append(_measure_window(len(windows), logits[row][places], beside, target))
            if progress is not None:
                progress(len(windows), len(ids))
    summary = _summarise(windows, ids.shape[1], reference is not None, time.perf_counter() - start)
    return replace(summary, hidden_errors=depths.relative, shift=asked.shift)


def model_sees_later_tokens(model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Whether a token of a text, [windows, length], changes what the model says before it."""
    import torch

    with torch.inference_mode(), evaluating(model):
        return sees_later_tokens(partial(_logits, model), ids[:1, :PROBE_TOKENS])


def _asked(model: torch.nn.Module, ids: torch.Tensor, hidden: Hidden | None) -> _NextTokens | _HiddenTokens:
    """What is predicted of windows [windows, length]."""
    return _NextTokens(ids) if hidden is None else _HiddenTokens(ids, hidden, prediction_shift(model, ids, hidden))


class _NextTokens:
    """Every token but the first is predicted from the place before it. inputs: what models get, [windows, length]."""

    shift = 1

    def __init__(self, ids: torch.Tensor):
        self.inputs = ids

    def of_window(self, number: int) -> tuple[Any, torch.Tensor]:
        """Which logits [length, vocabulary] of a window count, and the true tokens there."""
        return slice(None, -1), self.inputs[number, 1:]


class _HiddenTokens:
    """The hidden tokens are predicted, `shift` places before their own. inputs: as above."""

    def __init__(self, ids: torch.Tensor, hidden: Hidden, shift: int):
        self.ids, self.hidden, self.shift = ids, hidden, shift
        self.inputs = hidden.over(ids)

    def of_window(self, number: int) -> tuple[Any, torch.Tensor]:
        """As above."""
        places = self.hidden.places[number].nonzero().flatten()
        return places - self.shift, self.ids[number, places]


def prediction_shift(model: torch.nn.Module, ids: torch.Tensor, hidden: Hidden) -> int:
    """How many places before its own a model predicts a hidden token: 0, or 1 where it was made of one that predicts
    the next token (Dream); on a few windows, what is likelier."""
    import torch

    losses = [0.0, 0.0]
    tokens = [_HiddenTokens(ids, hidden, shift) for shift in (0, 1)]
    with torch.inference_mode(), evaluating(model):
        for number, batch in enumerate(tokens[0].inputs[:SHIFT_WINDOWS].split(1)):
            logits = _logits(model, batch)[0]
            for asked in tokens:
                places, target = asked.of_window(number)
                losses[asked.shift] += _measure_window(number, logits[places], None, target).nll
    return int(losses[1] < losses[0])


def measure_scores(scored: Iterable[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]], length: int) -> Divergence:
    """The same of logits that another program computed, window by window.

    scored: logits [positions, vocabulary], the reference's or None, and the true tokens [positions] of each window.
    length: of the windows, of which some positions are scored. OutlierqError, NumbersError as above.
    """
    start, compared = time.perf_counter(), False
    windows: list[_Window] = []
    for logits, reference, target in scored:
        windows.append(_measure_window(len(windows), logits, reference, target))
        compared = reference is not None
    return _summarise(windows, length, compared, time.perf_counter() - start)


def text_windows(
    tokenizer: Any, text: str, length: int, windows: int | None = None, opening: Sequence[int] = ()
) -> torch.Tensor:
    """The first `windows` (default: all) non-overlapping windows of `text` as one token stream, [windows, length].

    opening: the tokens that each begins with (`core.windows.opening_tokens`); there is so much less text in it. A last
    incomplete window is dropped. Raises when the text is too short.
    """
    import torch

    stream = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    body = room_beside(opening, length)
    available = len(stream) // body
    count = available if windows is None else windows
    if count > available or count < 1:
        raise OutlierqError(
            f"the text has {len(stream)} tokens; {max(count, 1)} windows of {length} need {max(count, 1) * body}",
            hint="use a longer text, shorter windows, or fewer of them",
        )
    return begun(torch.tensor(stream[: count * body], dtype=torch.long).view(count, body), opening)


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside, and the former mode restored after."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _check_ids(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Refuse what would fail inside the model without saying why."""
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise OutlierqError(f"windows of token ids must be [windows, length >= 2], not {list(ids.shape)}")
    check_length(model, ids.shape[1], "--window-length, or gate.window_length")
    check_ids(model, ids)


def _logits(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """[batch, length, vocabulary]: the logits at every place."""
    parameter = next(module.parameters(), batch)
    with forward_of(module, "evaluate"):
        logits: torch.Tensor = module(input_ids=batch.to(parameter.device), use_cache=False).logits
    return logits


def _measure_window(index: int, logits: torch.Tensor, reference: torch.Tensor | None, target: torch.Tensor) -> _Window:
    """Sums over one window. logits, reference: [length - 1, vocabulary]; target: [length - 1] true tokens."""
    if reference is not None and reference.shape != logits.shape:
        raise OutlierqError(
            f"the model predicts {logits.shape[-1]} tokens and the reference {reference.shape[-1]}",
            hint="KL divergence needs two models with the same vocabulary",
        )
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    sums = [0.0] * 6
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        beside = None if reference is None else reference[part].to(logits.device)
        for place, value in enumerate(_measure_chunk(index, logits[part], beside, target[part].to(logits.device))):
            sums[place] += value
    if not all(map(math.isfinite, sums)):
        raise NumbersError(f"the likelihood or the KL divergence of window {index} is infinite")
    nll, reference_nll, kl, *counts = sums
    return _Window(len(target), nll, reference_nll, kl, *map(int, counts))


def _measure_chunk(
    index: int, logits: torch.Tensor, reference: torch.Tensor | None, target: torch.Tensor
) -> Iterator[float]:
    """The fields of `_Window` over a chunk of positions, in their order."""
    logp, top = _log_softmax(logits, f"the model's logits in window {index}")
    yield -_pick(logp, target)
    if reference is None:
        return
    reference_logp, reference_top = _log_softmax(reference, f"the reference's logits in window {index}")
    yield -_pick(reference_logp, target)
    right, reference_right = top == target, reference_top == target
    yield _kl(reference_logp, logp)
    yield float((top == reference_top).sum())
    yield float((reference_right & ~right).sum())
    yield float((right & ~reference_right).sum())


def _log_softmax(logits: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 log-probabilities [positions, vocabulary] and the most likely tokens [positions]."""
    largest, top = logits.max(-1)  # NaN wins every max, so this looks at all logits
    if not bool(largest.isfinite().all()):
        raise NumbersError(f"NaN or Inf in {what}")
    return logits.float().log_softmax(-1), top


def _pick(logp: torch.Tensor, target: torch.Tensor) -> float:
    """Sum of the log-probabilities of the true tokens."""
    return float(logp.gather(-1, target[:, None]).double().sum())


def _kl(reference_logp: torch.Tensor, logp: torch.Tensor) -> float:
    """Sum over positions of KL(reference || model) in nats; overwrites `logp`.

    A token that the reference rules out (log-probability -inf, as for padded vocabularies) adds nothing.
    """
    difference = logp.neg_().add_(reference_logp).masked_fill_(reference_logp.isneginf(), 0.0)
    return float(difference.mul_(reference_logp.exp()).sum(-1).double().sum())


def _summarise(windows: list[_Window], length: int, compared: bool, seconds: float) -> Divergence:
    """Means over windows of the means over their predicted tokens."""
    tokens = sum(w.count for w in windows)
    perplexity = _perplexity(_mean([w.nll / w.count for w in windows]))
    alone = Divergence(
        perplexity=perplexity, tokens=tokens, windows=len(windows), window_length=length, seconds=seconds
    )
    if not compared:
        return alone
    per_window = [w.kl / w.count for w in windows]
    return replace(
        alone,
        reference_perplexity=_perplexity(_mean([w.reference_nll / w.count for w in windows])),
        kl_per_token=_mean(per_window),
        kl_standard_error=_standard_error(per_window),
        top1_agreement=sum(w.agreements for w in windows) / tokens,
        flips_to_wrong=sum(w.flips_to_wrong for w in windows),
        flips_to_right=sum(w.flips_to_right for w in windows),
    )


def _mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def _perplexity(nll_per_token: float) -> float:
    """exp(nll); NumbersError where a float cannot hold it (the model is broken beyond comparison)."""
    if nll_per_token > 700:
        raise NumbersError(f"perplexity overflows: {nll_per_token:.0f} nats per token")
    return math.exp(nll_per_token)


def _standard_error(values: list[float]) -> float | None:
    """Standard error of the mean, None for a single value."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
