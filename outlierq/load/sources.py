"""Opening a source: a folder, a GGUF file or a Hub id becomes a `Checkpoint`, or is refused with a reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from outlierq.core.errors import SourceError, nearest
from outlierq.core.machine.installed import check_versions
from outlierq.load.source.folder import PICKLES, FolderCheckpoint, pickle_refusal

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint
    from outlierq.load.hub.streamed import StreamedCheckpoint

Opened = TypeVar("Opened", bound="Checkpoint")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint at `source`: headers are read and checked, weights are not.

    source: a folder, a .gguf file, or a Hub id owner/name (an existing path wins). revision: branch, tag or commit of a
    Hub id; the commit it stood for is kept as `.revision`. SourceError says why a source cannot be read.
    """
    path = Path(source).expanduser()
    if revision is not None and path.exists():
        raise SourceError(f"revision {revision} makes sense for a Hub id only; {source} is a local path")
    if path.is_dir():
        checkpoint = FolderCheckpoint(path, source=source)
    elif path.is_file():
        checkpoint = _open_file(path, source)
    elif is_hub_id(source):
        from outlierq.load.hub.snapshot import snapshot

        check_versions()
        folder, commit = snapshot(source, revision, trust_remote_code=trust_remote_code)
        checkpoint = FolderCheckpoint(folder, source=source, revision=commit)
    else:
        raise _missing(source, path)
    return _permitted(checkpoint, trust_remote_code)


def stream_checkpoint(
    source: str,
    shards: Path | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    restart: bool = False,
) -> StreamedCheckpoint:
    """The checkpoint of a Hub id, whose weights come through the folder `shards` when they are read, and go again.

    shards None: for headers alone. restart: forget the commit of a run that was stopped. SourceError as above.
    """
    if not is_hub_id(source):
        raise SourceError(f"{source} is no Hub id, so there is nothing to stream", hint="leave --stream-from-hub out")
    from outlierq.load.hub.streamed import open_streamed

    check_versions()
    checkpoint = open_streamed(source, revision, shards, trust_remote_code=trust_remote_code, restart=restart)
    return _permitted(checkpoint, trust_remote_code)


def _permitted(checkpoint: Opened, trust_remote_code: bool) -> Opened:
    """The checkpoint, which knows from here on whether its code may run; refused when it needs code that may not."""
    if not trust_remote_code:
        _refuse_remote_code(checkpoint)
    checkpoint.trust_remote_code = trust_remote_code
    return checkpoint


def _open_file(path: Path, source: str) -> Checkpoint:
    """A GGUF file, or the refusal of any other file."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        from outlierq.load.gguf.checkpoint import GgufCheckpoint

        return GgufCheckpoint(path, source=source)
    if path.name.endswith(PICKLES):
        raise pickle_refusal(path.name)
    if path.suffix in (".safetensors", ".json"):
        raise SourceError(f"{source} is one file of a checkpoint", hint=f"name its folder: {path.parent}")
    raise SourceError(f"{source} is neither a GGUF file nor a folder", hint="give a folder, a .gguf file or a Hub id")


def is_hub_id(source: str) -> bool:
    """Whether this can only be a Hub id: owner/name, no path that exists, and none whose parent folder exists."""
    path = Path(source).expanduser()
    is_path = path.exists() or path.parent.is_dir() or source.endswith(".gguf")
    return bool(HUB_ID.fullmatch(source)) and not is_path


def _missing(source: str, path: Path) -> SourceError:
    """The refusal of a path that is not there, with the nearest name in its parent folder."""
    known = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    close = nearest(path.name, known)
    hint = f"did you mean {path.parent / close}?" if close else "a Hub id is written owner/name"
    return SourceError(f"{source} does not exist", hint=hint)


def _refuse_remote_code(checkpoint: Checkpoint) -> None:
    """Refuse a model whose code comes with the checkpoint; one that transformers implements itself needs none of it."""
    auto_map = checkpoint.config.get("auto_map")
    if not auto_map:
        return
    # transformers is imported only for the rare config that names code, since it costs seconds.
    from transformers import CONFIG_MAPPING

    if str(checkpoint.config.get("model_type")) not in CONFIG_MAPPING:
        named = auto_map.values() if isinstance(auto_map, dict) else ()
        code = sorted({str(name).split(".")[0] + ".py" for name in named if isinstance(name, str)}) or ["auto_map"]
        raise SourceError(
            f"{checkpoint.source} brings its own model code ({', '.join(code)}), which is not run unasked",
            hint="read that code; if you trust it, pass --trust-remote-code",
        )
