"""Packed products on the CPU beside torch's 16-bit product and beside decoding, in one run, taking turns.

    python benchmarks/cpu_kernels.py [--rounds 15] [--repeats 3]

Writes results/cpu_kernels.json: `outlierq bench` on 4096 x 4096, the least time of all rounds and repeats for every
product and its rivals (which always took turns with it), the accuracy against float64, and the bounds. Times are CPU
seconds of one thread, so that other processes on the machine do not count.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from record import write_results

from outlierq.core.quant_tensor import QuantTensor
from outlierq.ops.activations import fake_quantize
from outlierq.pipeline import bench
from outlierq.runtime import QuantLinear

RESULTS = Path(__file__).parent / "results" / "cpu_kernels.json"
FASTER = {("w4", 1): 2.0, ("w8a8", 32): 1.5}  # over the bfloat16 product
NEVER_SLOWER = (1, 4, 16, 64, 256)  # than decoding and multiplying
TOKENS = (1, 4, 8, 16, 32, 64, 256)
NOISE = 0.97  # two equal calls differ by so much on a machine that others use too


def measure(rounds: int, repeats: int) -> tuple[bench.Ceilings, list[bench.Timing]]:
    """Several runs, some seconds apart, as one: the least time of each call, all of which took turns in every round."""
    runs = [bench.measure(tokens=TOKENS, rounds=rounds, clock=time.process_time) for _ in range(repeats)]
    found = [ceilings for ceilings, _ in runs]
    fields = ("bytes_per_second", "flops_16bit", "ops_int8")
    ceilings = bench.Ceilings(*(max(getattr(c, field) for c in found) for field in fields))
    return ceilings, [pooled(rows, ceilings) for rows in zip(*(timings for _, timings in runs), strict=True)]


def pooled(rows: tuple[bench.Timing, ...], ceilings: bench.Ceilings) -> bench.Timing:
    """One row of several runs."""
    row = rows[0]
    least = {name: min(getattr(r, name) for r in rows) for name in ("seconds", "dense_seconds", "decode_seconds")}
    return replace(row, **least, roofline_seconds=ceilings.seconds(row.nbytes, row.operations, row.kind == "w8a8"))


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
    """Every bound with what was measured."""
    found = {(row.kind, row.tokens): row for row in rows}
    checks = [
        (f"{kind}, {tokens} tokens, over the bfloat16 product", found[kind, tokens].to_dict()["over_16bit"], bound)
        for (kind, tokens), bound in FASTER.items()
    ]
    for kind in bench.KINDS:
        slowest = min((found[kind, tokens] for tokens in NEVER_SLOWER), key=lambda r: r.decode_seconds / r.seconds)
        what = f"{kind}, worst of {NEVER_SLOWER} tokens ({slowest.tokens}), over decoding and multiplying"
        checks.append((what, slowest.to_dict()["over_decoding"], NOISE))
    listed = [{"what": what, "value": value, "at_least": bound, "met": value >= bound} for what, value, bound in checks]
    worst = max(errors.values())
    return [*listed, {"what": "relative error", "value": worst, "at_most": 1e-2, "met": worst < 1e-2}]


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    ceilings, rows = measure(arguments.rounds, arguments.repeats)
    errors = {f"{kind}, {tokens} tokens": accuracy(kind, tokens) for kind in bench.KINDS for tokens in (1, 16, 64)}
    judged = bounds(rows, errors)
    sections = {
        "torch_threads": 1,
        "clock": "CPU seconds",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "rounds": arguments.rounds,
        "repeats": arguments.repeats,
        "ceilings": vars(ceilings),
        "timings": [row.to_dict() for row in rows],
        "relative_error": errors,
        "bounds": judged,
    }
    write_results(RESULTS, sections)
    for row in judged:
        print("met   " if row["met"] else "missed", row["what"], f"{row['value']:.4g}")


if __name__ == "__main__":
    main()
