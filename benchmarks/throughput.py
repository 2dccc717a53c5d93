"""Compare our data-free recipe with `cp`: bytes per second on the same disk, for a bf16 Llama folder of 2 GB or more.

Both read the source from the disk (its pages are dropped from the cache first) and are timed until their output is on
the disk (fsync of every file). Bytes moved are the bytes read plus the bytes written; we write about half with rtn-w8,
a quarter with rtn-w4. CPU seconds (user and system) are kept beside the rates: they tell a busy machine from slow code.
A run of ours begins with seconds of imports, whatever the model's size; they are measured on one block and kept apart,
so that the rate of the rest, and with it the size from which the bound is met, can be told.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from random_llama import write_random_llama
from record import write_results

LIMIT = 0.7
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def files_of(folder: Path) -> list[Path]:
    """All files in a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in files_of(folder))


def with_descriptors(folder: Path, action) -> None:
    """Call `action` with an open descriptor of every file in a folder."""
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            action(descriptor)
        finally:
            os.close(descriptor)


def drop_cache(descriptor: int) -> None:
    """Forget the cached pages of a file, once they are on the disk."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def cpu_seconds() -> float:
    """User and system seconds of all commands that were run so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Run:
    """One command. nbytes: read and written. seconds: until fsync."""

    nbytes: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds


def measured(command: list[str], source: Path, out: Path) -> Run:
    """Run `command`, which makes `out` from `source`."""
    shutil.rmtree(out, ignore_errors=True)
    with_descriptors(source, drop_cache)
    before, start = cpu_seconds(), time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with_descriptors(out, os.fsync)
    seconds = time.monotonic() - start
    return Run(size_of(source) + size_of(out), seconds, cpu_seconds() - before)


def main() -> None:
    """Write the folder, time both by turns, compare the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--disk", type=Path, required=True, help="folder on the disk to measure; three times the source is used"
    )
    parser.add_argument("--outlierq", default=str(Path(sys.executable).with_name("outlierq")), help="our command")
    parser.add_argument("--recipe", default="rtn-w4", help="a data-free recipe (default: rtn-w4)")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="blocks (default: 22, 2.2 GB)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.disk) as folder:
        source, small, copy, packed = (Path(folder, name) for name in ("source", "small", "copy", "packed"))
        write_random_llama(source, CONFIG | {"num_hidden_layers": arguments.layers})
        write_random_llama(small, CONFIG | {"num_hidden_layers": 1, "vocab_size": 256})
        ours = [arguments.outlierq, "quantize", "--recipe", arguments.recipe, "-o", str(packed), "-q"]
        commands = {
            "cp": (["cp", "-r", "--reflink=never", str(source), str(copy)], source, copy),
            "outlierq": ([*ours, str(source)], source, packed),
            "start": ([*ours, str(small)], small, packed),
        }
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(arguments.repeats):
            for name, (command, read, out) in commands.items():
                runs[name].append(measured(command, read, out))
        source_bytes = size_of(source)
    medians = {name: statistics.median(run.rate for run in found) for name, found in runs.items()}
    ratio = medians["outlierq"] / medians["cp"]
    start = statistics.median(run.seconds for run in runs["start"])
    rest = statistics.median(run.nbytes / (run.seconds - start) for run in runs["outlierq"])
    sections = {
        "recipe": arguments.recipe,
        "source_bytes": source_bytes,
        "bytes_per_second": {name: [run.rate for run in found] for name, found in runs.items()},
        "cpu_seconds": {name: [run.cpu_seconds for run in found] for name, found in runs.items()},
        "start_seconds": start,
        "ratio_after_start": rest / medians["cp"],
        "load": os.getloadavg()[0],
        "bound": {"ratio": ratio, "limit": LIMIT, "met": ratio >= LIMIT},
    }
    write_results(arguments.output, sections)


if __name__ == "__main__":
    main()
