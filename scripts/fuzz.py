"""Fuzz the readers of files that nobody vouches for: `python scripts/fuzz.py --reader safetensors --count 100000`.

Inputs are valid files with some parts replaced (`fuzz_mutate.py`); what is read and how is in `fuzz_readers.py`. The
same seed gives the same inputs. A finding is anything but an answer or an `OutlierqError`: another exception, more
than 5 s of processor time, memory above twice the input plus 256 MiB, a process started, a connection, an unpickled
class, or a file written outside of the reader's folder. Findings are kept in tests/corpus/READER, where the tests read
them again. The result is entered in benchmarks/results/fuzz.json.

`--engine coverage` lets atheris (libFuzzer) choose which inputs to change further, by the code that they reach.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_readers import READERS, SLOW

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "corpus"
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"

SECONDS = 5
MEMORY = 256 << 20
ADDRESS_SPACE = 8 << 30  # a larger allocation fails at once, and that is a finding
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
             "socket.connect", "socket.getaddrinfo")  # fmt: skip
RELATIVE = ("os.remove", "os.rmdir", "shutil.rmtree")  # their second argument may be a folder to start from
DELETING = ("os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree")


class Hang(BaseException):
    """The processor time of one input is used up. Not an Exception, so that no reader can swallow it."""


class Watch:
    """Sees what is done while an input is read: processes, connections, unpickling, and files written elsewhere."""

    def __init__(self, folder: Path):
        self.homes = (str(folder.resolve()), "/dev/null", tempfile.gettempdir() + "/tmp")
        self.on, self.seen = False, []
        self._thread = threading.get_ident()
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(args)[:80]}")
        elif event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not self._home(path):
                self.seen.append(f"{path} opened for writing")
        elif event in DELETING and not self._home(args[0], args[1] if event in RELATIVE else -1):
            self.seen.append(f"{event} {args[0]}")

    def _home(self, path: Any, folder: Any = -1) -> bool:
        """Whether something may be written here. A number is a descriptor that was opened before.

        folder: descriptor of the folder that the path starts from, if it is not the current one.
        """
        if isinstance(path, int):
            return True
        name = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        return "__pycache__" in name or os.path.realpath(name).startswith(self.homes)

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """What is seen meanwhile."""
        self.seen, self.on = [], True
        try:
            yield self.seen
        finally:
            self.on = False


class Target:
    """One reader in a folder of its own; reads inputs and says what was wrong with them."""

    def __init__(self, name: str, folder: Path, watch: Watch):
        from outlierq.core.errors import OutlierqError

        self.name, self.reader, self.folder, self.watch = name, (READERS | SLOW)[name], folder, watch
        self.refusal: type[Exception] = OutlierqError
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0
        folder.mkdir()
        self.reader.prepare(folder)
        self.peak = peak_bytes()

    def warm_up(self) -> None:
        """Read the seeds, so that imports are done. A seed must be read without a complaint of any kind."""
        for seed in self.seeds:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.reader.put(self.folder, seed)
                try:
                    self.reader.read(self.folder)
                except self.refusal as refused:
                    if self.name not in REFUSED_SEEDS:
                        raise SystemExit(f"{self.name}: a valid seed was refused: {refused}") from refused
        self.peak = peak_bytes()

    @property
    def seeds(self) -> list[bytes]:
        """Valid files; for gguf, as the writer makes them."""
        from fuzz_mutate import gguf_file

        made = self.reader.seeds()
        return [gguf_file(json.loads(seed)) for seed in made] if self.name.startswith("gguf") else made

    def input(self, seeds: list[bytes], rng: Random) -> bytes:
        """The next input."""
        return self.reader.change(rng.choice(seeds), rng)

    def read(self, case: bytes) -> str | None:
        """Read one input; what was wrong, or None."""
        self.reader.put(self.folder, case)
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        fault = None
        with self.watch.watching() as seen:
            try:
                self.reader.read(self.folder)
                self.counts["accepted"] += 1
            except self.refusal as refused:
                self.counts["refused"] += 1
                str(refused).encode("utf-8", "backslashreplace")
            except Hang:
                fault = f"more than {SECONDS} s"
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                at = traceback.extract_tb(error.__traceback__)
                ours = [f for f in at if "/outlierq/" in f.filename and "site-packages" not in f.filename] or at
                place = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
                fault = f"{type(error).__name__} from {place}: {str(error)[:120]}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest = max(self.slowest, time.process_time() - began)
        return fault or (f"did: {seen[0]}" if seen else None) or self._grown(len(case))

    def _grown(self, size: int) -> str | None:
        """The high-water mark of memory is looked at after every input."""
        peak, before = peak_bytes(), self.peak
        self.peak = max(peak, before)
        return f"{(peak - before) >> 20} MiB for {size} bytes" if peak - before > 2 * size + MEMORY else None


# What a seed asks for that is refused on purpose (a config that brings code), needs an option that tests lack, or is
# true in one folder only (the note of a check).
REFUSED_SEEDS = ("config", "skeleton", "text", "index", "setting", "gguf", "checked-note")


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stop(*_: Any) -> None:
    """The processor time of an input is used up."""
    raise Hang


def fuzz(name: str, count: int, seed: int, folder: Path, watch: Watch, *, keep: bool = True) -> dict[str, Any]:
    """Read `count` changed inputs; the entry for the results. Of equal findings the first is kept."""
    signal.signal(signal.SIGPROF, stop)
    warnings.simplefilter("ignore")
    target = Target(name, folder, watch)
    target.warm_up()
    rng, findings, began = Random(f"{name} {seed}"), {}, time.monotonic()
    seeds = target.reader.seeds()
    digest = hashlib.sha256()
    for number in range(count):
        case = target.input(seeds, rng)
        digest.update(case)
        found = target.read(case)
        if found and found.split(":")[0] not in findings:
            findings[found.split(":")[0]] = {
                "fault": found,
                "input": number,
                "kept": keep_case(name, case) if keep else "",
            }
            print(f"{name} {number}: {found}", file=sys.stderr, flush=True)
        if number % 10_000 == 9_999:
            print(f"{name} {number + 1} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return entry(target, count, seed, time.monotonic() - began, list(findings.values()), digest.hexdigest())


def entry(target: Target, count: int, seed: int, seconds: float, findings: list[Any], digest: str) -> dict[str, Any]:
    """What is recorded of a run."""
    return {
        "inputs": count,
        "seed": seed,
        **{kind: target.counts[kind] for kind in ("accepted", "refused")},
        "slowest_input_seconds": round(target.slowest, 3),
        "seconds": round(seconds, 1),
        "inputs_sha256": digest,
        "findings": findings,
    }


def keep_case(name: str, case: bytes) -> str:
    """Keep an input for the tests; its path."""
    suffix = Path((READERS | SLOW)[name].file).suffix or ".bin"
    path = CORPUS / name / f"found-{hashlib.sha256(case).hexdigest()[:8]}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case)
    return str(path.relative_to(ROOT))


def record(name: str, engine: str, result: dict[str, Any]) -> None:
    """Put the result of one reader among the others."""
    import numpy
    import torch

    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    held["what"] = "fuzz inputs per reader; see scripts/fuzz.py for what counts as a finding"
    held["limits"] = {"seconds": SECONDS, "memory": "2 x input + 256 MiB"}
    held["machine"] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    held.setdefault(engine, {})[name] = result
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
    part.replace(RESULTS)


def fuzz_by_coverage(name: str, count: int, seed: int, folder: Path, watch: Watch, write: bool) -> None:
    """The same with atheris, which never returns: the result is entered from inside, then the process ends."""
    import atheris
    from yaml import YAMLError

    with atheris.instrument_imports(include=["outlierq"], enable_loader_override=False):
        import outlierq.calibrate.stored.stats_file
        import outlierq.calibrate.text.windows
        import outlierq.core.machine.untrusted
        import outlierq.load.decode
        import outlierq.load.gguf.file
        import outlierq.load.source.folder
        import outlierq.load.source.shards
        import outlierq.pipeline.ledger.journal
        import outlierq.recipe  # noqa: F401
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, stop)
    target = Target(name, folder, watch)
    target.warm_up()
    structured = target.reader.change
    originals = target.reader.seeds()
    began, findings, done, digest = time.monotonic(), {}, 0, hashlib.sha256()

    def change(data: bytes, largest: int, number: int) -> bytes:
        rng = Random(number)
        if rng.random() < 0.3 and data:
            return atheris.Mutate(data, largest)[:largest]
        try:
            return structured(
                data if rng.random() < 0.7 and not name.startswith("gguf") else rng.choice(originals), rng
            )[:largest]
        except (ValueError, TypeError, AttributeError, RecursionError, LookupError, YAMLError):
            # no longer what the mutator takes apart
            return structured(rng.choice(originals), rng)[:largest]

    def one(case: bytes) -> None:
        nonlocal done
        found = target.read(case)
        digest.update(case)
        done += 1
        if found and found.split(":")[0] not in findings:
            findings[found.split(":")[0]] = {"fault": found, "input": done, "kept": keep_case(name, case)}
            print(f"{name} {done}: {found}", file=sys.stderr, flush=True)
        if done == count:
            result = entry(target, count, seed, time.monotonic() - began, list(findings.values()), digest.hexdigest())
            print(json.dumps(result, indent=1), flush=True)
            if write:
                record(name, "coverage", result)
            shutil.rmtree(folder.parent)
            os._exit(1 if findings else 0)

    start = folder.parent / "seeds"
    start.mkdir()
    for number, case in enumerate(target.seeds):
        (start / str(number)).write_bytes(case)
    options = [f"-seed={seed + 1}", "-max_len=65536", "-rss_limit_mb=0", "-timeout=60", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(start)], one, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the readers asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", nargs="+", default=["all"], choices=["all", *READERS, *SLOW])
    parser.add_argument("--count", type=int, default=100_000, help="inputs per reader (default: 100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["structure", "coverage"], default="structure")
    parser.add_argument("--no-record", action="store_true", help=f"do not write {RESULTS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    names = list(READERS) if arguments.reader == ["all"] else arguments.reader
    if len(names) > 1 and arguments.engine == "coverage":
        parser.error("--engine coverage takes one reader; its process ends with the last input")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    work = Path(tempfile.mkdtemp(prefix="outlierq-fuzz-", dir=memory))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    watch, found = Watch(work), 0
    try:
        for name in names:
            if arguments.engine == "coverage":
                fuzz_by_coverage(name, arguments.count, arguments.seed, work / name, watch, not arguments.no_record)
            result = fuzz(name, arguments.count, arguments.seed, work / name, watch)
            found += len(result["findings"])
            print(name, json.dumps(result, indent=1), flush=True)
            if not arguments.no_record:
                record(name, "structure", result)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
