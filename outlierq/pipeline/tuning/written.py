"""The tuned checkpoint and its report: the former one's, with what has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.report import Report, SiteRow
from outlierq.pipeline.checking.weights import relative_error
from outlierq.pipeline.tuning.pair import Pair
from outlierq.pipeline.tuning.patched import write_patched
from outlierq.pipeline.tuning.report import first_report
from outlierq.pipeline.tuning.settings import TuneSettings

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.text.windows import TokenSet
    from outlierq.quantize.tune import TuneState

TUNED = "+tune"  # behind the method of a weight


def written(pair: Pair, tokens: TokenSet, settings: TuneSettings, state: TuneState, work: Path, out: Path) -> Report:
    """Write the checkpoint with the best changes; its report, which is not signed yet."""
    changes = state.best if state.improved else {}
    tensors = {name: pair.moving[name].stored(change) for name, change in changes.items()}
    files = write_patched(pair.stored, work, tensors)
    report = pair.report or first_report(pair.packed, pair.original, pair.comparison)
    record = dict(report.record or {})
    record.pop("units", None)  # of bytes that have changed
    record |= {"files": files, "tune": _said(pair, tokens, settings, state) | {"moved": _moved(pair, tensors)}}
    rows = tuple(_row(pair, row, changes) for row in report.rows) if changes else report.rows
    note = _sentence(tokens, state)
    return replace(
        report,
        out=str(out),
        rows=rows,
        notes=(*report.notes, note, *pair.notes),
        seeds=report.seeds | {"tune": settings.seed},
        evaluation=None,
        record=record,
    )


def _moved(pair: Pair, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Of every tensor of any shape that is no part of a weight how far its numbers may have gone, in all tunings."""
    far = dict(pair.comparison.tuned)
    for name, tensor in tensors.items():
        if name in pair.packed.checkpoint.tensors:
            gone = (tensor.float() - pair.moving[name].values.float()).abs().max()
            far[name] = far.get(name, 0.0) + float(gone)
    return far


def _said(pair: Pair, tokens: TokenSet, settings: TuneSettings, state: TuneState) -> dict[str, Any]:
    """What the record says of tuning."""
    values = asdict(settings) | {"kinds": list(settings.kinds), "text": tokens.description}
    kl = [state.first, state.least]
    return {"of": pair.stored.fingerprint, "settings": values, "steps": state.step, "kl": kl}


def _sentence(tokens: TokenSet, state: TuneState) -> str:
    """What tuning did."""
    if not state.improved:
        return (
            f"tuned on {tokens.description}, and no step helped on the held-out part (KL {state.first:.4g}): all bytes "
            f"stay{f'; {stopped(state)}' if state.trouble else ''}"
        )
    return (
        f"tuned in {state.step} steps on {tokens.description}: KL on the held-out part {state.first:.4g} -> "
        f"{state.least:.4g}; output errors are not known any more"
    )


def stopped(state: TuneState) -> str:
    """Why tuning ended early."""
    return f"tuning stopped after step {state.step}: {state.trouble}"


def _row(pair: Pair, row: SiteRow, changes: Mapping[str, Any]) -> SiteRow:
    """The report's row of a weight, with the error that it has now."""
    name = pair.packed.names.get(f"{row.site}.weight", f"{row.site}.weight")
    linear = pair.packed.checkpoint.linears.get(name)
    member = None if linear is None else next((m for m in linear.members.values() if m in changes), None)
    if member is None:
        return row
    before = pair.packed.checkpoint.read(name).float()
    now = pair.moving[member].applied(before, changes[member])
    error = relative_error(now, pair.comparison.expected.read(name).float())
    method = f"{row.method.removesuffix(TUNED)}{TUNED}"
    return replace(row, method=method, output_error=None, weight_error=error)
