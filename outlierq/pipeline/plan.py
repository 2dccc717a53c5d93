"""`outlierq plan`: what a recipe would do to a checkpoint and what that would cost, from headers alone."""

from __future__ import annotations

from dataclasses import replace

from outlierq.load import check_recorded
from outlierq.pipeline.asked.events import Listener, silent
from outlierq.pipeline.asked.request import FormatAlone, Request, Source
from outlierq.pipeline.asked.resources import ceiling
from outlierq.pipeline.block.expert_stats import works_of
from outlierq.pipeline.convert import make_conversion
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.estimate import estimate
from outlierq.pipeline.planning.memory import check_together, choose
from outlierq.pipeline.planning.plan import Plan


def plan(source: Source, request: Request, *, max_memory: str | int | None = None, listen: Listener = silent) -> Plan:
    """The plan, with what it will cost; with `max_memory` also what is done to stay below it.

    A compressed checkpoint and a format alone: the plan of the conversion, for which every weight is read.
    OutlierqError when the memory is too little.
    """
    made = decided(source, request, listen)
    made = replace(made, expected=estimate(made))
    most = ceiling(max_memory)
    if most is None:
        return made
    works = works_of(made)
    check_together(works, most)
    said = [sentence for work in works for sentence in choose(work, most).sentences]
    return replace(made, savings=tuple(dict.fromkeys(said)))


def decided(source: Source, request: Request, listen: Listener = silent) -> Plan:
    """What a run would do, without what it would cost."""
    source, alone = source.in_its_frame(request), isinstance(request, FormatAlone)
    checkpoint = source.open() if alone else source.headers()
    if isinstance(request, FormatAlone) and request.converts(checkpoint):
        return make_conversion(checkpoint, request.format, listen=listen)
    check_recorded(checkpoint, read_weights=False)
    return make_plan(checkpoint, request.recipe if isinstance(request, FormatAlone) else request)
