"""Hidden states on disk, so that a crash costs at most a minute."""

from __future__ import annotations

import re
from pathlib import Path

from outlierq.calibrate.runner import HiddenStates
from outlierq.core.errors import OutputError
from outlierq.core.machine.own_files import PART
from outlierq.pipeline.text.own import OWN_TEXT

SAVED = "hidden-states-{}.safetensors"  # by the number of the shard
SAVED_NAME = re.compile(r"hidden-states-\d+\.safetensors")


def save_hidden(path: Path, hidden: HiddenStates, fingerprint: str, index: int) -> None:
    """Write the inputs of block `index`, atomically."""
    import os

    part = path.with_name(f"{path.name}{PART}")
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
    """The files of saved hidden states in a folder of ours."""
    return sorted(path for path in work.glob(SAVED.format("*")) if SAVED_NAME.fullmatch(path.name))


def hidden_names(shards: int) -> frozenset[str]:
    """The names of the files that a run keeps of its text in so many shards."""
    return frozenset({OWN_TEXT, *(SAVED.format(number) for number in range(shards))})


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
