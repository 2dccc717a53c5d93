"""Does the index of shards name what there is? Clients that find an index follow it, whatever lies beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.machine.untrusted import brief
from outlierq.pipeline.checking.finding import Findings, listed

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

CHECK = "files"
# Of the size in an index beside that of the tensors: programs count tied tensors twice, or in another dtype.
LEAST_SIZE, LARGEST_SIZE = 0.45, 2.2


def check_shards(folder: Path, checkpoint: Checkpoint, findings: Findings) -> None:
    """Every index of safetensors files in the folder; one that cannot be read is a fault, too."""
    for path in sorted(folder.glob("*.safetensors.index.json")) if folder.is_dir() else ():
        try:
            index = json.loads(path.read_bytes())
            places = index["weight_map"]
            tensors = {str(name): str(file) for name, file in places.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            findings.fault(CHECK, path.name, "is no index of shards")
            continue
        _check_places(folder, path.name, tensors, checkpoint, findings)
        _check_size(path.name, index.get("metadata"), checkpoint, findings)


def _check_places(
    folder: Path, name: str, tensors: Mapping[str, str], checkpoint: Checkpoint, findings: Findings
) -> None:
    """Files and tensors that the index names, against those that there are."""
    lost = sorted({file for file in tensors.values() if not (folder / file).is_file()})
    if lost:
        findings.fault(CHECK, name, f"names files that are not there: {brief(listed(lost))}")
        return
    unknown, unnamed = tensors.keys() - checkpoint.tensors.keys(), checkpoint.tensors.keys() - tensors.keys()
    if unknown:
        findings.fault(
            CHECK, name, f"names {len(unknown)} tensors that are not stored: {brief(listed(sorted(unknown)))}"
        )
    if unnamed:
        findings.fault(CHECK, name, f"leaves out {len(unnamed)} stored tensors: {listed(sorted(unnamed))}")


def _check_size(name: str, metadata: Any, checkpoint: Checkpoint, findings: Findings) -> None:
    """The total size, where one is told."""
    said = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    if isinstance(said, int) and not LEAST_SIZE * stored <= said <= LARGEST_SIZE * stored:
        findings.fault(CHECK, name, f"tells of {said:,} bytes; the tensors hold {stored:,}")
