"""What a user asks for, before anything is read: a checkpoint, a recipe or only a format, a place for the result."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from outlierq.core.errors import ArgumentError, OutlierqError
from outlierq.core.limits import Limits
from outlierq.core.model import Checkpoint
from outlierq.pipeline.processes.ranks import refuse_several
from outlierq.recipe import USUAL_RECIPE, Calibration, Recipe, RecipeLike, Settings, as_texts, given, parse
from outlierq.registry import formats

Opened = TypeVar("Opened", bound=Checkpoint)
SourceLike = str | os.PathLike[str] | Checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint as a user names it: a folder, a Hub id, a GGUF file, or one that is open already.

    stream_from_hub: the weight files of a Hub id come when they are needed and go again. like: a GGUF file in whose
    frame the result is written.
    """

    place: SourceLike
    revision: str | None = None
    trust_remote_code: bool = False
    stream_from_hub: bool = False
    like: Path | None = None

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return self.place.source if isinstance(self.place, Checkpoint) else os.fspath(self.place)

    def open(self) -> Checkpoint:
        """Headers are read and checked, weights are not. SourceError says why a source cannot be read."""
        from outlierq.load import open_checkpoint

        if isinstance(self.place, Checkpoint):
            return self.place
        return open_checkpoint(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def headers(self) -> Checkpoint:
        """The same, of a Hub id without its weights."""
        from outlierq.load import is_hub_id, stream_checkpoint

        if not isinstance(self.place, Checkpoint) and is_hub_id(self.name):
            from huggingface_hub import is_offline_mode

            if not is_offline_mode():
                return self._framed(
                    stream_checkpoint(
                        self.name, None, revision=self.revision, trust_remote_code=self.trust_remote_code
                    ),
                    prove=False,
                )
        return self._framed(self.open(), prove=False)

    def _framed(self, checkpoint: Opened, *, prove: bool) -> Opened:
        """The checkpoint with the frame that its result is written into."""
        if self.like is not None:
            from outlierq.pipeline.asked.like import framed_like

            checkpoint.frame = framed_like(checkpoint, self.like, prove=prove)
        return checkpoint

    def in_its_frame(self, request: Request, stats: Path | None = None) -> Source:
        """The same, or a GGUF file under its own names where it becomes another one by a recipe that runs no model: so
        it needs no class, and all but the weights that are rounded is carried byte for byte.

        stats: finished ones of a Hugging Face model, for which none is run either, or an importance matrix, a file,
        which is all that a recipe needs that reads no more.
        """
        recipe, path = request, None if isinstance(self.place, Checkpoint) else Path(self.name).expanduser()
        if isinstance(recipe, FormatAlone) or path is None or not is_gguf(path) or recipe.export.format != "gguf":
            return self
        runs = bool(recipe.needs) and not (stats is not None and (stats.is_file() or of_hugging_face(stats)))
        if runs or recipe.transform or recipe.kv_cache or recipe.gate or recipe.quantize is None:
            return self if self.like else replace(self, like=path)
        return self._in_own_names

    @cached_property
    def _in_own_names(self) -> Source:
        """A GGUF file under its own names; opened once."""
        from outlierq.load import FramedCheckpoint

        return replace(self, place=FramedCheckpoint(Path(self.name).expanduser(), source=self.name))

    @contextmanager
    def opened_for(self, out: Path, *, restart: bool = False) -> Iterator[Checkpoint]:
        """The checkpoint for work whose result goes to `out`; what is streamed lies beside it, and stays for a run that
        goes on."""
        if self.like is not None and self.stream_from_hub:
            raise ArgumentError("a template is compared with all weights, which are not there yet", argument="like")
        if not self.stream_from_hub:
            yield self._framed(self.open(), prove=True)
            return
        from outlierq.load import stream_checkpoint

        refuse_several("--stream-from-hub")
        shards = out.with_name(f"{out.name}.shards")
        checkpoint = stream_checkpoint(
            self.name, shards, revision=self.revision, trust_remote_code=self.trust_remote_code, restart=restart
        )
        try:
            yield checkpoint
        finally:
            if checkpoint.store is not None:
                checkpoint.store.close()


@dataclass(frozen=True)
class FormatAlone:
    """A format and no recipe: a compressed checkpoint is converted to it, any other one compressed in the usual way."""

    format: str

    def converts(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is compressed already."""
        from outlierq.load import described

        return bool(described(checkpoint))

    @property
    def recipe(self) -> Recipe:
        """The usual recipe, written in this format."""
        return given(USUAL_RECIPE, [f"export.format={self.format}"])


Request = Recipe | FormatAlone


def format_of(request: Request) -> str:
    """The format of the result."""
    return request.format if isinstance(request, FormatAlone) else request.export.format


def request(
    recipe: RecipeLike | None = None,
    settings: Settings = None,
    *,
    format: str | None = None,
    limits: Limits | None = None,
    trust_methods: bool = False,
) -> Request:
    """The checked recipe with what is asked for beside it, or the format when it is all that is asked for.

    recipe: None is the usual one. limits: replace those of the recipe. RecipeError lists every fault.
    """
    texts = as_texts(settings)
    if format is not None:
        known_format(format)
        if recipe is None and not texts and not gate_settings(limits or Limits()):
            return FormatAlone(format)
        texts = [*texts, f"export.format={format}"]
    return with_limits(recipe, texts, limits, trust_methods=trust_methods)


def with_limits(
    recipe: RecipeLike | None, settings: Settings = None, limits: Limits | None = None, *, trust_methods: bool = False
) -> Recipe:
    """The checked recipe (None: the usual one); `limits` replace those of its gate."""
    texts = [*as_texts(settings), *as_texts(gate_settings(limits or Limits()))]
    return given(USUAL_RECIPE if recipe is None else recipe, texts, trust_methods=trust_methods)


def calibration(
    recipe: RecipeLike | None,
    settings: Settings,
    options: Mapping[str, Any],
    *,
    trust_methods: bool = False,
) -> Calibration:
    """The calibration section of the recipe, or the defaults, with further values on top (None: as they are)."""
    base = given(recipe, settings, trust_methods=trust_methods).calibration if recipe is not None else None
    section = base.model_dump(mode="json") if base else {}
    section |= {key: value for key, value in options.items() if value is not None}
    content = json.dumps({"calibration": section, "export": {"format": "dense"}})
    left = None if recipe is not None else as_texts(settings)
    return parse(content, name="calibrate options", settings=left).calibration or Calibration()


def fields_for(recipes: Sequence[RecipeLike], *, trust_methods: bool = False) -> frozenset[str] | None:
    """The fields of statistics that recipes read; None, which is all, for none of them.

    ArgumentError for a recipe that statistics of an earlier calibration cannot serve.
    """
    from outlierq.calibrate.collect import stored_fields

    if not recipes:
        return None
    needs: set[str] = set()
    for recipe in (given(each, trust_methods=trust_methods) for each in recipes):
        if not recipe.reads_statistics:
            why = "runs the model itself" if recipe.needs else "needs no statistics"
            raise ArgumentError(f"{recipe.name} {why}", argument="serve")
        needs |= recipe.needs
    return stored_fields(needs)


def gate_settings(limits: Limits) -> dict[str, object]:
    """Limits as settings of a recipe."""
    values = {name: getattr(limits, name) for name in ("max_kl", "max_perplexity_increase", "min_top1")}
    values["min_task"] = [str(limit) for limit in limits.min_task] or None
    return {f"gate.{name}": value for name, value in values.items() if value is not None}


def known_format(format: str) -> str:
    """The name of a format; ArgumentError with the known names otherwise."""
    if format not in formats():
        raise ArgumentError(f"{format!r} is not a format; choose one of {', '.join(formats())}", argument="format")
    return format


def of_hugging_face(stats: Path) -> bool:
    """Whether statistics were made of a model with Hugging Face's names, and not of a GGUF file."""
    from outlierq.calibrate.stored.stats_file import StatsReader

    return not any(name.startswith("blk.") for name in StatsReader(stats).made_of)


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def folder_of(place: str | os.PathLike[str]) -> Path:
    """The folder of a result, absolute, so that its parent is known."""
    return Path(place).expanduser().absolute()


def refuse_unwritable(*paths: Path | None) -> None:
    """OutlierqError before any work when a file that is written after it cannot be; folders are made when needed."""
    for path in filter(None, paths):
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        if path.is_dir() or not (nearest == path or nearest.is_dir()) or not os.access(nearest, os.W_OK):
            raise OutlierqError(
                f"{path} cannot be written: "
                + ("it is a folder" if path.is_dir() else f"{nearest} is no folder that can be written to"),
                hint="nothing was done; name another place",
            )


def write_file(path: Path, content: bytes) -> None:
    """A file the user asked for, whole; OutlierqError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise OutlierqError(f"{path} cannot be written: {error.strerror or error}") from error
