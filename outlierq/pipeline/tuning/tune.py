"""`outlierq tune`: from two checkpoints to a third one, that of the first with better scales, gains and biases."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq import __version__
from outlierq.core.machine.record import signed
from outlierq.core.report import REPORT_NAME, Report
from outlierq.export.writer import write_small
from outlierq.load import lasting_stamps
from outlierq.pipeline.asked.events import Event
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.stats_run import token_set
from outlierq.pipeline.checking.written import check_written
from outlierq.pipeline.ledger.clock import Clock
from outlierq.pipeline.ledger.folder import finish, working
from outlierq.pipeline.ledger.journal import Journal
from outlierq.pipeline.tuning.kept import NAMES, KeptState
from outlierq.pipeline.tuning.pair import Pair, opened_pair
from outlierq.pipeline.tuning.patched import work_files
from outlierq.pipeline.tuning.running import How, tunable
from outlierq.pipeline.tuning.settings import STEP_OF_ERROR, Tuned, TuneSettings
from outlierq.pipeline.tuning.written import stopped, written

if TYPE_CHECKING:
    from outlierq.calibrate.text.windows import TokenSet
    from outlierq.quantize.tune import TuneState


def tune(
    source: Source,
    reference: Source,
    out: Path,
    settings: TuneSettings,
    *,
    restart: bool = False,
    resources: Resources = USUAL,
) -> Tuned:
    """Tune the checkpoint of `source` against the one that it was made of, and put the result at `out`.

    An interrupted run continues. SourceError, ArgumentError before any work for what cannot be tuned.
    """
    settings.check()
    with working(out, restart=restart) as work:
        clock = Clock()
        with clock("check"):
            pair = opened_pair(source, reference, frozenset(settings.kinds), resources.listen)
            tokens = token_set(pair.original, settings.calibration, resources=resources)
        settings = _with_step(settings, pair)
        journal = _journal(pair, tokens, settings, work, clock)
        how = How(settings.batch_size, settings.dtype, resources.device, work, resources.listen)
        with journal.told_of_stops():
            with clock("tune"):
                state = _state(pair, tokens, settings, how, journal)
            with clock("export"):
                report = written(pair, tokens, settings, state, work, out)
                check_written(work, pair.stored)
            spent = dict(journal.seconds + clock.seconds)
            report = signed(replace(report, seconds=report.seconds | {"tune": sum(spent.values())}))
            write_small(work, {REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()})
        finish(work, out, work_files(pair.stored, ()))
    return _told(out, pair, state, report)


def _told(out: Path, pair: Pair, state: TuneState, report: Report) -> Tuned:
    """What was done."""
    return Tuned(
        out=str(out),
        before=state.first,
        after=state.least,
        improved=state.improved,
        steps=state.step,
        losses=tuple(state.losses),
        judged=state.judged,
        moved=dict(Counter(each.kind for each in pair.moving.values())),
        notes=(*pair.notes, *([stopped(state)] if state.trouble else [])),
        report=report,
    )


def _with_step(settings: TuneSettings, pair: Pair) -> TuneSettings:
    """The settings with a size of steps."""
    if settings.step_size is not None:
        return settings
    errors = list(pair.comparison.errors.values())
    return replace(settings, step_size=STEP_OF_ERROR * sum(errors) / max(1, len(errors)))


def _journal(pair: Pair, tokens: TokenSet, settings: TuneSettings, work: Path, clock: Clock) -> Journal:
    """Of this run; OutputError when an unfinished one of another kind is there."""
    values = asdict(settings) | {"text": tokens.fingerprint, "kinds": list(settings.kinds)}
    identity = {
        "outlierq": __version__,
        "source": pair.stored.fingerprint,
        "reference": pair.original.checkpoint.fingerprint,
        "tuning": values,
    }
    about = {"model": pair.stored.source, "recipe": "tune", "units": settings.step_count}
    files = work_files(pair.stored, NAMES)
    return Journal(work, identity, clock.spent, about, files, lasting_stamps(pair.stored))


def _state(pair: Pair, tokens: TokenSet, settings: TuneSettings, how: How, journal: Journal) -> TuneState:
    """Tune, and keep every step."""
    from outlierq.quantize import tune as method

    kept, steps = KeptState(how.work, journal), settings.step_count

    def told(state: TuneState) -> None:
        kept.keep(state)
        figures = f"KL {state.losses[-1]:.4g}, held out {state.least:.4g} of {state.first:.4g}"
        how.listen(Event("tune", state.step, steps, step=figures))

    assert settings.step_size is not None, "it was chosen"
    with tunable(pair.original, pair.packed, pair.moving, tokens.ids, how) as model:
        how.listen(Event("tune", 0, steps, step="how far the start diverges"))
        return method.tune(
            model,
            steps=steps,
            together=settings.together,
            step_size=settings.step_size,
            seed=settings.seed,
            state=kept.last(model.start),
            told=told,
        )
