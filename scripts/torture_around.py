"""What lies or fails around a run: foreign files, sources that change during a stop, streams, caches.

Each kind is a function of a bench, a disk and a draw; it returns how the trial ended, and raises WrongEndError when a
foreign byte was lost, something else than the job's result was made, or an end was not explained.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from power_cut import Disk, kill
from torture_bench import (
    QUANTIZE,
    THREADS,
    Bench,
    Ended,
    WrongEndError,
    compare,
    difference,
    fresh_disk,
    is_pristine,
    repair,
    run,
)

LONGEST_SECONDS = 120.0


def trial_around(bench: Bench, kind: str, draw: Random) -> str:
    """One trial of a kind; how it ended."""
    return AROUND[kind](bench, fresh_disk(bench), draw)


def _check_explained(ended: Ended) -> None:
    """A run that did not come to its end says why."""
    if ended.code != 1 or "error: " not in ended.said or "Traceback" in ended.said:
        raise WrongEndError(f"exit code {ended.code}, it said:\n{ended.said}")


# --- foreign files ----------------------------------------------------------------------------------------------------

# What other programs and people call their files. Those with a name that a run writes, too, are foreign where no list
# of ours lies; a list makes its names ours.
OTHERS = (
    "my-notes.txt", "model.safetensors.part", "hidden-states-0.bin", "hidden-states-00000.safetensors", "old.part",
    "model-00001-of-00009.safetensors", ".outlierq-notes.json", "block-99999.npz", "logits.npy", "notes/day-1.txt",
    "block-00007.safetensors", "model.safetensors.outlierq-part~", ".journal.jsonl", "outlierq.json.bak",
)  # fmt: skip
SIMILAR = (
    *OTHERS, "outlierq.json", "config.json", "model.safetensors", "stats.json", "unfinished.json",
    ".outlierq-shards.json", ".outlierq-demo.json", "block-00000.safetensors",
)  # fmt: skip
CONTENTS = (b"", b"{}", b"[]", b'{"rows": []}', b'{"shards": ["my-notes.txt"]}', b'["my-notes.txt"]', b"mine" * 999)
# Folders that a job may work in, beside its result.
FOLDERS = {"calibrate": ("out",), "streamed": ("out.partial", "out.shards", "out.experts", "out")}


def foreign_files(bench: Bench, root: Path, draw: Random) -> str:
    """Somebody's files lie where a run works, before it or since it was stopped."""
    job = draw.choice((*QUANTIZE, "calibrate", "demo"))
    folder = root / draw.choice(FOLDERS.get(job, ("out.partial", "out.experts", "out") if job != "demo" else ("out",)))
    if stopped := draw.random() < 0.5:
        _stop(bench, job, root, draw)
    before = _put(bench, folder, draw.sample(OTHERS if stopped else SIMILAR, draw.randrange(1, 4)), draw)
    ours = _held(root).keys() - before.keys()
    more = ("--restart",) if job in QUANTIZE and draw.random() < 0.3 else ()
    ended = _run(bench, job, root, more=more)
    _check_kept(before, root, ended)
    if ended.code:
        _check_explained(ended)
        if not stopped and int((bench.work / "units").read_text().split()[-1]):
            raise WrongEndError(f"it was refused after work was done\n{ended.said}")
        if not stopped and job != "demo" and (left := _held(root).keys() - before.keys() - ours):
            raise WrongEndError(f"it was refused and left {sorted(left)}\n{ended.said}")
        _move_away(bench, before, root)
        is_done = job != "demo" and bench.result(job, root) == bench.expected[job]  # stopped at its last step
        again = ended if is_done else _run(bench, job, root)
        if again.code and not is_done:
            raise WrongEndError(f"what was in the way is gone, and it says\n{again.said}\nbefore:\n{ended.said}")
    else:
        _move_away(bench, before, root)
    if job != "demo":
        compare(bench, job, root)
    return f"{'refused' if ended.code else 'done'}, {'after a stop' if stopped else 'from the start'}"


def _stop(bench: Bench, job: str, root: Path, draw: Random) -> None:
    """Start a job and kill it somewhere; what a demo left is a whole one, since nothing of a demo is resumed."""
    if job == "demo":
        ended = _run(bench, job, root)
        if ended.code:
            raise WrongEndError(f"the demo fails by itself:\n{ended.said}")
        return
    run(bench, job, root, disk=Disk(root, 1 + int(draw.random() * bench.operations[job]), kill))


def _run(bench: Bench, job: str, root: Path, more: tuple[str, ...] = ()) -> Ended:
    """The job; a demo is one of the source."""

    def of_the_source() -> None:
        from outlierq.pipeline import demo

        demo.default_model = lambda: str(bench.source)
        demo.WINDOWS = 1
        demo.SAMPLES = 4

    return run(bench, job, root, of_the_source if job == "demo" else lambda: None, more=more)


def _put(bench: Bench, folder: Path, names: list[str], draw: Random) -> dict[str, Any]:
    """Foreign files with these names, one of them perhaps a link; what there is of them now, by place."""
    outside = bench.work / "outside"
    outside.write_bytes(b"far away")
    was_there = folder.exists()
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            continue
        if draw.random() < 0.15:
            path.symlink_to(outside)
        else:
            path.write_bytes(draw.choice(CONTENTS))
    return {
        place: content
        for place, content in _held(folder.parent).items()
        if place.startswith(f"{folder.name}/") and (not was_there or place.partition("/")[2] in names)
    }


def _held(root: Path) -> dict[str, Any]:
    """Every file below, by its place: a link's target, else the bytes."""
    paths = [path for path in root.rglob("*") if path.is_symlink() or path.is_file()]
    return {str(p.relative_to(root)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in paths}


def _check_kept(before: dict[str, Any], root: Path, ended: Ended) -> None:
    """What was put there lies there, with the same bytes."""
    now = _held(root)
    lost = sorted(place for place, content in before.items() if now.get(place) != content)
    if lost or (root.parent / "outside").read_bytes() != b"far away":
        raise WrongEndError(f"LOST: {lost or 'what a link leads to'}, exit code {ended.code}\n{ended.said}")


def _move_away(bench: Bench, before: dict[str, Any], root: Path) -> None:
    """As the hint says."""
    for place in before:
        (root / place).unlink()
        with_folders = [(root / place).parent, *(root / place).parent.parents]
        for folder in with_folders[: with_folders.index(root)]:
            if not any(folder.iterdir()):
                folder.rmdir()


# --- sources that change during a stop --------------------------------------------------------------------------------

LOCAL = ("data-free", "static", "sequential", "gated", "calibrate")


def exchanged_source(bench: Bench, root: Path, draw: Random) -> str:
    """Weights are repaired, damaged or exchanged for others with the same headers while a run is stopped."""
    job, way = draw.choice(LOCAL), draw.choice(("repaired", "exchanged", "exchanged"))
    weights = bench.source / "model.safetensors"
    sound, other = weights.read_bytes(), _other_weights(weights.read_bytes(), draw)
    try:
        if way == "repaired":
            _exchange(weights, other, draw)  # before the run
        at = 1 + int(draw.random() * bench.operations[job])
        stopped = run(bench, job, root, _few_bytes_are_sampled, disk=Disk(root, at, kill))
        if stopped.code not in (-signal.SIGKILL, 0):
            _check_explained(stopped)
        _exchange(weights, sound if way == "repaired" else other, draw)
        final = bench.result(job, root) if stopped.code == 0 else None
        ended = run(bench, job, root, _few_bytes_are_sampled)
        if ended.code:
            _check_explained(ended)
            if "--restart" not in ended.said or (root / "out").exists():
                return f"{way}, refused"
            ended = run(bench, job, root, _few_bytes_are_sampled, more=("--restart",))  # as the hint says
            if ended.code:
                raise WrongEndError(f"{job}, {way}: it is not started anew: exit code {ended.code}\n{ended.said}")
            way += ", refused and started anew"
        if final is not None:  # it was whole before, and is refused or left as it was
            return f"{way}, done before"
        made = bench.result(job, root)
        clean = run(bench, job, fresh_disk(bench), _few_bytes_are_sampled)
        if clean.code:
            raise WrongEndError(f"a run of the final source fails and a continued one does not: {clean.said}")
        if made != (expected := bench.result(job, root)):
            raise WrongEndError(f"{job}, {way}: continued to a mixture: {difference(expected or {}, made or {})}")
        return f"{way}, right"
    finally:
        repair(bench)


def _few_bytes_are_sampled() -> None:
    """Of a model that is not tiny, the fingerprint knows a small part: what is exchanged must be noticed elsewhere."""
    sys.modules["outlierq.load.source.fingerprint"].SAMPLE_BYTES = 4


def _other_weights(raw: bytes, draw: Random) -> bytes:
    """The same header, and other bytes: in one place, or in many."""
    data, begin = bytearray(raw), 8 + int.from_bytes(raw[:8], "little")
    for _ in range(draw.choice((1, 200))):
        data[draw.randrange(begin, len(data))] ^= 1
    return bytes(data)


def _exchange(path: Path, content: bytes, draw: Random) -> None:
    """Write in place or under another name first; now and then with the former's time, as some copying programs do."""
    status, is_timeless = path.stat(), draw.random() < 0.5
    if draw.random() < 0.5:
        path.write_bytes(content)
    else:
        path.with_name("new").write_bytes(content)
        path.with_name("new").replace(path)
    if is_timeless:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# --- streams ----------------------------------------------------------------------------------------------------------

# By name: what the shell does with the streams. What was asked for on stdout is lost with some: then 1 is true, too.
STREAMS = {
    "stdin closed": "<&-",
    "stdout closed": ">&-",
    "stderr closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "stdout full": ">/dev/full",
    "stderr full": "2>/dev/full",
    "both full": ">/dev/full 2>&1",
    "stdout hangs up": "| true",
    "stderr hangs up": "2>&1 >/dev/null | true",
    "both hang up": "2>&1 | true",
    "ascii": "PYTHONIOENCODING=ascii",
    "strict latin-1": "PYTHONIOENCODING=latin-1:strict",
    "cp1252": "PYTHONIOENCODING=cp1252:strict",
    "locale C": "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",
    "narrow terminal": "COLUMNS=1 FORCE_COLOR=1",
}
LOSSES = ("stdout closed", "all closed", "stdout full", "both full", "stdout hangs up", "both hang up")


def failing_streams(bench: Bench, root: Path, draw: Random) -> str:
    """A real process whose streams are closed, full, hang up or are narrow; whether it shows a table or JSON."""
    job, way = draw.choice(("data-free", "static", "gated", "calibrate")), draw.choice(list(STREAMS))
    words = [word for word in bench.words(job, root) if word != "--json" or draw.random() < 0.5]
    if draw.random() < 0.5:
        words.remove("-q")
    wide = root / "Ausgabe-é漢\U0001f600"
    words = [str(wide) if word == str(root / "out") else word for word in words]
    said, code = _in_a_shell(bench, job, words, STREAMS[way])
    if "Traceback" in said or "Exception ignored" in said:
        raise WrongEndError(f"{job}, {way}: exit code {code}, it said:\n{said}")
    if code not in ((0, 1) if way in LOSSES else (0,)):
        raise WrongEndError(f"{job}, {way}: exit code {code}, it said:\n{said}")
    if not wide.is_dir():
        raise WrongEndError(f"{job}, {way}: exit code {code}, and nothing is there; it said:\n{said}")
    wide.rename(root / "out")
    compare(bench, job, root)
    return f"{way}: {code}"


def _in_a_shell(bench: Bench, job: str, words: list[str], streams: str) -> tuple[str, int]:
    """Standard error where the shell still has it, and the exit code of the command itself."""
    (bench.work / "code").unlink(missing_ok=True)
    variables, redirected = (streams, "") if "=" in streams else ("", streams)
    head, bar, tail = redirected.partition("|")
    command = f'{{ {variables} "$@" {head}; echo $? > "$CODE"; }} {bar}{tail}'
    environment = os.environ | {"CODE": str(bench.work / "code"), "OMP_NUM_THREADS": str(THREADS.get(job, 1))}
    if "| true" in streams and "2>&1" in streams:
        command = f'{{ "$@"; echo $? > "$CODE"; }} {redirected}'
    done = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "outlierq", *words],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=LONGEST_SECONDS, errors="replace",
    )  # fmt: skip
    return done.stderr, int((bench.work / "code").read_text())


# --- caches -----------------------------------------------------------------------------------------------------------

# Root may write where permissions forbid it, so these are places where nothing can be made.
CACHES: dict[str, dict[str, str | None]] = {
    "a file": {"OUTLIERQ_CACHE": "FILE"},
    "below a file": {"OUTLIERQ_CACHE": "FILE/cache"},
    "below a device": {"OUTLIERQ_CACHE": "/dev/null/cache"},
    "in /proc": {"OUTLIERQ_CACHE": "/proc/cache"},
    "a link to nothing": {"OUTLIERQ_CACHE": "LINK"},
    "home in /proc": {"OUTLIERQ_CACHE": None, "XDG_CACHE_HOME": None, "HOME": "/proc"},
    "home is a file": {"OUTLIERQ_CACHE": None, "XDG_CACHE_HOME": None, "HOME": "FILE"},
    "no home": {"OUTLIERQ_CACHE": None, "XDG_CACHE_HOME": None, "HOME": None},
    "empty home": {"OUTLIERQ_CACHE": None, "XDG_CACHE_HOME": None, "HOME": ""},
    "results are a file": {"OUTLIERQ_CACHE": "TAKEN"},
    "a name too long": {"OUTLIERQ_CACHE": "LONG"},
    "every cache": {"OUTLIERQ_CACHE": "FILE", "XDG_CACHE_HOME": "FILE", "HOME": "/proc", "HF_HOME": "FILE"},
}  # fmt: skip
EVALUATION = ("--windows", "2", "--window-length", "32", "--record", "--json", "-q")


def unwritable_caches(bench: Bench, root: Path, draw: Random) -> str:
    """The measurement is printed and recorded all the same."""
    way = draw.choice(list(CACHES))
    work = bench.work
    (work / "FILE").write_text("in the way")
    (work / "TAKEN").mkdir(exist_ok=True)
    (work / "TAKEN" / "results").write_text("in the way")
    if not (work / "LINK").is_symlink():
        (work / "LINK").symlink_to(work / "nowhere" / "at all")
    places = {"FILE": work / "FILE", "LINK": work / "LINK", "TAKEN": work / "TAKEN", "LONG": work / ("x" * 300)}

    def place(value: str) -> str:
        first, *rest = value.split("/")
        return "/".join((str(places.get(first, first)), *rest))

    variables = {name: value and place(value) for name, value in CACHES[way].items()}
    if draw.random() < 0.3:
        _measured_by_gate(bench, root, variables, way)
        return f"{way}, gate"
    bench.evaluation = bench.evaluation or _evaluated(bench, root, {}, "undisturbed")
    found = _evaluated(bench, root, variables, way)
    if found != bench.evaluation:
        raise WrongEndError(f"{way}: measured {found}, elsewhere {bench.evaluation}")
    return f"{way}, eval"


def _measured_by_gate(bench: Bench, root: Path, variables: dict[str, str | None], way: str) -> None:
    """A gated run, which measures at its end."""
    ended = run(bench, "gated", root, lambda: _set(variables))
    if ended.code or "Traceback" in ended.said:
        raise WrongEndError(f"{way}: exit code {ended.code}, it said:\n{ended.said}")
    compare(bench, "gated", root)


def _evaluated(bench: Bench, root: Path, variables: dict[str, str | None], way: str) -> Any:
    """What `eval` printed of a fresh copy of the checkpoint, which must be what it recorded."""
    shutil.rmtree(root / "out", ignore_errors=True)
    shutil.copytree(bench.work / "checkpoint", root / "out")
    shutil.rmtree(bench.work / "cache", ignore_errors=True)
    words = ["eval", str(root / "out"), "--reference", str(bench.source), *EVALUATION]
    environment = {name: value for name, value in (os.environ | variables).items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-m", "outlierq", *words], env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=LONGEST_SECONDS,
    )  # fmt: skip
    if done.returncode or "Traceback" in done.stderr:
        raise WrongEndError(f"{way}: exit code {done.returncode}, it said:\n{done.stderr}")
    printed = json.loads(done.stdout)
    recorded = json.loads((root / "out" / "outlierq.json").read_text())["evaluation"]
    if recorded["divergence"] != printed["divergence"]:
        raise WrongEndError(f"{way}: it printed {printed['divergence']} and recorded {recorded['divergence']}")
    if not is_pristine(bench):
        raise WrongEndError("the source was changed")
    return {name: value for name, value in printed["divergence"].items() if "seconds" not in name}


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


AROUND: dict[str, Callable[[Bench, Path, Random], str]] = {
    "foreign files": foreign_files,
    "exchanged source": exchanged_source,
    "failing streams": failing_streams,
    "unwritable caches": unwritable_caches,
}
