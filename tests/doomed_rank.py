"""Runs outlierq as one of several ranks of which one meets its end: `doomed_rank.py RANK BLOCK END WORDS...`.

When rank RANK has calibrated block BLOCK it gets the signal END ("SIGKILL"), or raises the error END ("NumbersError").
"""

import os
import signal
import sys

from outlierq.cli.main import run
from outlierq.core import errors
from outlierq.pipeline.block.stats_run import StatsFromRun

rank, block, end, *words = sys.argv[1:]
collect = StatsFromRun._collect


def doomed(self: StatsFromRun, index: int) -> object:
    found = collect(self, index)
    if os.environ["RANK"] == rank and index == int(block):
        if end.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, end))
        else:
            raise getattr(errors, end)("3 of 7 values are not finite")
    return found


StatsFromRun._collect = doomed
sys.argv = ["outlierq", *words]
run()
