"""Paths for libraries that take them as UTF-8 text only, as the tokenizers of transformers do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """The path itself; for one that is not UTF-8 a link to it, with its suffix, which is gone afterwards."""
    try:
        str(path).encode()
        yield path
    except UnicodeEncodeError:
        with TemporaryDirectory(prefix="outlierq-path-") as folder:
            link = Path(folder, "source").with_suffix(path.suffix if path.suffix.isascii() else "")
            link.symlink_to(path.absolute())
            yield link
