"""Packed products on the CPU beside torch's 16-bit product and beside decoding, in one run, taking turns.

    python benchmarks/cpu_kernels.py [--rounds 15] [--repeats 3] [--threads 1]

Writes results/cpu_kernels.json: `outlierq bench` on the shapes below, the least time of all rounds and repeats for each
product, its candidates and its rivals (which always took turns with it), the accuracy against float64, and the bounds.
Times on one thread are CPU seconds, so that other processes on the machine do not count.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from record import write_results

from outlierq.core.quant_tensor import QuantTensor
from outlierq.ops.activations import fake_quantize
from outlierq.pipeline import bench
from outlierq.runtime import QuantLinear
from outlierq.runtime.timing import clock_here

RESULTS = Path(__file__).parent / "results" / "cpu_kernels.json"
KINDS = {
    (4096, 4096): ("w4", "w4-g32", "w4-asymmetric", "w8", "w8a8"),
    (11008, 4096): ("w4", "w8", "w8a8"),
    (1536, 576): ("w4-g64", "w4-g32", "w8", "w8a8"),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
FEW = 64  # tokens up to which no product may be slower than that with a bfloat16 weight
AT_ONE_TOKEN = 2.0
NOISE = 0.97  # two equal calls differ by so much on a machine that others use too


def measure(rounds: int, repeats: int) -> tuple[bench.Ceilings, list[bench.Timing]]:
    """Several runs, some seconds apart, as one: the least time of each call, all of which took turns in every round."""
    runs = [measure_all(rounds) for _ in range(repeats)]
    found = [ceilings for ceilings, _ in runs]
    fields = ("bytes_per_second", "flops_16bit", "ops_int8")
    ceilings = bench.Ceilings(*(max(getattr(c, field) for c in found) for field in fields))
    return ceilings, [pooled(rows, ceilings) for rows in zip(*(timings for _, timings in runs), strict=True)]


def measure_all(rounds: int) -> tuple[bench.Ceilings, list[bench.Timing]]:
    """One run over all shapes."""
    timings: list[bench.Timing] = []
    for shape, kinds in KINDS.items():
        ceilings, found = bench.measure([shape], TOKENS, kinds, rounds=rounds, clock=clock_here())
        timings += found
    return ceilings, timings


def pooled(rows: tuple[bench.Timing, ...], ceilings: bench.Ceilings) -> bench.Timing:
    """One row of several runs."""
    row = rows[0]
    least = {name: min(getattr(r, name) for r in rows) for name in ("seconds", "dense_seconds", "decode_seconds")}
    candidates = {n: min(r.candidates[n] for r in rows if n in r.candidates) for n in row.candidates}
    bound = ceilings.seconds(row.nbytes, row.operations, row.kind == "w8a8")
    return replace(row, **least, roofline_seconds=bound, candidates=candidates)


def accuracy(kind: str, tokens: int, shape: tuple[int, int] = (1024, 4096)) -> float:
    """Relative error against float64; where inputs are rounded, against the product of the rounded ones."""
    torch.manual_seed(tokens)
    scheme = bench.KINDS[kind]
    codes = torch.randint(int(scheme.code_min), int(scheme.code_max) + 1, shape, dtype=torch.int8)
    stored = QuantTensor(codes, torch.rand(scheme.scale_shape(*shape)).add_(0.5).bfloat16(), None, scheme)
    x = torch.randn(tokens, shape[1]).bfloat16()
    seen = x if scheme.activations is None else fake_quantize(x.float(), scheme.activations)
    truth = seen.double() @ stored.dequantize().double().T
    return ((QuantLinear(stored)(x).double() - truth).norm() / truth.norm()).item()


def bounds(rows: list[bench.Timing], errors: dict[str, float]) -> list[dict]:
    """Every bound with what was measured: for each kind and shape the row that is nearest to missing it."""
    listed = []
    for shape, kinds in KINDS.items():
        for kind in kinds:
            ours = [row for row in rows if (row.shape, row.kind) == (shape, kind)]
            one = next(row for row in ours if row.tokens == 1)
            few = min((row for row in ours if row.tokens <= FEW), key=lambda r: r.dense_seconds / r.seconds)
            slowest = min(ours, key=lambda r: r.decode_seconds / r.seconds)
            name = f"{kind} {shape[0]}x{shape[1]}"
            listed += [
                at_least(f"{name}, 1 token, over the bfloat16 product", one.dense_seconds / one.seconds, AT_ONE_TOKEN),
                at_least(
                    f"{name}, worst of 1 to {FEW} tokens ({few.tokens}), over the bfloat16 product",
                    few.dense_seconds / few.seconds,
                    1.0,
                ),
                at_least(
                    f"{name}, worst of all tokens ({slowest.tokens}), over decoding and multiplying",
                    slowest.decode_seconds / slowest.seconds,
                    NOISE,
                ),
            ]
    worst = max(errors.values())
    return [*listed, {"what": "relative error", "value": worst, "at_most": 1e-2, "met": worst < 1e-2}]


def at_least(what: str, value: float, bound: float) -> dict:
    """A bound and whether it is met."""
    return {"what": what, "value": round(value, 3), "at_least": bound, "met": value >= bound}


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    ceilings, rows = measure(arguments.rounds, arguments.repeats)
    errors = {f"{kind}, {tokens} tokens": accuracy(kind, tokens) for kind in bench.USUAL for tokens in (1, 16, 64)}
    judged = bounds(rows, errors)
    sections = {
        "torch_threads": arguments.threads,
        "clock": "CPU seconds" if arguments.threads == 1 else "seconds",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "rounds": arguments.rounds,
        "repeats": arguments.repeats,
        "ceilings": vars(ceilings),
        "timings": [row.to_dict() for row in rows],
        "relative_error": errors,
        "bounds": judged,
    }
    write_results(arguments.output, sections)
    for row in judged:
        print("met   " if row["met"] else "missed", row["what"], f"{row['value']:.4g}")


if __name__ == "__main__":
    main()
