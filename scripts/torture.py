"""Kill runs and break their disks, hundreds of times: each must end as the same bytes as a run that nobody disturbed.

`python scripts/torture.py --kills 200 --faults 100 --around 100 --seed 0` (`make torture`) works on a tiny random
model, with the command line in forked processes. Kills: SIGKILL at a random moment or at a random operation on the
disk, and power cuts (scripts/power_cut.py). Faults: a disk that is full, read-only or faulty, a source that vanishes,
changes or cannot be read, too little memory, a Hub that answers with errors, SIGTERM and SIGINT. Around: foreign files,
sources that are repaired or exchanged during a stop, streams and caches that fail (scripts/torture_around.py).
Everything is drawn from the seed; moments in time are not the same in two runs, of course. Exit code 1 when anything
was not as it should be.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from power_cut import CUT, Disk, cut_power, failing, kill
from torture_around import AROUND, trial_around
from torture_bench import (
    JOBS,
    QUANTIZE,
    STOPPED,
    Bench,
    CountedReads,
    WrongEndError,
    bench,
    check_nothing_half_done,
    compare,
    finished,
    fresh_disk,
    is_pristine,
    mount,
    repair,
    run,
    unmount,
)

RESULT = Path("benchmarks/results/torture.json")


# --- kills ------------------------------------------------------------------------------------------------------------


def killed_and_continued(bench: Bench, job: str, kills: int, draw: Random) -> Counter[str]:
    """A job that is killed several times, then left to finish; how it was killed. WrongEndError when it went wrong."""
    root, ways, done, spent = fresh_disk(bench), Counter(), 0, 0.0
    for _ in range(kills):
        if bench.result(job, root) == bench.expected[job]:  # killed when it had only to say so
            root, done, spent = fresh_disk(bench), 0, 0.0
        way = _kill(bench, job, root, draw)
        while way == "not reached":  # it was done before; once more from the start
            root, done, spent = fresh_disk(bench), 0, 0.0
            way = _kill(bench, job, root, draw, first_half=True)
        ways[way] += 1
        check_nothing_half_done(bench, job, root)
        if job in QUANTIZE and not (root / "out").exists():
            now_done, spent = _progress(root)
            done = max(done, int((bench.work / "units").read_text().split()[-1]))
            if now_done < done and not ("restart" in way or (now_done == 0 and _is_finishing(root))):
                raise WrongEndError(f"{now_done} units are done after a kill, {done} were before")
            done = now_done
    if bench.result(job, root) != bench.expected[job]:
        more = ("--restart",) if job in QUANTIZE and not (root / "out").exists() and draw.random() < 0.1 else ()
        finished(bench, job, root, more)
        if job in QUANTIZE and not more and seconds_in_report(root) < spent:
            raise WrongEndError(f"the report says {seconds_in_report(root):.2f} s, of {spent:.2f} s before the kill")
    if job in QUANTIZE and [path.name for path in root.iterdir()] != ["out"]:
        raise WrongEndError(f"left behind: {sorted(path.name for path in root.iterdir())}")
    compare(bench, job, root)
    return ways


def seconds_in_report(root: Path) -> float:
    """Of all stages."""
    return sum(json.loads((root / "out" / "outlierq.json").read_text())["seconds"].values())


def _kill(bench: Bench, job: str, root: Path, draw: Random, first_half: bool = False) -> str:
    """Start the job and kill it; the way it was done, or "not reached" when it ended before."""
    share = draw.random() / (2 if first_half else 1)
    way = draw.choice(("time", "operation", "power cut", "power cut"))
    more = ("--restart",) if job in QUANTIZE and not (root / "out").exists() and draw.random() < 0.1 else ()
    if way == "time" or job == "publish":
        way = "time"
        ended = run(bench, job, root, after=(share * bench.seconds[job], signal.SIGKILL), more=more)
    else:
        at = 1 + int(share * bench.operations[job])
        act = kill if way == "operation" else cut_power
        ended = run(bench, job, root, disk=Disk(root, at, act, draw.randrange(1 << 30)), more=more)
    if ended.code == 0:
        return "not reached"
    if ended.code not in (-signal.SIGKILL, CUT):
        raise WrongEndError(f"it ended by itself: exit code {ended.code}\n{ended.said}")
    if ended.code == CUT:
        shutil.rmtree(root)
        root.with_name(root.name + ".cut").rename(root)
    return f"{way} of a restart" if more else way


def _is_finishing(root: Path) -> bool:
    """Whether the result was whole and only had to get its name: then the journal is gone already."""
    return (root / "out.partial" / "outlierq.json").is_file()


def _progress(root: Path) -> tuple[int, float]:
    """Units done and seconds spent, as `outlierq inspect` says; it must understand what is there."""
    from outlierq.pipeline.inspect import describe_unfinished
    from outlierq.pipeline.ledger.folder import JOURNAL

    work = root / "out.partial"
    if not (work / JOURNAL).is_file():
        return 0, 0.0
    found = describe_unfinished(work)
    return len(found["units_done"]), found["seconds"]


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """A disturbance of one run. Either the run is told nothing of it (`prepare` and `disk` act in the child), or
    `around` holds in the parent while it runs. may_pass: whether a run that ends well is no surprise.
    """

    name: str
    prepare: Callable[[], object] = lambda: None
    disk: Disk | None = None
    after: tuple[float, int] | None = None
    codes: tuple[int, ...] = (1,)
    may_pass: bool = False


def ends_cleanly(bench: Bench, job: str, fault: str, draw: Random) -> bool:
    """One run with a fault and one without; False when the fault was not met. WrongEndError when it ended badly."""
    root = fresh_disk(bench)
    with FAULTS[fault](bench, job, root, draw) as made:
        ended = run(bench, job, root, made.prepare, disk=made.disk, after=made.after)
        if ended.code == 0 and not made.may_pass:
            raise WrongEndError(f"it went on as if nothing had happened\n{ended.said}")
        if ended.code and (ended.code not in made.codes or "Traceback" in ended.said):
            raise WrongEndError(f"exit code {ended.code}, it said:\n{ended.said}")
        if ended.code and "error: " not in ended.said and "run the same command again" not in ended.said:
            raise WrongEndError(f"exit code {ended.code} without an explanation:\n{ended.said}")
        if ended.code:
            check_nothing_half_done(bench, job, root)
    if not fault.startswith("source"):
        if not is_pristine(bench):
            raise WrongEndError("the source was changed")
    else:
        shutil.rmtree(bench.source)
        shutil.copytree(bench.work / "pristine", bench.source)
    if bench.result(job, root) != bench.expected[job]:
        again = run(bench, job, root)
        if again.code:
            raise WrongEndError(f"it did not continue: exit code {again.code}\n{again.said}\nbefore:\n{ended.said}")
    compare(bench, job, root)
    return ended.code != 0


def _errors(number: int, *, lasting: bool, names: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Operations on the disk fail from the n-th on, or once."""

    @contextmanager
    def fault(bench: Bench, job: str, root: Path, draw: Random) -> Iterator[Fault]:
        at = draw.randrange(1, bench.operations[job] + 1)
        # An operation that is only tidying up may fail, and once all is in place nothing is wrong any more.
        act = failing(number, names=names, lasting=lasting)
        yield Fault(os.strerror(number), disk=Disk(root, at, act), may_pass=True)

    return fault


@contextmanager
def _small_disk(bench: Bench, job: str, root: Path, draw: Random) -> Iterator[Fault]:
    """A disk in memory that is too small by some share; larger in the end. Without the right to mount: errors."""
    needed = sum(2048 + 4096 * (-(-size // 4096)) for size in _sizes(bench, job))
    if not mount(root, f"size={int(needed * draw.uniform(0.05, 0.9)) // 4096 * 4096 + 4096}"):
        with _errors(errno.ENOSPC, lasting=True, names=WRITES)(bench, job, root, draw) as fault:
            yield fault
        return
    try:
        yield Fault("full disk", may_pass=True)
        subprocess.run(["mount", "-o", "remount,size=64m", root], check=True)
        _onto_the_disk_below(root)
    finally:
        unmount(root)


@contextmanager
def _read_only_disk(bench: Bench, job: str, root: Path, draw: Random) -> Iterator[Fault]:
    """A disk that was mounted read-only."""
    if not mount(root, "size=64m,ro"):
        with _errors(errno.EROFS, lasting=True)(bench, job, root, draw) as fault:
            yield fault
        return
    try:
        yield Fault("read-only disk")
    finally:
        unmount(root)


WRITES = ("pwrite", "posix_fallocate", "open", "mkdir", "fsync", "fdatasync")


def _sizes(bench: Bench, job: str) -> list[int]:
    """Sizes of the files of a job's result; those of the run beside them are small."""
    folder = {"calibrate": "statistics"}.get(job, "checkpoint")
    return [path.stat().st_size for path in (bench.work / folder).iterdir()]


def _onto_the_disk_below(root: Path) -> None:
    """Bring what is on a mounted disk to the folder that it hides."""
    kept = root.with_name("kept")
    shutil.copytree(root, kept)
    unmount(root)
    root.rmdir()
    kept.rename(root)


def _source(action: Callable[[Path, Random], None], *, lasting: bool = False) -> Callable[..., Any]:
    """Something happens to the weights at the n-th read of the source: no matter when all has been read."""

    @contextmanager
    def fault(bench: Bench, job: str, root: Path, draw: Random) -> Iterator[Fault]:
        at = draw.randrange(1, bench.reads[job] + 1)
        weights = bench.source / "model.safetensors"
        reads = CountedReads(bench.source, at, lambda: action(weights, draw), lasting)
        yield Fault("source", prepare=reads.install, may_pass=True)

    return fault


def _cannot_be_read(_path: Path, _draw: Random) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _vanishes(path: Path, _draw: Random) -> None:
    path.rename(path.with_name(".gone"))


def _changes(path: Path, draw: Random) -> None:
    """Other weights of the same size in place, as if another program saved its model there."""
    time.sleep(0.01)  # the clock of a file system ticks every few milliseconds
    raw = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(200):
        raw[draw.randrange(begin, len(raw))] ^= 1
    path.write_bytes(raw)


def _is_cut_short(path: Path, draw: Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


@contextmanager
def _little_memory(bench: Bench, job: str, root: Path, draw: Random) -> Iterator[Fault]:
    """The address space may not grow by more than a little; what the parent had freed is not there to be used."""
    room = int(draw.uniform(0, 1) * 1024 * 1024)

    def limit() -> None:
        CDLL(None).malloc_trim(0)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + room, resource.RLIM_INFINITY))

    yield Fault("little memory", prepare=limit, may_pass=True)


def _signal(number: int) -> Callable[..., Any]:
    """A polite request to stop, at a random moment."""

    @contextmanager
    def fault(bench: Bench, job: str, root: Path, draw: Random) -> Iterator[Fault]:
        at = draw.random() * bench.seconds[job]
        yield Fault("signal", after=(at, number), codes=(STOPPED[number],), may_pass=True)

    return fault


@contextmanager
def _hub_breaks(bench: Bench, job: str, root: Path, draw: Random) -> Iterator[Fault]:
    """From the n-th request on the Hub answers with an error, or hangs up."""
    at, answer, seen = draw.randrange(1, 12 if job == "publish" else 60), draw.choice((0, 401, 403, 429, 500, 503)), [0]

    def breaks(_method: str, _path: str) -> int | None:
        seen[0] += 1
        return answer if seen[0] >= at else None

    bench.hub.breaks = breaks
    yield Fault(f"hub answers {answer}", may_pass=True)
    bench.hub.breaks = None


FAULTS: dict[str, Callable[..., Any]] = {
    "disk too small": _small_disk,
    "disk read-only": _read_only_disk,
    "disk becomes full": _errors(errno.ENOSPC, lasting=True, names=WRITES),
    "disk becomes read-only": _errors(errno.EROFS, lasting=True),
    "disk reports an error once": _errors(errno.EIO, lasting=False),
    "source cannot be read": _source(_cannot_be_read, lasting=True),
    "source vanishes": _source(_vanishes),
    "source changes": _source(_changes),
    "source is cut short": _source(_is_cut_short),
    "little memory": _little_memory,
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGINT": _signal(signal.SIGINT),
    "hub breaks": _hub_breaks,
}
# By the first word of a fault, the jobs that can meet it; others: all that write to a disk.
JOBS_WITH = {
    "hub": ("publish", "streamed"),
    "source": tuple(job for job in JOBS if job not in ("publish", "streamed")),
    **dict.fromkeys(("little", "SIGTERM", "SIGINT"), JOBS),
}
MOST_DRAWS = 30  # of a fault that a run does not meet


# --- the whole --------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, flush=True)


def torture(
    kills: int,
    faults: int,
    around: int,
    seed: int,
    work: Path,
    say: Callable[[str], object] = _say,
    jobs: Sequence[str] = JOBS,
) -> dict[str, Any]:
    """All trials; counts, and every one that went wrong. jobs: those that are killed."""
    started, wrong = time.perf_counter(), []
    killed: Counter[str] = Counter()
    ways: Counter[str] = Counter()
    met: Counter[str] = Counter()
    kinds = Random(f"{seed} kinds").sample(list(FAULTS), len(FAULTS))
    with bench(work) as made:
        say(f"undisturbed: {', '.join(f'{job} {seconds:.1f} s' for job, seconds in made.seconds.items())}")
        trial = 0
        while sum(killed.values()) < kills:
            draw, job = Random(f"{seed} kill {trial}"), jobs[trial % len(jobs)]
            count = min(draw.choice((1, 1, 2, 3)), kills - sum(killed.values()))
            try:
                ways += killed_and_continued(made, job, count, draw)
            except WrongEndError as error:
                wrong.append({"trial": f"kill {trial}", "job": job, "what": str(error)})
                say(f"WRONG: {wrong[-1]}")
            killed[job] += count
            trial += 1
            if trial % 20 == 0:
                say(f"{sum(killed.values())} kills, {len(wrong)} wrong, {time.perf_counter() - started:.0f} s")
        say(f"{sum(killed.values())} kills: {dict(ways)}")
        for trial in range(faults):
            fault = kinds[trial % len(kinds)]
            for attempt in range(MOST_DRAWS):
                draw = Random(f"{seed} fault {trial} {attempt}")
                job = draw.choice(JOBS_WITH.get(fault.split()[0], JOBS[:-1]))
                try:
                    if ends_cleanly(made, job, fault, draw):
                        met[fault] += 1
                        break
                except WrongEndError as error:
                    wrong.append({"trial": f"fault {trial} {attempt}", "job": job, "fault": fault, "what": str(error)})
                    say(f"WRONG: {wrong[-1]}")
                    repair(made)
                    break
            else:
                wrong.append({"trial": f"fault {trial}", "fault": fault, "what": f"not met in {MOST_DRAWS} draws"})
                say(f"WRONG: {wrong[-1]}")
            if trial % 20 == 19:
                say(f"{trial + 1} faults, {len(wrong)} wrong, {time.perf_counter() - started:.0f} s")
        say(f"{sum(met.values())} clean endings of {faults}: {dict(met)}")
        ends = _around(made, around, seed, wrong, say)
    return {
        "seed": seed,
        "kills": sum(killed.values()),
        "kills_by_job": dict(killed),
        "kills_by_way": dict(ways),
        "faults": faults,
        "clean_endings": sum(met.values()),
        "faults_by_kind": dict(met),
        "around": around,
        "ends_by_kind": {kind: dict(counted) for kind, counted in ends.items()},
        "wrong": wrong,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": {"system": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
    }


def _around(
    bench: Bench, count: int, seed: int, wrong: list[dict[str, Any]], say: Callable[[str], object]
) -> dict[str, Counter[str]]:
    """Each kind in turn; how the trials ended, by kind. wrong: gets those that went wrong."""
    ends: dict[str, Counter[str]] = {kind: Counter() for kind in AROUND}
    for trial in range(count):
        kind = list(AROUND)[trial % len(AROUND)]
        try:
            ends[kind][trial_around(bench, kind, Random(f"{seed} around {trial}"))] += 1
        except WrongEndError as error:
            wrong.append({"trial": f"around {trial}", "kind": kind, "what": str(error)})
            say(f"WRONG: {wrong[-1]}")
            repair(bench)
        if trial % 20 == 19:
            say(f"{trial + 1} around, {len(wrong)} wrong")
    say(f"{count} around: { {kind: dict(counted) for kind, counted in ends.items()} }")
    return ends


def main() -> int:
    """0 when everything ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--around", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="those that are killed (default: all)")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="outlierq-torture-") as work:
        counts = (options.kills, options.faults, options.around, options.seed)
        done = torture(*counts, Path(work).resolve(), jobs=options.jobs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(done, indent=1) + "\n")
    print(f"{len(done['wrong'])} went wrong; {done['seconds']:.0f} s; {options.out}")
    return 1 if done["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
