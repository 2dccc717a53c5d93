"""What all trials of scripts/torture.py share: a tiny model, a Hub, jobs and their results, commands in a child."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from power_cut import Disk

from outlierq.pipeline.ledger.journal import JOURNAL

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its tiny model, and its stand-in for the Hub

LONGEST_SECONDS = 120.0
REPOSITORY, STREAMED = "alice/tiny", "alice/sharded"
SMALL = ("--set", "calibration.samples=4", "--set", "calibration.sequence_length=32", "--set", "quantize.group_size=32")
QUANTIZE = {
    "data-free": ("-r", "rtn-w4", "--set", "export.max_shard_size=20KB"),
    "static": ("-r", "awq-gptq-w4", *SMALL),
    "sequential": ("-r", "awq-gptq-w4", *SMALL, "--set", "calibration.mode=sequential"),
    "from statistics": ("-r", "awq-gptq-w4", *SMALL, "--stats", "STATS"),
    "gated": ("-r", "rtn-w4", "--set", "gate.max_kl=9", "--set", "gate.windows=2", "--set", "gate.window_length=32"),
    "types of gguf": ("-r", "gguf-q4_k_m", *SMALL[:4]),
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
    evaluation: what `eval` measures of the checkpoint, once somebody asked.
    """

    work: Path
    hub: Any
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        return self.work / "source"

    def words(self, job: str, root: Path) -> list[str]:
        """The command of a job whose disk is `root`."""
        if job == "calibrate":
            return ["calibrate", str(self.source), "-o", str(root / "out"), *SMALL[:4], "-q"]
        if job == "publish":
            return ["publish", str(self.work / "checkpoint"), REPOSITORY, "--base-model", "maker/tiny", "-q"]
        if job == "demo":
            return ["demo", "-o", str(root / "out"), *SMALL[2:], "-q"]
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
    (values.get("record") or {}).pop("signed", None)  # of the times, too
    for row in values["rows"]:
        row.pop("seconds")
    return json.dumps(values).encode()


@contextmanager
def bench(work: Path) -> Iterator[Bench]:
    """Everything made and every job done once without a disturbance."""
    import torch
    from conftest import write_llama
    from gguf_models import VOCABULARY, write_tokenizer
    from hub_stand_in import TOKEN, serving

    torch.set_num_threads(1)  # a forked child has no OpenMP threads
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    write_llama(work / "source", vocab_size=VOCABULARY, **small)
    write_tokenizer(work / "source")  # one with merges, which GGUF files hold
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


# --- endings ----------------------------------------------------------------------------------------------------------


def finished(bench: Bench, job: str, root: Path, more: tuple[str, ...] = ()) -> None:
    """Start the job once more, undisturbed; WrongEndError when it does not come to its end."""
    ended = run(bench, job, root, more=more)
    if ended.code:
        raise WrongEndError(f"it did not continue: exit code {ended.code}\n{ended.said}")


def check_nothing_half_done(bench: Bench, job: str, root: Path) -> None:
    """What is under the final name is whole."""
    found = bench.result(job, root)
    wanted = {name: digest for name, digest in bench.expected[job].items() if (job, name) != ("gated", "outlierq.json")}
    if found is not None and not wanted.items() <= found.items():
        raise WrongEndError(f"something else is under the final name: {difference(wanted, found)}")


def compare(bench: Bench, job: str, root: Path) -> None:
    """Same files, same bytes; the source as it was."""
    found = bench.result(job, root) or {}
    if found != bench.expected[job]:
        raise WrongEndError(f"another result: {difference(bench.expected[job], found)}")
    if not is_pristine(bench):
        raise WrongEndError("the source was changed")


def difference(expected: dict[str, str], found: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)))


def is_pristine(bench: Bench) -> bool:
    from conftest import folder_hashes

    return folder_hashes(bench.source) == folder_hashes(bench.work / "pristine")


def repair(bench: Bench) -> None:
    """The source as it was, after a trial that did not come to this by itself."""
    unmount(bench.work / "disk")
    shutil.rmtree(bench.source)
    shutil.copytree(bench.work / "pristine", bench.source)


def unmount(root: Path) -> None:
    if os.path.ismount(root):
        subprocess.run(["umount", root], check=True)


def mount(root: Path, options: str) -> bool:
    """Whether a disk in memory could be mounted there."""
    if not shutil.which("mount"):
        return False
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "outlierq-torture", root], capture_output=True)
    return done.returncode == 0
