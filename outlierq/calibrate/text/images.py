"""Calibration with images: each is put before a window of text as the model's own processor does it.

A window that has one begins with the chat about the image (its description, if there is one, is the answer) and goes on
with the text it had, up to the same length: sequences stay equally long, and no token is padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.text.chats import TEMPLATE_FAULTS
from outlierq.core.errors import StatsError
from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.untrusted import brief

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from outlierq.calibrate.text.windows import TokenSet

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
QUESTION = "Describe this image."
LONGEST_CAPTION = 1 << 14  # characters


@dataclass(frozen=True)
class ImageSource:
    """Where images come from: the files of a folder (`path`; NAME.txt beside NAME.png describes it), or the `column`
    of a `dataset` of the Hub, described by `caption`."""

    path: str | None = None
    dataset: str | None = None
    column: str = "image"
    caption: str | None = None
    split: str = "train"
    config: str | None = None

    @property
    def name(self) -> str:
        """How the source is called in messages: without folders, which differ between machines."""
        return Path(self.path).name if self.path is not None else str(self.dataset)


@dataclass(frozen=True)
class Picture:
    """One image and what is said of it. name: for messages."""

    name: str
    image: Image
    caption: str = ""


def with_images(tokens: TokenSet, source: ImageSource, load_processor: Callable[[], Any], opening: int) -> TokenSet:
    """The windows, the first of them with an image each, as many as there are images.

    load_processor: gives the processor of the model. opening: tokens that every window begins with by itself; a window
    with an image begins as its chat does. StatsError when an image cannot be read, or does not fit into a window.
    """
    import torch

    needs_extra("PIL")
    count, length = tokens.ids.shape
    pictures = list(islice(_pictures(source), count))
    if not pictures:
        raise StatsError(f"{source.name} holds no image ({', '.join(ENDINGS)})", hint="check calibration.images")
    processor = load_processor()
    ids, inputs = tokens.ids.clone(), []
    for number, picture in enumerate(pictures):
        begin, given = _prepared(processor, picture)
        if len(begin) >= length:
            raise StatsError(
                f"{picture.name} takes {len(begin)} tokens with its text, but windows have {length}",
                hint=f"set calibration.sequence_length to {2 * len(begin)}, or give smaller images",
            )
        ids[number] = torch.cat([begin, tokens.ids[number][opening : opening + length - len(begin)]])[:length]
        inputs.append({name: _lengthened(name, value, len(begin), length) for name, value in given.items()})
    inputs += [{} for _ in range(count - len(pictures))]
    digest = hashlib.sha256(tokens.fingerprint.encode() + ids.numpy().tobytes())
    for name, value in (item for given in inputs for item in sorted(given.items())):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return replace(
        tokens,
        ids=ids,
        fingerprint=digest.hexdigest(),
        description=f"{tokens.description} + {len(pictures)} images: {source.name}",
        notes=(*tokens.notes, f"{len(pictures)} of {count} calibration windows begin with an image of {source.name}"),
        inputs=tuple(inputs),
    )


def _prepared(processor: Any, picture: Picture) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """The tokens of the chat about an image, [n], and the model's other arguments."""
    try:
        text = _chat(processor, picture.caption)
        given = dict(processor(text=[text], images=[picture.image], return_tensors="pt"))
    except TEMPLATE_FAULTS as error:
        raise StatsError(f"the model's processor does not take {picture.name}: {brief(error, 200)}") from error
    begin = given.pop("input_ids")[0]
    given.pop("attention_mask", None)  # nothing is padding
    return begin, given


def _chat(processor: Any, caption: str) -> str:
    """The text of a chat about one image, with the mark where it goes, by the processor's template if it has one."""
    if not getattr(processor, "chat_template", None):
        return f"{getattr(processor, 'image_token', '')}{caption or QUESTION}"
    asked = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": asked}]
    if caption:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": caption}]})
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=not caption)
    return text


def _lengthened(name: str, value: torch.Tensor, tokens: int, length: int) -> torch.Tensor:
    """An argument for the whole window: what has a place for each token (kinds of tokens, masks) goes on as it ends."""
    import torch

    if name.startswith("pixel") or tuple(value.shape[:2]) != (1, tokens):
        return value
    more = value[:, -1:].expand(-1, length - tokens, *value.shape[2:])
    return torch.cat([value, more], dim=1)


def _pictures(source: ImageSource) -> Iterator[Picture]:
    """The images of a source, in the order of their names or rows."""
    return _from_folder(Path(source.path)) if source.path is not None else _from_dataset(source)


def _from_folder(folder: Path) -> Iterator[Picture]:
    """The images that lie in a folder."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    except OSError as error:
        raise StatsError(
            f"cannot read the folder of images {folder}: {error.strerror or error}", hint="check calibration.images"
        ) from error
    for path in paths:
        text = path.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8")[:LONGEST_CAPTION].strip() if text.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise StatsError(f"{text.name}, which describes {path.name}, cannot be read: {error}") from error
        yield Picture(path.name, _opened(path, path.name), caption)


def _from_dataset(source: ImageSource) -> Iterator[Picture]:
    """The images of a data set of the Hub, streamed."""
    needs_extra("datasets")
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        for number, row in enumerate(rows):
            if source.column not in row:
                raise StatsError(f"{source.name} has no column {source.column!r}; it has {brief(', '.join(row))}")
            caption = str(row.get(source.caption) or "") if source.caption else ""
            yield Picture(f"row {number} of {source.name}", row[source.column].convert("RGB"), caption)
    except (OSError, ValueError, AttributeError) as error:
        raise StatsError(
            f"cannot stream images from the data set {source.dataset}: {brief(error, 200)}",
            hint="`column` must hold images; without a network, give `path` to a folder",
        ) from error


def _opened(path: Path, name: str) -> Image:
    """An image in RGB, read whole; StatsError when it is none, or is cut off."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StatsError(
            f"{name} cannot be read as an image: {brief(error, 200)}", hint="remove it from the folder of images"
        ) from error
