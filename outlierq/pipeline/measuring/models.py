"""`outlierq eval`: perplexity, divergence from a reference, and named tasks, on any checkpoint that can be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError, StatsError
from outlierq.core.model import Checkpoint
from outlierq.pipeline.asked.events import Event, Listener, silent

if TYPE_CHECKING:
    import torch

    from outlierq.core.masking import Hidden
    from outlierq.evaluate.divergence import Divergence
    from outlierq.evaluate.tasks import Served


def load_for_evaluation(
    checkpoint: Checkpoint,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    runtime: str = "dense",
    kv_cache: str | None = None,
) -> torch.nn.Module:
    """The whole model. runtime: "dense" decodes packed weights, "packed" multiplies with them as they are.

    kv_cache: numbers in which a server keeps keys and values, see `SERVED_CACHES`, or a cache of the literature, see
    `EVALUATED`; None for 16 bits.
    """
    from outlierq.load import SERVED_CACHES, load_model, round_served_cache
    from outlierq.pipeline.measuring.evaluated_cache import evaluate_through

    if runtime == "packed":
        from outlierq.pipeline.measuring.packed_model import load_packed_model

        model = load_packed_model(checkpoint, dtype=dtype, device=device)
    else:
        model = load_model(checkpoint, dtype=dtype, device=device)
    if kv_cache in SERVED_CACHES:
        round_served_cache(model, kv_cache)
    elif kv_cache is not None:
        evaluate_through(model, kv_cache, checkpoint)
    return model


@dataclass(frozen=True)
class Windows:
    """Windows of a text, [windows, length], and the tokens that each begins with. tokenizer, source: of the model."""

    ids: torch.Tensor
    opening: str
    tokenizer: Any
    source: str

    def hidden_from(self, model: torch.nn.Module) -> Hidden | None:
        """What is hidden of them for a model that sees later tokens; None for all others. SourceError when such a model
        has no mask token."""
        from outlierq.core.masking import hidden_at_random, mask_token, no_mask_token
        from outlierq.core.windows import opening_tokens
        from outlierq.evaluate.divergence import model_sees_later_tokens

        if not model_sees_later_tokens(model, self.ids):
            return None
        token = mask_token(model, self.tokenizer, self.source)
        if token is None:
            raise no_mask_token(self.source)
        return hidden_at_random(self.ids, token, len(opening_tokens(self.tokenizer)) if self.opening else 0)


def checked_windows(
    checkpoint: Checkpoint,
    tokenizer: Any,
    text: str,
    *,
    window_length: int = 512,
    windows: int | None = None,
    bos: bool = True,
    reference: tuple[Checkpoint, Any] | None = None,
) -> Windows:
    """The first windows of a text (default: all) before any weight is read.

    bos: each begins as the tokenizer begins a text, as the model is served. reference: what the checkpoint will be
    compared with, and its tokenizer. OutlierqError when the text is too short for them, the model has no positions or
    no embeddings for them, or the reference's tokenizer reads the text as other tokens.
    """
    from outlierq.core.windows import check_ids, check_length, opening_tokens
    from outlierq.evaluate.divergence import text_windows
    from outlierq.evaluate.tokens import check_same_tokens
    from outlierq.load import build_skeleton

    if reference is not None:
        check_same_tokens(tokenizer, reference[1], text, (checkpoint.source, reference[0].source))
    model = build_skeleton(checkpoint)
    check_length(model, window_length, "--window-length, or gate.window_length")
    opening = opening_tokens(tokenizer) if bos else []
    ids = text_windows(tokenizer, text, window_length, windows, opening)
    check_ids(model, ids, len(tokenizer))
    return Windows(ids, "".join(tokenizer.convert_ids_to_tokens(opening)), tokenizer, checkpoint.source)


def measure_windows(
    model: torch.nn.Module,
    windows: Windows,
    *,
    reference: torch.nn.Module | None = None,
    listen: Listener = silent,
) -> Divergence:
    """Perplexity on windows, and with a reference KL per token, top-1 agreement and flips.

    Of a model that sees later tokens, hidden tokens are asked, not the next ones.
    """
    from outlierq.evaluate.divergence import measure

    def progress(done: int, total: int) -> None:
        listen(Event("evaluate", done, total))

    hidden = windows.hidden_from(reference or model)
    measured = measure(model, windows.ids, reference=reference, hidden=hidden, progress=progress)
    behind = "" if hidden is None else windows.tokenizer.convert_ids_to_tokens(hidden.token)
    return replace(measured, opening=windows.opening, hidden_behind=behind)


def check_continues(model: torch.nn.Module, asked: str) -> None:
    """OutlierqError for a model that sees later tokens, which is asked for what only one that continues a text does."""
    import torch

    from outlierq.core.masking import PROBE_TOKENS
    from outlierq.evaluate.divergence import model_sees_later_tokens

    if model_sees_later_tokens(model, torch.arange(PROBE_TOKENS)[None]):
        raise OutlierqError(
            f"the model sees later tokens and fills in hidden ones; {asked} asks it to continue a text",
            hint=f"leave {asked} out: perplexity and KL divergence are those of hidden tokens",
        )


def evaluation_text(data: str | None) -> tuple[str, str]:
    """The text to measure on, and its name. data: a file as calibration reads it, or `mix` (as None) or `embedded` for
    the held-out part of that text."""
    from outlierq.calibrate.text.embedded import MIX, TITLES, embedded_text
    from outlierq.calibrate.text.windows import whole_text

    data = MIX if data is None else data
    if data in TITLES:
        return embedded_text("evaluation", data), f"{TITLES[data]} (held-out part)"
    try:
        return whole_text(data), Path(data).name
    except StatsError as error:
        raise OutlierqError(
            f"the evaluation text {data} cannot be read: {error.what}",
            hint="give a file of plain text, or of rows with a column `text`",
        ) from error


def run_tasks(model: torch.nn.Module | Served, tokenizer: Any, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """Named tasks through lm-eval."""
    from outlierq.evaluate.tasks import run_tasks as run

    return run(model, tokenizer, tasks, **options)


def check_tasks(tasks: Sequence[str], data_dir: Path | None, num_fewshot: int | None) -> None:
    """OutlierqError when lm-eval knows no such task, or a folder does not hold its data."""
    from outlierq.evaluate.tasks import check_tasks as check

    check(tasks, data_dir, num_fewshot)
