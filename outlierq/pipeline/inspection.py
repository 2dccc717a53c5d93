"""`outlierq inspect`: what a checkpoint, a statistics folder or an unfinished run holds, from headers alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from outlierq.core.errors import SourceError
from outlierq.core.model import Checkpoint
from outlierq.pipeline.journal import JOURNAL
from outlierq.pipeline.plan import REPORT_NAME


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes, dtypes, architecture, quantization and provenance of a checkpoint."""
    from outlierq.evaluate.comparison import logical_tensors, measure_size

    size = measure_size(logical_tensors(checkpoint))
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
        "quantization": (config.get("quantization_config") or {}).get("quant_method"),
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "files": [f.name for f in checkpoint.files],
        "fingerprint": checkpoint.fingerprint,
        "report": _report(checkpoint),
    }


def _report(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The report of the run that wrote the checkpoint; None when there is none."""
    found = next((f for f in checkpoint.files if f.name == REPORT_NAME), None)
    if found is None:
        return None
    try:
        report = json.loads(found.read())
    except ValueError as error:
        raise SourceError(
            f"{REPORT_NAME} of {checkpoint.source} is not JSON: {error}", hint="remove the file"
        ) from error
    if not isinstance(report, dict):
        raise SourceError(f"{REPORT_NAME} of {checkpoint.source} holds no report", hint="remove the file")
    return report


def describe_stats(folder: Path) -> dict[str, Any]:
    """Identity and extent of a statistics folder."""
    from outlierq.calibrate.stats_file import StatsReader

    reader = StatsReader(folder)
    groups, stats = reader.block(reader.indices[0])
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
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines() if line.endswith("}")]
    done = [line["unit"] for line in lines if "unit" in line]
    return {"unfinished": str(folder), "identity": lines[0]["identity"] if lines else {}, "units_done": done}
