"""A killed run, started again, gives the bytes of an uninterrupted one; nothing half-done lies under the final name."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from outlierq.calibrate.stats_file import StatsReader
from outlierq.core.errors import OutputError, StatsError
from outlierq.load import open_checkpoint
from outlierq.pipeline import calibration, journal
from outlierq.pipeline import quantize as run
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.output import Output
from outlierq.pipeline.plan import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

KILLED = 77
SMALL = ["calibration.samples=6", "calibration.sequence_length=32"]
RECIPES = {
    "static": ("awq-gptq-w4", SMALL),
    "sequential": ("awq-gptq-w4", [*SMALL, "calibration.mode=sequential"]),
    "data-free": ("rtn-w4", ["export.max_shard_size=20KB"]),
}


def compress(source: Path, out: Path, recipe: str, settings: list[str], **options):
    return quantize(make_plan(open_checkpoint(str(source)), load(recipe, settings)), out, **options)


def collect(source: Path, out: Path, *settings: str, samples: int = 6):
    small = [f"calibration.samples={samples}", "calibration.sequence_length=32", *settings]
    return calibrate(open_checkpoint(str(source)), load("gptq-w4", small).calibration, out)


def after(calls: int, owner: object, name: str) -> None:
    """From now on the process dies at the end of the given call of a function, as if its plug was pulled."""
    original, left = getattr(owner, name), [calls]

    def counted(*args, **kwargs):
        result = original(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            os._exit(KILLED)
        return result

    setattr(owner, name, counted)


# Where to die: after the n-th call of a function. Unit 1 is what lies outside of the blocks, unit 2 is block 0.
MOMENTS = {
    "before anything is written": (1, run, "Journal"),
    "in the middle of writing the first block": (30, run.Output, None),
    "after the first block is in the journal": (2, journal.Journal, "add"),
    "after the last block is in the journal": (3, journal.Journal, "add"),
    "during the final verification": (1, Output, "verify"),
    "after the report is written": (2, run, "write_small"),
}


def in_child(moment: str, work, *args) -> int:
    """Run `work` in a child process that dies at the moment; its exit code."""

    def body():
        calls, owner, name = MOMENTS[moment]
        if name is None:
            from outlierq.export.writer import ShardWriter

            owner, name = ShardWriter, "write"
        after(calls, owner, name)
        work(*args)

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join()
    return child.exitcode


def result(folder: Path) -> tuple[dict[str, bytes], dict]:
    """Every file of a result, and the report without what time and place change."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("outlierq.json"))
    for name in ("seconds", "peak_bytes", "out"):
        del report[name]
    for row in report["rows"]:
        del row["seconds"]
    return files, report


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """The result of every recipe, run without a stop."""
    folders = {}
    for name, (recipe, settings) in RECIPES.items():
        folders[name] = tmp_path_factory.mktemp("uninterrupted") / name
        compress(tiny_llama, folders[name], recipe, settings)
    return folders


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_started_again_gives_the_same_bytes(name, moment, tiny_llama, uninterrupted, tmp_path):
    recipe, settings = RECIPES[name]
    out = tmp_path / "out"
    assert in_child(moment, compress, tiny_llama, out, recipe, settings) == KILLED
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    compress(tiny_llama, out, recipe, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert result(out) == result(uninterrupted[name])
