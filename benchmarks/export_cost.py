"""What a format costs: seconds from quantized values in memory to its files on the disk, against writing bytes alone.

Both sides write the same sizes in the same order to files that are allocated first, from memory, and are timed until
everything, small files too, is forced onto the disk; they take turns. Bytes alone are written in one go and forced out
at the end. Exporting does as a run without calibration does: two threads, each on a block of its own, and whenever one
is done all that is written is forced out, while the next ones are packed. Reading back and decoding, which every run of
outlierq adds, is timed apart. Peak memory is what exporting needs beside the values themselves, as a share of one
shard. Each format runs in a process of its own. CPU seconds are kept beside wall seconds: on a fast disk they are what
is left of the difference. The model is a random Llama with hardly any embedding, so that nearly all bytes are packed
weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from random_llama import write_random_llama
from record import write_results
from throughput import CONFIG

from outlierq.core.model import LinearSite
from outlierq.quantize.stage import rows_of_a_piece

if TYPE_CHECKING:
    from outlierq.export.writer import ShardWriter

RATIO_LIMIT = 1.5
BLOCKS, SHARD, WORKERS = 6, "200MB", 2
G32, ASYMMETRIC = "quantize.group_size=32", "quantize.symmetric=false"
# Format and scheme -> recipe and settings.
CASES = {
    "compressed-tensors int4 g128": ("rtn-w4", []),
    "compressed-tensors int4 g128, zero points": ("rtn-w4", [ASYMMETRIC]),
    "compressed-tensors int3 g128": ("rtn-w4", ["quantize.bits=3"]),
    "compressed-tensors int8": ("rtn-w8", []),
    "compressed-tensors int8, int8 inputs": ("w8a8-dynamic", []),
    "compressed-tensors fp8": ("fp8-dynamic", []),
    "compressed-tensors nvfp4": ("nvfp4", []),
    "compressed-tensors mxfp4": ("mxfp4", []),
    "awq g128, zero points": ("rtn-w4", ["export.format=awq", ASYMMETRIC]),
    "gptq g128": ("rtn-w4", ["export.format=gptq"]),
    "gptq-v2 g128, zero points": ("rtn-w4", ["export.format=gptq-v2", ASYMMETRIC]),
    "bitsandbytes int8": ("llm-int8", []),
    "gguf Q4_0": ("rtn-w4", ["export.format=gguf", G32]),
    "gguf Q4_1": ("rtn-w4", ["export.format=gguf", G32, ASYMMETRIC]),
    "gguf Q4_K": ("rtn-w4", ["export.format=gguf", G32, ASYMMETRIC, "quantize.scales=two-level"]),
    "gguf Q8_0": ("rtn-w8", ["export.format=gguf", G32]),
    "gguf MXFP4": ("mxfp4", ["export.format=gguf"]),
    "dense": ("rtn-w4", ["export.format=dense"]),
}


class Case:
    """One format: its plan, the quantized values of every linear, and all other tensors, in memory."""

    def __init__(self, name: str, source: Path):
        from outlierq.load import open_checkpoint
        from outlierq.pipeline.planning.decide import make_plan
        from outlierq.recipe import load

        recipe, settings = CASES[name]
        self.plan = make_plan(open_checkpoint(str(source)), load(recipe, [*settings, f"export.max_shard_size={SHARD}"]))
        self.format = self.plan.format
        self.values = quantized_values(self.plan.schemes)
        packed = {site.weight for site in self.values}
        self.pieces = {site: list(self.pieces_of(site)) for site in self.values}  # a run gets them from its quantizer
        self.others = {n: self.plan.checkpoint.read(n) for n in self.plan.checkpoint.tensors if n not in packed}

    def export(self, folder: Path) -> None:
        """Everything that the folder of this format holds, on the disk."""
        from outlierq.export.writer import ShardWriter, write_small

        folder.mkdir()
        writer = ShardWriter(folder, self.plan.layout)
        for name, tensor in self.others.items():
            writer.write(*self.format.plain(name, tensor))

        def one(block: list[LinearSite]) -> None:
            for site in block:
                self.export_linear(site, writer)

        with ThreadPoolExecutor(WORKERS) as pool:
            for _ in pool.map(one, self.blocks):
                writer.sync()
        write_small(folder, self.plan.small_files)
        writer.close()

    @property
    def blocks(self) -> list[list[LinearSite]]:
        """Linears by block: the units of a run."""
        return [list(sites) for _, sites in groupby(self.values, key=lambda site: site.block)]

    def export_linear(self, site: LinearSite, writer: ShardWriter) -> None:
        """Its pieces, packed and written."""
        next_row: Counter[str] = Counter()
        for value in self.pieces[site]:
            for name, tensor in self.format.encode(site, value).items():
                whole = tuple(tensor.shape) == self.plan.layout.places[name].tensor.shape
                if not whole or name not in next_row:
                    writer.write(name, tensor, None if whole else next_row[name])
                next_row[name] += len(tensor) if tensor.ndim else 0

    def pieces_of(self, site: LinearSite) -> Iterator[object]:
        """The parts in which a run writes a linear: small ones where the format allows it."""
        value, step = self.values[site], site.out_features
        if self.format.by_rows(site, value.scheme):
            step = rows_of_a_piece(site.in_features, value.scheme)
        for row in range(0, site.out_features, step):
            yield value.rows(row, min(row + step, site.out_features))

    def verify(self, folder: Path) -> None:
        """Read back every tensor's bytes, decode every linear, and compare both with what was meant."""
        from outlierq.core.model import as_matrix
        from outlierq.export.writer import ShardWriter, compare
        from outlierq.load import decode_rows

        writer = ShardWriter(folder, self.plan.layout)
        for name, tensor in self.others.items():
            writer.confirm(*self.format.plain(name, tensor))
        for site, value in self.values.items():
            parts = self.format.encode(site, value)
            for name, tensor in parts.items():
                writer.confirm(name, tensor)
            stored = {name.rpartition(".")[2]: tensor for name, tensor in parts.items()}
            if "weight" in stored:
                stored["weight"] = as_matrix(site, stored["weight"])
            stored |= self.format.row_order(site)
            shape = (site.out_features, site.in_features)
            step = 256
            for start in range(0, site.out_features, step):
                stop = min(start + step, site.out_features)
                found = decode_rows(self.format.name, stored, value.scheme, shape, start, stop)
                compare(site.module, found, value.rows(start, stop))
        writer.close()

    def write_plainly(self, folder: Path) -> None:
        """The same sizes in the same order, of bytes that are there already."""
        from outlierq.export.writer import write_small

        folder.mkdir()
        layout = self.plan.layout
        largest = max(place.tensor.nbytes for place in layout.places.values())
        buffer = memoryview(self._filling(largest))
        files = {}
        for name, size in layout.sizes.items():
            files[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT)
            os.posix_fallocate(files[name], 0, size)
        for place in layout.places.values():
            left, offset = place.tensor.nbytes, place.offset
            while left:
                count = os.pwrite(files[place.shard], buffer[: min(left, 1 << 30)], offset)
                left, offset = left - count, offset + count
        for descriptor in files.values():
            os.fdatasync(descriptor)
            os.close(descriptor)
        write_small(folder, self.plan.small_files)

    def _filling(self, size: int) -> bytes:
        """Random bytes, made once: it is writing that is timed."""
        if not hasattr(self, "_bytes"):
            self._bytes = os.urandom(size)
        return self._bytes


def quantized_values(schemes: dict) -> dict:
    """Random codes, scales and zero points for every linear; those of one shape and scheme share their memory."""
    import torch

    from outlierq.registry import method

    known: dict = {}
    make = torch.Generator().manual_seed(0)
    found = {}
    for site, scheme in schemes.items():
        key = (site.out_features, site.in_features, scheme)
        if key not in known:
            weight = torch.randn(site.out_features, site.in_features, generator=make) * 0.02
            known[key] = method("quantize", "rtn").function(weight, None, scheme)
        found[site] = known[key]
    return found


def timed(action: Callable[[], None]) -> dict[str, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measured(name: str, source: Path, disk: Path, repeats: int, threads: int) -> dict:
    """One format in this process."""
    import torch

    from outlierq.core.machine.heap import keep_freed_memory

    torch.set_num_threads(threads)
    case = Case(name, source)
    keep_freed_memory()  # as a run without calibration does once it is planned
    ways = {"export": case.export, "plain": case.write_plainly}
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with TemporaryDirectory(dir=disk) as work:
        case.write_plainly(Path(work, "warm"))
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        case.export(Path(work, "first"))
        peak = resident("VmHWM") - before
        verified = timed(lambda: case.verify(Path(work, "first")))
        for turn in range(repeats):
            for way, action in ways.items():
                folder = Path(work, f"{way}-{turn}")
                os.sync()  # what the turn before has left behind
                rows[way].append(timed(lambda action=action, folder=folder: action(folder)))
                for path in folder.iterdir():
                    path.unlink()
    middle = {
        way: {key: statistics.median(row[key] for row in found) for key in ("seconds", "cpu_seconds")}
        for way, found in rows.items()
    }
    ratio = middle["export"]["seconds"] / middle["plain"]["seconds"]
    return {
        "bytes": case.plan.output_bytes,
        "weights": sum(site.out_features * site.in_features for site in case.values),
        **middle,
        "turns": rows,
        "verification": verified,
        "ratio": ratio,
        "cpu_ratio": middle["export"]["cpu_seconds"] / middle["plain"]["cpu_seconds"],
        "peak_bytes": peak,
        "largest_shard": max(case.plan.layout.sizes.values()),
        "met": ratio <= RATIO_LIMIT,
    }


def each(names: list[str], source: Path, disk: Path, repeats: int, threads: int) -> Iterator[tuple[str, dict]]:
    """Every format in a process of its own, whose memory is its own."""
    for name in names:
        words = ["--one", name, "--source", str(source), "--disk", str(disk), "--repeats", str(repeats)]
        command = [sys.executable, __file__, *words, "--threads", str(threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:44} {found['ratio']:5.2f} of plain ({found['cpu_ratio']:5.2f} of its CPU), peak "
            f"{found['peak_bytes'] / found['largest_shard']:.2f} shards, verification "
            f"{found['verification']['seconds']:.2f} s",
            file=sys.stderr,
        )
        yield name, found


def write_source(folder: Path) -> None:
    """A random Llama with a byte-level tokenizer, which GGUF files can hold."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    write_random_llama(folder, CONFIG | {"num_hidden_layers": BLOCKS, "vocab_size": len(tokens)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main() -> None:
    """Measure every format, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", type=Path, required=True, help="folder on the disk to measure; 2 GB are used")
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of the cases (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one, options.source, options.disk, options.repeats, options.threads)))
        return
    names = [name for name in CASES if not options.only or any(word in name for word in options.only)]
    with TemporaryDirectory(dir=options.disk) as folder:
        source = Path(folder, "source")
        write_source(source)
        found = dict(each(names, source, options.disk, options.repeats, options.threads))
    worst = max(found.values(), key=lambda one: one["ratio"])["ratio"]
    bound = {"largest_ratio": worst, "limit": RATIO_LIMIT, "met": worst <= RATIO_LIMIT}
    if options.output:
        write_results(options.output, {"formats": found, "load": os.getloadavg()[0], "bound": bound})


if __name__ == "__main__":
    main()
