"""`--log-file`: what a command says and does, line by line with the time, whatever the terminal shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TextIO

from outlierq.core.errors import OutlierqError


class Log:
    """Lines in a file that others may read meanwhile; nothing at all where none is asked for."""

    def __init__(self, path: Path | None = None):
        """OutlierqError before any work when the file cannot be written. What is in it stays."""
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutlierqError(
                f"the log {path} cannot be written: {error.strerror}", hint="give --log-file another path"
            ) from None

    def __bool__(self) -> bool:
        """Whether anybody keeps what is said."""
        return self._file is not None

    def write(self, text: str) -> None:
        """Every line of the text. A full disk ends the log, and not the job."""
        from outlierq.core.machine.printable import printable

        if self._file is None:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        lines = [f"{now} {printable(line)}".rstrip() + "\n" for line in text.splitlines() if line.strip()]
        try:
            self._file.writelines(lines)
            self._file.flush()
        except OSError:
            self._file = None

    def show(self, part: Any) -> None:
        """What is drawn on a terminal, as plain text."""
        if self._file is None:
            return
        import io

        from outlierq.report.terminal import make_console

        text = io.StringIO()
        make_console(text).print(part, markup=not isinstance(part, str))
        self.write(text.getvalue())
