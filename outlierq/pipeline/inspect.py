"""`outlierq inspect`: what a checkpoint, a statistics folder or an unfinished run holds, from headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import json_object
from outlierq.core.model import Checkpoint
from outlierq.core.report import REPORT_NAME
from outlierq.load import changed_since_run
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.ledger.folder import work_folder
from outlierq.pipeline.ledger.journal import JOURNAL, read_lines, seconds_of


def inspect(source: Source) -> dict[str, Any]:
    """What a checkpoint, a statistics folder, or the folder of a run is and holds."""
    folder = Path(source.name)
    unfinished = [place for place in (folder, work_folder(folder)) if (place / JOURNAL).is_file()]
    if (folder / "stats.json").is_file():
        return describe_stats(folder)
    if unfinished:
        return describe_unfinished(unfinished[0])
    if (folder / "unfinished.json").is_file():
        return describe_unfinished_stats(folder)
    return describe_checkpoint(source.headers())


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes, dtypes, architecture, quantization and provenance of a checkpoint.

    changed_since_run: files that are not those that its run wrote; of weights the sizes are compared (`verify` reads
    them).
    """
    from outlierq.evaluate.comparison import logical_tensors, measure_size
    from outlierq.load import described, presented

    size = measure_size(logical_tensors(presented(checkpoint)))
    config = checkpoint.config
    return {
        "source": checkpoint.source,
        "kind": checkpoint.kind,
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "parameters": size.parameters,
        "bytes": size.nbytes,
        "bits_per_weight": size.bits_per_weight,
        "quantized_bits_per_weight": size.quantized_bits_per_weight,
        "tensors": len(checkpoint.tensors),
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values()).most_common()),
        "quantization": (described(checkpoint) or {}).get("quant_method"),
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "files": [f.name for f in checkpoint.files],
        "fingerprint": checkpoint.fingerprint,
        "report": _report(checkpoint),
        "changed_since_run": [f"{name} {what}" for name, what in changed_since_run(checkpoint, read_weights=False)],
    }


def _report(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The report of the run that wrote the checkpoint; None when there is none."""
    file = next((f for f in checkpoint.files if f.name == REPORT_NAME), None)
    if file is None:
        return None
    return json_object(file.read(), f"{REPORT_NAME} of {checkpoint.source}", SourceError, hint="remove the file")


def describe_stats(folder: Path) -> dict[str, Any]:
    """Identity and extent of a statistics folder."""
    from outlierq.calibrate.stored.stats_file import StatsReader

    reader = StatsReader(folder)
    groups, _ = reader.block(reader.indices[0])
    _, stats = reader.block(reader.indices[-1])  # the first one has also seen tokens that the text does not hold
    return {
        "statistics": str(folder),
        **reader.identity.to_json(),
        "blocks": len(reader.indices),
        "bytes": sum(p.stat().st_size for p in folder.iterdir()),
        "tokens": next(iter(stats.values())).tokens,
        "groups": [{"name": g.name, "sites": [s.module for s in g.sites], "fold": g.fold_note} for g in groups],
    }


def describe_unfinished(folder: Path) -> dict[str, Any]:
    """What an unfinished run has done so far."""
    lines, _ = read_lines(folder / JOURNAL)
    done = [line["unit"] for line in lines if "unit" in line]
    first, seconds = lines[0] if lines else {}, seconds_of(lines)
    return {
        "unfinished": str(folder),
        **first.get("about", {}),
        "identity": first.get("identity", {}),
        "units_done": done,
        "seconds": sum(seconds.values()),
        "next": "the same command continues this run; with --restart it starts anew",
    }


def describe_unfinished_stats(folder: Path) -> dict[str, Any]:
    """What an unfinished calibration has done so far."""
    from outlierq.calibrate.stored.stats_file import blocks_written

    return {"unfinished": str(folder), "blocks_done": blocks_written(folder)}
