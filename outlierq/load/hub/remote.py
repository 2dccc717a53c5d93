"""One weight file on the Hub: pieces of it by HTTP ranges, or all of it, fetched on from where it broke off, checked.

huggingface_hub starts a file anew in every process. Here a part stays on the disk until the file is whole, since a
shard can take an hour.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from outlierq.core.errors import SourceError
from outlierq.core.machine.hub import asking
from outlierq.core.machine.own_files import PART
from outlierq.core.machine.threads import pool
from outlierq.load.hub.content import check_content
from outlierq.load.hub.snapshot import Listed
from outlierq.load.source.shards import LARGEST_HEADER, StoredTensor, parse_header

# Headers of large shards have some 100 KB; one request then suffices for nearly all.
FIRST_BYTES = 1 << 18
PIECE_BYTES, PIECES_AT_ONCE = 1 << 24, 4
SECONDS = 60.0
GO_ON = "run the same command again; it continues where it stopped"


class RemoteFile:
    """A weight file at one commit. May be used by several threads."""

    def __init__(self, repository: str, commit: str, listed: Listed):
        self.repository, self.commit, self.listed = repository, commit, listed
        self._lock = Lock()
        self._address: tuple[str, dict[str, Any]] | None = None

    def header(self) -> dict[str, StoredTensor]:
        """Every tensor of the file, as `read_header` gives them."""
        size = self.listed.size
        start = self.read(0, min(FIRST_BYTES, size))
        length = 8 + int.from_bytes(start[:8], "little")
        # What is longer than any header, or than the file, is refused below.
        if len(start) < length <= min(size, 8 + LARGEST_HEADER):
            start += self.read(len(start), length)
        return parse_header(Path(self.listed.name), BytesIO(start), size)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), which are not checked. SourceError when they cannot be had."""
        if start >= stop:
            return b""
        with asking(self.repository, self.commit, hint=GO_ON):
            content = self._ask(start, stop)
        if len(content) != stop - start:
            raise SourceError(
                f"the Hub gave {len(content)} bytes of {self.listed.name} instead of bytes {start} to {stop}",
                hint="a proxy that does not pass on HTTP ranges does this; leave --stream-from-hub out",
            )
        return content

    def fetch(self, target: Path) -> None:
        """Put the file at `target`. SourceError when its bytes are not those that the Hub lists."""
        part = target.with_name(f"{target.name}{PART}")
        try:
            while True:
                resumed = part.exists()
                self._append_rest(part)
                try:
                    self.check(part)
                    break
                except SourceError:
                    part.unlink()
                    if not resumed:  # else a power cut may have left holes in the part of an earlier process
                        raise
            os.replace(part, target)
        except OSError as error:
            raise SourceError(
                f"{target} cannot be written: {error.strerror or error}", hint=f"free some space and {GO_ON}"
            ) from error

    def check(self, path: Path) -> None:
        """SourceError when what lies there is not this file."""
        name = f"{self.listed.name} of {self.repository}"
        check_content(path, self.listed.digest, name, hint="run the same command again; it fetches the file anew")

    def _append_rest(self, part: Path) -> None:
        """Fetch all bytes that the part does not have yet."""
        size, step = self.listed.size, PIECE_BYTES * PIECES_AT_ONCE

        def piece(start: int) -> bytes:
            return self.read(start, min(start + PIECE_BYTES, size))

        with part.open("ab") as file, pool(PIECES_AT_ONCE) as threads:
            if os.fstat(file.fileno()).st_size > size:
                file.truncate(0)
            for first in range(os.fstat(file.fileno()).st_size, size, step):
                for content in threads.map(piece, range(first, min(first + step, size), PIECE_BYTES)):
                    file.write(content)

    def _ask(self, start: int, stop: int) -> bytes:
        """What is answered to a request for a range."""
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        span = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url, headers = self._resolved()
        answer = http_backoff("GET", url, headers=headers | span, timeout=SECONDS)
        if answer.status_code in (401, 403):  # signed addresses expire
            url, headers = self._resolved(instead_of=url)
            answer = http_backoff("GET", url, headers=headers | span, timeout=SECONDS)
        hf_raise_for_status(answer)
        return answer.content

    def _resolved(self, instead_of: str | None = None) -> tuple[str, dict[str, Any]]:
        """Where the bytes are, and the headers to ask there; asked of the Hub once, or when that place has expired.

        The Hub counts such questions, so they are not asked for every range.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        with self._lock:
            if self._address is None or self._address[0] == instead_of:
                url = hf_hub_url(self.repository, self.listed.name, revision=self.commit)
                location = get_hf_file_metadata(url, timeout=SECONDS, retry_on_errors=True).location
                on_hub = urlsplit(location).netloc == urlsplit(url).netloc
                # The token is for the Hub alone, not for the servers that hold large files.
                self._address = location, build_hf_headers() if on_hub else {}
            return self._address
