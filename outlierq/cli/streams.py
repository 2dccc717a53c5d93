"""stdout and stderr as the command line uses them: harmless text only, in any encoding, and no write ever fails.

A full disk or a reader that went away is found while a result is being shown, after hours of work: what cannot be
shown is dropped then, and `Streams.exit_code` says so at the end. Python's own streams raise instead.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

from outlierq.core.errors import EXIT_ERROR
from outlierq.core.machine.printable import printable, representable

STANDARD = range(3)  # stdin, stdout, stderr
# What rich writes to a terminal beside text: styles, the cursor's moves and visibility, erased lines.
STYLES = re.compile(r"(\x1b\[[0-9;]*m|\x1b\[[0-9]*[AGK]|\x1b\[\?25[hl]|\r)")
# How the progress bars of other libraries begin a line again, or find theirs among several.
BAR = re.compile(r"\r|(\n|\x1b\[A)+\Z")


class Stream(io.TextIOBase):
    """A text stream whose writes never raise. lost: the first error, after which everything is dropped."""

    def __init__(self, raw: TextIO):
        self._raw = raw
        self.lost: OSError | ValueError | None = None
        self.rich_proxied_file = _Styled(self)  # the name by which rich finds where to write

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute in typeshed, a property in io
        """What characters the stream can carry."""
        return self._raw.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Text that nobody vouches for: everything that a terminal would act on becomes visible."""
        if not isinstance(text, str):
            raise TypeError(f"a text is written here, not {type(text).__name__}")
        bar = BAR.match(text) if self.isatty() else None
        begun = bar.end() if bar else 0
        self.send(text[:begun] + printable(text[begun:]))
        return len(text)

    def send(self, text: str) -> None:
        """Text that is harmless already, in characters that the stream has."""
        self._attempt(lambda: self._raw.write(representable(text, self.encoding)))

    def flush(self) -> None:
        """Pass on what is held back."""
        self._attempt(self._raw.flush)

    def isatty(self) -> bool:
        """Whether a person may be watching."""
        return self._raw.isatty()

    def fileno(self) -> int:
        """The descriptor, for those who write below Python."""
        return self._raw.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    def _attempt(self, action: Callable[[], object]) -> None:
        """Do it, unless something was lost before: then the rest would be a text with a hole in it."""
        if self.lost is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: a stream that was closed
            self.lost = error
            self._drop_the_rest()

    def _drop_the_rest(self) -> None:
        """What is held back cannot fail again when the interpreter ends."""
        try:
            descriptor = self._raw.fileno()
        except (OSError, ValueError):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


class _Styled:
    """The same stream for rich: its styles pass on a terminal, whatever else comes along is made visible."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self.encoding, self.flush = stream.encoding, stream.flush
        self.isatty, self.fileno = stream.isatty, stream.fileno

    def write(self, text: str) -> int:
        """Every second part is a style."""
        parts = STYLES.split(text) if self._stream.isatty() or "FORCE_COLOR" in os.environ else [text]
        self._stream.send("".join(part if place % 2 else printable(part) for place, part in enumerate(parts)))
        return len(text)


class Streams:
    """stdout and stderr of this process, replaced until `restore`."""

    def __init__(self) -> None:
        _occupy_descriptors()
        self._before = sys.stdout, sys.stderr
        # A stream that was closed from the start is one that nobody reads, as /dev/null.
        self.out, self.err = (Stream(raw or _nowhere()) for raw in self._before)
        sys.stdout, sys.stderr = self.out, self.err

    def restore(self) -> None:
        """Python's own streams again."""
        self.flush()
        sys.stdout, sys.stderr = self._before

    def flush(self) -> None:
        """Pass on what is held back."""
        self.out.flush()
        self.err.flush()

    def exit_code(self, code: int) -> int:
        """That of the work itself; an error when all was well but the result could not be shown."""
        self.flush()
        if self.out.lost is None:
            return code
        done = "; the work itself is done, and the files it writes are in place" if code == 0 else ""
        if isinstance(self.out.lost, BrokenPipeError):  # as `head` does: no error of ours
            self.err.write(f"note: nobody reads the output any more{done}\n")
        else:
            self.err.write(f"error: what was printed to stdout is lost: {self.out.lost}{done}\n")
        self.flush()
        return code or EXIT_ERROR


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _occupy_descriptors() -> None:
    """Open what was closed, onto nothing: else the next file that is opened becomes stdout, and is printed into."""
    for descriptor in STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
