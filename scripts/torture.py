"""Kill runs and break their disks, hundreds of times: each must end as the same bytes as a run that nobody disturbed.

`python scripts/torture.py --kills 200 --faults 100 --seed 0` (`make torture`) works on a tiny random model, with the
command line in forked processes. Kills: SIGKILL at a random moment or at a random operation on the disk, and power cuts
(scripts/power_cut.py). Faults: a disk that is full, read-only or faulty, a source that vanishes, changes or cannot be
read, too little memory, a Hub that answers with errors, SIGTERM and SIGINT. Everything is drawn from the seed; moments
in time are not the same in two runs, of course. Exit code 1 when anything was not as it should be.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import hashlib
import io
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
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from power_cut import CUT, Disk, cut_power, failing, kill

from outlierq.pipeline.ledger.journal import JOURNAL

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its tiny model, and its stand-in for the Hub

RESULT = Path("benchmarks/results/torture.json")
LONGEST_SECONDS = 120.0
REPOSITORY, STREAMED = "alice/tiny", "alice/sharded"
SMALL = ("--set", "calibration.samples=4", "--set", "calibration.sequence_length=32", "--set", "quantize.group_size=32")
QUANTIZE = {
    "data-free": ("-r", "rtn-w4", "--set", "export.max_shard_size=20KB"),
    "static": ("-r", "awq-gptq-w4", *SMALL),
    "sequential": ("-r", "awq-gptq-w4", *SMALL, "--set", "calibration.mode=sequential"),
    "from statistics": ("-r", "awq-gptq-w4", *SMALL, "--stats", "STATS"),
    "gated": ("-r", "rtn-w4", "--set", "gate.max_kl=9", "--set", "gate.windows=2", "--set", "gate.window_length=32"),
    "streamed": ("-r", "rtn-w4", "--set", "export.max_shard_size=20KB", "--stream-from-hub"),
}
JOBS = (*QUANTIZE, "calibrate", "publish")
THREADS = {"data-free": 2, "streamed": 2}
STOPPED = {signal.SIGTERM: 1, signal.SIGINT: 130}


class WrongEndError(Exception):
    """A run did not end as it should have."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, or minus the signal; what it said on stderr; operations on its disk."""

    code: int
    said: str
    operations: int


@dataclass
class Bench:
    """What all trials share: a source (restored when a fault damaged it), statistics, a checkpoint to publish, a Hub.

    expected: the undisturbed result of each job. operations, reads, seconds: of its undisturbed run.
    """

    work: Path
    hub: Any
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        return self.work / "source"

    def words(self, job: str, root: Path) -> list[str]:
        """The command of a job whose disk is `root`."""
        if job == "calibrate":
            return ["calibrate", str(self.source), "-o", str(root / "out"), *SMALL[:4], "-q"]
        if job == "publish":
            return ["publish", str(self.work / "checkpoint"), REPOSITORY, "--base-model", "maker/tiny", "-q"]
        options = [str(self.work / "statistics") if word == "STATS" else word for word in QUANTIZE[job]]
        source = STREAMED if "--stream-from-hub" in options else str(self.source)
        return ["quantize", source, "-o", str(root / "out"), *options, "-q", "--json"]

    def result(self, job: str, root: Path) -> dict[str, str] | None:
        """Hashes of what the job made, without times and places; None when nothing is under the final name."""
        if job == "publish":
            held = self.hub.repositories.get(REPOSITORY)
            files = self.hub.content(REPOSITORY) if held and len(held.commits) > 1 else None
        else:
            out = root / "out"
            is_there = (out / "stats.json").is_file() if job == "calibrate" else out.exists()
            # A run that ends between its last two steps leaves its journal, hidden, in the finished result.
            paths = [path for path in out.iterdir() if path.name != JOURNAL] if is_there else []
            files = {path.name: path.read_bytes() for path in paths} if is_there else None
        if files is None:
            return None
        if job in QUANTIZE:
            files["outlierq.json"] = _timeless(files.get("outlierq.json"))
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _timeless(report: bytes | None) -> bytes:
    """A report without its times, memory and place; of a measurement only what the gate said."""
    values = json.loads(report or b'{"rows": []}')
    values["evaluation"] = (values.get("evaluation") or {}).get("gate")
    for key in ("seconds", "peak_bytes", "out"):
        values.pop(key, None)
    for row in values["rows"]:
        row.pop("seconds")
    return json.dumps(values).encode()


@contextmanager
def bench(work: Path) -> Iterator[Bench]:
    """Everything made and every job done once without a disturbance."""
    import torch
    from conftest import write_llama
    from hub_stand_in import TOKEN, serving

    torch.set_num_threads(1)  # a forked child has no OpenMP threads
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    write_llama(work / "source", **small)
    shutil.copytree(work / "source", work / "pristine")
    write_llama(work / "sharded", shards="12KB", **small)
    _warm_up(work)
    environment = {"HF_TOKEN": TOKEN, "HF_HOME": str(work / "home"), "TMPDIR": str(work)}
    environment["OUTLIERQ_CACHE"] = str(work / "cache")
    ThreadingHTTPServer.handle_error = lambda *_: None  # clients that are killed hang up
    with serving() as hub, _environment(environment | {"HF_ENDPOINT": hub.url}):
        made = Bench(work, hub)
        for job in ("calibrate", *QUANTIZE, "publish"):
            _undisturbed(made, job)
            if job == "calibrate":
                (work / "disk" / "out").rename(work / "statistics")
            elif job == "static":
                shutil.copytree(work / "disk" / "out", work / "checkpoint")
        yield made


def _warm_up(work: Path) -> None:
    """Import whatever a command needs, so that no child has to."""
    from importlib import import_module
    from pkgutil import walk_packages

    import outlierq
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    for module in walk_packages(outlierq.__path__, "outlierq."):
        if not module.name.startswith(("outlierq.kernels", "outlierq.__main__")):
            import_module(module.name)
    settings = [setting for setting in SMALL if setting != "--set"]
    quantize(make_plan(open_checkpoint(str(work / "source")), load("awq-gptq-w4", settings)), work / "warm-up")
    shutil.rmtree(work / "warm-up")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _undisturbed(bench: Bench, job: str) -> None:
    """Do the job as it should be done."""
    root, reads = fresh_disk(bench), CountedReads(bench.source)
    started = time.perf_counter()
    ended = run(bench, job, root, reads.install, disk=Disk(root))
    if ended.code:
        raise SystemExit(f"{job} fails by itself:\n{ended.said}")
    bench.seconds[job] = time.perf_counter() - started
    bench.expected[job] = bench.result(job, root)
    bench.operations[job] = ended.operations
    bench.reads[job] = int((bench.work / "reads").read_text())


def fresh_disk(bench: Bench) -> Path:
    """An empty folder to work in, and an empty Hub."""
    for name in ("disk", "disk.cut", "cache"):
        shutil.rmtree(bench.work / name, ignore_errors=True)
    bench.hub.repositories.clear()
    bench.hub.objects.clear()
    bench.hub.breaks = None
    bench.hub.put(STREAMED, bench.work / "sharded")
    root = bench.work / "disk"
    root.mkdir()
    return root


def run(
    bench: Bench,
    job: str,
    root: Path,
    prepare: Callable[[], object] = lambda: None,
    *,
    disk: Disk | None = None,
    after: tuple[float, int] | None = None,
    more: tuple[str, ...] = (),
) -> Ended:
    """The job's command in a child. after: seconds until it gets a signal."""
    said, counted = bench.work / "said", bench.work / "operations"
    for path in (counted, bench.work / "units"):
        path.write_text("0")
    sys.stdout.flush()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_command([*bench.words(job, root), *more], prepare, said, disk, THREADS.get(job, 1), tell)
    os.close(tell)
    os.read(ready, 1)  # returns, too, when the child is gone
    os.close(ready)
    started = time.perf_counter()
    number = after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        passed = time.perf_counter() - started
        if number and passed >= number[0]:
            os.kill(child, number[1])
            number = None
        if passed > LONGEST_SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise WrongEndError(f"{job} did not end in {LONGEST_SECONDS:.0f} s")
        time.sleep(0.002)
    return Ended(os.waitstatus_to_exitcode(status), said.read_text(), int(counted.read_text()))


def _be_the_command(
    words: list[str], prepare: Callable[[], object], said: Path, disk: Disk | None, threads: int, tell: int
) -> None:
    """The child's whole life."""
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - a test replaces them
    code = 70
    try:
        import torch
        from huggingface_hub import constants
        from huggingface_hub.utils import _http

        from outlierq.cli import main
        from outlierq.pipeline.block import stats_run as calibration

        constants.HF_HUB_DISABLE_XET = True
        # These were read from the environment before there was a Hub.
        constants.HF_HUB_CACHE, constants.ENDPOINT = os.environ["HF_HOME"], os.environ["HF_ENDPOINT"]
        constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None})
        calibration.SAVE_EVERY_SECONDS = 0.0
        torch.set_num_threads(threads)
        _count_units(said.with_name("units"))
        if disk:
            disk.install()
        prepare()
        sys.argv = ["outlierq", *words]
        signal.signal(signal.SIGTERM, main._terminate)  # as `run` does first
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background
        os.write(tell, b".")
        main._run()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPED)  # it has ended, and only says so
        sys.stderr.flush()
        if disk:
            (said.with_name("operations")).write_text(str(disk.count))
        os._exit(code)


def _count_units(path: Path) -> None:
    """Keep in a file how many units the journal has taken."""
    from outlierq.pipeline.ledger.journal import Journal

    original = Journal.add

    def add(journal: Journal, unit: str, content: dict[str, Any]) -> None:
        original(journal, unit, content)
        with path.open("a") as file:
            file.write(f"\n{len(journal.entries)}")

    Journal.add = add


class CountedReads:
    """Reads from files below `folder`; `act` is called at the n-th. Only what Python opens is seen.

    lasting: at every later one, too.
    """

    def __init__(
        self, folder: Path, at: int | None = None, act: Callable[[], None] | None = None, lasting: bool = False
    ):
        self.folder, self.at, self.act, self.lasting, self.count = folder.resolve(), at, act, lasting, 0

    def install(self) -> None:
        """From now on, in this process."""
        original = builtins.open

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = original(path, mode, *args, **kwargs)
            is_mine = not isinstance(path, int) and Path(os.path.abspath(path)).is_relative_to(self.folder)
            return CountedFile(file, self) if is_mine and mode == "rb" else file

        builtins.open = io.open = opened

    def one_more(self) -> None:
        """Note a read."""
        self.count += 1
        (self.folder.parent / "reads").write_text(str(self.count))
        if self.at is not None and self.count >= self.at:
            act, self.act = self.act, self.act if self.lasting else lambda: None
            act()


class CountedFile:
    """A file whose reads are counted."""

    def __init__(self, file: Any, reads: CountedReads):
        self._file, self._reads = file, reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, *args: Any) -> bytes:
        self._reads.one_more()
        return self._file.read(*args)

    def readinto(self, target: Any) -> int:
        self._reads.one_more()
        return self._file.readinto(target)


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
        _check_nothing_half_done(bench, job, root)
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
    _compare(bench, job, root)
    return ways


def finished(bench: Bench, job: str, root: Path, more: tuple[str, ...] = ()) -> None:
    """Start the job once more, undisturbed; WrongEndError when it does not come to its end."""
    ended = run(bench, job, root, more=more)
    if ended.code:
        raise WrongEndError(f"it did not continue: exit code {ended.code}\n{ended.said}")


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


def _check_nothing_half_done(bench: Bench, job: str, root: Path) -> None:
    """What is under the final name is whole."""
    found = bench.result(job, root)
    wanted = {name: digest for name, digest in bench.expected[job].items() if (job, name) != ("gated", "outlierq.json")}
    if found is not None and not wanted.items() <= found.items():
        raise WrongEndError(f"something else is under the final name: {_difference(wanted, found)}")


def _compare(bench: Bench, job: str, root: Path) -> None:
    """Same files, same bytes; the source as it was."""
    found = bench.result(job, root) or {}
    if found != bench.expected[job]:
        raise WrongEndError(f"another result: {_difference(bench.expected[job], found)}")
    if not _is_pristine(bench):
        raise WrongEndError("the source was changed")


def _difference(expected: dict[str, str], found: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)))


def _is_pristine(bench: Bench) -> bool:
    from conftest import folder_hashes

    return folder_hashes(bench.source) == folder_hashes(bench.work / "pristine")


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
            _check_nothing_half_done(bench, job, root)
    if not fault.startswith("source"):
        if not _is_pristine(bench):
            raise WrongEndError("the source was changed")
    else:
        shutil.rmtree(bench.source)
        shutil.copytree(bench.work / "pristine", bench.source)
    if bench.result(job, root) != bench.expected[job]:
        again = run(bench, job, root)
        if again.code:
            raise WrongEndError(f"it did not continue: exit code {again.code}\n{again.said}\nbefore:\n{ended.said}")
    _compare(bench, job, root)
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
    if not _mount(root, f"size={int(needed * draw.uniform(0.05, 0.9)) // 4096 * 4096 + 4096}"):
        with _errors(errno.ENOSPC, lasting=True, names=WRITES)(bench, job, root, draw) as fault:
            yield fault
        return
    try:
        yield Fault("full disk", may_pass=True)
        subprocess.run(["mount", "-o", "remount,size=64m", root], check=True)
        _onto_the_disk_below(root)
    finally:
        _unmount(root)


@contextmanager
def _read_only_disk(bench: Bench, job: str, root: Path, draw: Random) -> Iterator[Fault]:
    """A disk that was mounted read-only."""
    if not _mount(root, "size=64m,ro"):
        with _errors(errno.EROFS, lasting=True)(bench, job, root, draw) as fault:
            yield fault
        return
    try:
        yield Fault("read-only disk")
    finally:
        _unmount(root)


WRITES = ("pwrite", "posix_fallocate", "open", "mkdir", "fsync", "fdatasync")


def _sizes(bench: Bench, job: str) -> list[int]:
    """Sizes of the files of a job's result; those of the run beside them are small."""
    folder = {"calibrate": "statistics"}.get(job, "checkpoint")
    return [path.stat().st_size for path in (bench.work / folder).iterdir()]


def _mount(root: Path, options: str) -> bool:
    """Whether a disk in memory could be mounted there."""
    if not shutil.which("mount"):
        return False
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "outlierq-torture", root], capture_output=True)
    return done.returncode == 0


def _onto_the_disk_below(root: Path) -> None:
    """Bring what is on a mounted disk to the folder that it hides."""
    kept = root.with_name("kept")
    shutil.copytree(root, kept)
    _unmount(root)
    root.rmdir()
    kept.rename(root)


def _unmount(root: Path) -> None:
    if os.path.ismount(root):
        subprocess.run(["umount", root], check=True)


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


def torture(kills: int, faults: int, seed: int, work: Path, say: Callable[[str], object] = _say) -> dict[str, Any]:
    """All trials; counts, and every one that went wrong."""
    started, wrong = time.perf_counter(), []
    killed: Counter[str] = Counter()
    ways: Counter[str] = Counter()
    met: Counter[str] = Counter()
    kinds = Random(f"{seed} kinds").sample(list(FAULTS), len(FAULTS))
    with bench(work) as made:
        say(f"undisturbed: {', '.join(f'{job} {seconds:.1f} s' for job, seconds in made.seconds.items())}")
        trial = 0
        while sum(killed.values()) < kills:
            draw, job = Random(f"{seed} kill {trial}"), JOBS[trial % len(JOBS)]
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
                    _repair(made)
                    break
            else:
                wrong.append({"trial": f"fault {trial}", "fault": fault, "what": f"not met in {MOST_DRAWS} draws"})
                say(f"WRONG: {wrong[-1]}")
            if trial % 20 == 19:
                say(f"{trial + 1} faults, {len(wrong)} wrong, {time.perf_counter() - started:.0f} s")
    say(f"{sum(met.values())} clean endings of {faults}: {dict(met)}")
    return {
        "seed": seed,
        "kills": sum(killed.values()),
        "kills_by_job": dict(killed),
        "kills_by_way": dict(ways),
        "faults": faults,
        "clean_endings": sum(met.values()),
        "faults_by_kind": dict(met),
        "wrong": wrong,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": {"system": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
    }


def _repair(bench: Bench) -> None:
    """The source as it was, after a trial that did not come to this by itself."""
    _unmount(bench.work / "disk")
    shutil.rmtree(bench.source)
    shutil.copytree(bench.work / "pristine", bench.source)


def main() -> int:
    """0 when everything ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="outlierq-torture-") as work:
        done = torture(options.kills, options.faults, options.seed, Path(work).resolve())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(done, indent=1) + "\n")
    print(f"{len(done['wrong'])} went wrong; {done['seconds']:.0f} s; {options.out}")
    return 1 if done["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
