"""Hidden states on disk, so that a crash costs at most a minute."""

from __future__ import annotations

from pathlib import Path

from outlierq.calibrate.runner import HiddenStates
from outlierq.core.errors import OutputError

SAVED = "hidden-states-{}.safetensors"  # by the number of the shard


def save_hidden(path: Path, hidden: HiddenStates, fingerprint: str, index: int) -> None:
    """Write the inputs of block `index`, atomically."""
    import os

    part = path.with_suffix(".part")
    try:
        hidden.save(part, {"tokens": fingerprint, "block": str(index)})
        os.replace(part, path)
    except OSError as error:
        raise OutputError(
            f"cannot save the hidden states to {path} ({hidden.values.nbytes:,} bytes): {error}",
            hint="free some space and run the same command again; it continues where it stopped",
        ) from error


def forget_hidden_beyond(work: Path, index: int) -> None:
    """Remove saved hidden states that are past block `index`, which has to run again."""
    from safetensors import safe_open

    for path in saved_hidden(work):
        with safe_open(path, framework="np") as file:
            beyond = int(file.metadata()["block"]) > index
        if beyond:
            path.unlink()


def saved_hidden(work: Path) -> list[Path]:
    """The files of saved hidden states in a folder."""
    return sorted(work.glob(SAVED.format("*")))


def load_hidden(path: Path, hidden: HiddenStates, fingerprint: str) -> int:
    """Fill `hidden` from a saved file and return the block whose inputs it holds; 0 when there is none."""
    if not path.is_file():
        return 0
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    if metadata["tokens"] != fingerprint:
        return 0
    hidden.load(path)
    return int(metadata["block"])
