"""Windows of a recipe's sources, of text that the model writes, with images, and of tokens that they do not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.text.unseen import unseen_tokens
from outlierq.core.errors import RecipeError
from outlierq.core.model import StudiedModel
from outlierq.evaluate.generation import check_writes
from outlierq.pipeline.asked.resources import Resources
from outlierq.pipeline.remodel.rewrite import original_of
from outlierq.pipeline.text.own import Writer, digest_of, kept_tokens

if TYPE_CHECKING:
    from outlierq.calibrate.text.windows import TokenSet
    from outlierq.recipe import Calibration
    from outlierq.recipe.sections import Section


def text_windows(
    model: StudiedModel, settings: Calibration, tokenizer: Any, folder: Path | None, resources: Resources
) -> TokenSet:
    """Windows of the recipe's sources. Those that the model writes are written by the one that was given."""
    from outlierq.calibrate.text.windows import token_windows

    own = None
    if settings.own_share:
        check_writes(model.skeleton)
        original = original_of(model.checkpoint)
        kept = kept_tokens(folder, original, settings) if folder is not None else None
        if kept is not None:
            return kept
        own = Writer(original, tokenizer, settings.seed, resources)
    tokens = token_windows(
        tokenizer,
        [text.model_dump(exclude_none=True) for text in settings.text],
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        chat_template=settings.chat_template,
        own=own,
    )
    if own is None:
        return tokens
    return replace(tokens, description=f"{tokens.description} (sha256 {digest_of(tokens.ids)[:12]})")


def with_unseen(model: StudiedModel, tokens: TokenSet, settings: Calibration, tokenizer: Any) -> TokenSet:
    """The windows, and some of tokens that none of them holds, if there are such tokens."""
    from outlierq.core.windows import embedding_rows, opening_tokens

    opening = opening_tokens(tokenizer)
    unseen = unseen_tokens(tokenizer, tokens.ids, embedding_rows(model.skeleton), opening, settings.seed)
    return replace(tokens, unseen=unseen)


def with_images(model: StudiedModel, tokens: TokenSet, images: Section, tokenizer: Any) -> TokenSet:
    """The windows with the recipe's images. RecipeError when the model has nothing to see them with."""
    from outlierq.calibrate.text.images import ImageSource, with_images
    from outlierq.core.windows import opening_tokens
    from outlierq.load import load_processor

    if not model.structure.towers:
        raise RecipeError(
            f"calibration.images is set, but {type(model.skeleton).__name__} has no part that sees images",
            hint="leave calibration.images out for this model",
        )
    source = ImageSource(**images.model_dump())
    return with_images(tokens, source, lambda: load_processor(model.checkpoint), len(opening_tokens(tokenizer)))
