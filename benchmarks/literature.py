"""The methods of the outlier literature on one model, at the bits that each spends: docs/literature.md's tables.

    python benchmarks/literature.py MODEL --calibration text.txt --text other.txt --general more.txt --stress --caches

Quality only: figures do not depend on how busy the machine is, CPU seconds little.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from record import machine, write_results

import outlierq
from outlierq.core.scheme import QuantScheme
from outlierq.load import open_checkpoint
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.quantize.rtn import rtn
from outlierq.recipe import load
from outlierq.testing.stress import stressed

BY_BLOCK = {3: "learned rounding, by block, far", 4: "learned rounding, by block"}
ROUNDING = ["rtn", "gptq", "gptq, then learned rounding", BY_BLOCK[3], "gptaq", "awq, gptq", "adadim, gptq"]
BRANCHES = ["low rank 8, by output", "low rank 32, by output", "svdquant, rank 32"]
PAIRS = ["olive", "olive, gptq"]
# Table -> what differs from the usual conditions, and who takes part (all, where the list is empty).
BOTH, MORE_BITS = "4-bit weights and inputs", "8-bit weights in groups of 8, 4-bit inputs"
AS_THEY_ARE = "weights as they are"
LEARNED = ["klt, gptq", "spinquant, gptq", "ostquant, gptq"]
ROTATED = ["rotate, gptq", "rotate from weights, gptq", *LEARNED]
TABLES = {
    "4 bits": ({"bits": 4}, []),
    "3 bits": ({"bits": 3}, [*ROUNDING, *BRANCHES]),
    "3 bits, groups of 128": ({"bits": 3, "group_size": 128}, ["rtn", "gptq", "gptaq", BY_BLOCK[3]]),
    "4 bits per channel": ({"bits": 4, "group_size": None}, ["rtn", "gptq", *PAIRS, "splitquant", "adadim"]),
    "NVFP4 weights and inputs": ({"inputs": "nvfp4"}, ["rtn", "gptq", *BRANCHES, AS_THEY_ARE]),
    MORE_BITS: ({"bits": 8, "group_size": 8, "inputs": "int4"}, ["gptq"]),
    BOTH: ({"bits": 4, "inputs": "int4"}, ["rtn", "gptq", *BRANCHES, AS_THEY_ARE, *ROTATED]),
}
# Table, method, rival (of another table, where its name follows " in "), and the largest ratio of their KL hoped for.
# What a branch of rank 32 costs on narrow models, plain weights can spend on 8 bits in groups of 8 (10.0 bits); NVFP4
# has no smaller groups, so its rival are weights that are not rounded at all.
HOPES = [
    (BOTH, "svdquant, rank 32", f"gptq in {MORE_BITS}", 0.8),
    (BOTH, "low rank 32, by output", f"gptq in {MORE_BITS}", 0.8),
    ("NVFP4 weights and inputs", "svdquant, rank 32", AS_THEY_ARE, 0.8),
    ("4-bit weights and inputs", "rotate from weights, gptq", "rotate, gptq", 0.85),
    ("4-bit weights and inputs", "klt, gptq", "rotate, gptq", 0.85),
    ("4-bit weights and inputs", "spinquant, gptq", "rotate, gptq", 0.85),
    ("4-bit weights and inputs", "ostquant, gptq", "rotate, gptq", 0.85),
    ("3 bits, groups of 128", BY_BLOCK[3], "gptq", 0.8),
    ("3 bits, groups of 128", "gptaq", "gptq", 1.0),
    ("3 bits", BY_BLOCK[3], "gptq", 0.8),
    ("4 bits", BY_BLOCK[4], "gptq", 0.8),
    ("4 bits", "gptaq", "gptq", 1.0),
    ("3 bits", "gptaq", "gptq", 1.0),
    ("3 bits", "gptq, then learned rounding", "gptq", 0.8),
    ("4-bit weights and inputs", "low rank 32, by output", "gptq", 0.8),
    ("4-bit weights and inputs", "svdquant, rank 32", "gptq", 0.8),
    ("NVFP4 weights and inputs", "low rank 32, by output", "gptq", 0.8),
    ("NVFP4 weights and inputs", "svdquant, rank 32", "gptq", 0.8),
    ("4 bits per channel", "olive", "rtn", 0.5),
    ("4 bits per channel", "olive, gptq", "rtn", 0.5),
    ("4 bits per channel, stress model", "olive", "rtn", 0.5),
    ("4 bits per channel, stress model", "olive, gptq", "rtn", 0.5),
    ("4 bits", "d-pruner 50 %", "sparsegpt 50 %", 1.0),
    ("4 bits", "sparsegpt 50 %, budgets by farms", "sparsegpt 50 %", 1.0),
]
STRESSED = "4 bits per channel, stress model"


def main() -> None:
    """Calibrate once, fill every table, compare with what was hoped for, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint: folder or Hub id")
    parser.add_argument("--calibration", help="text file to calibrate on (default: mix)")
    parser.add_argument("--text", help="text file to measure on (default: the held-out part of mix)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--general", help="text file of general text, for d-pruner")
    parser.add_argument("--stress", action="store_true", help="also the stress model of it, per channel")
    parser.add_argument("--caches", action="store_true", help="also the caches of servers and of papers")
    parser.add_argument("--cache-length", type=int, default=256, help="tokens in a window of those")
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "literature.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables: dict = kept_tables(arguments)
    sections: dict = {"spiked_gauss_db": spiked_gauss(), "tables": tables}
    if arguments.output.exists():
        sections["caches"] = json.loads(arguments.output.read_text()).get("caches")

    def keep(name: str, table: dict) -> None:
        tables[name] = table | {"measured": f"{machine()['processor']}, {machine()['date']}"}
        sections["hopes"] = [each for hope in HOPES if (each := judged(tables, *hope))]
        write_results(arguments.output, sections)

    with tempfile.TemporaryDirectory() as folder:
        stats, general = (Path(folder, name) for name in ("stats", "general"))
        calibrated(arguments, arguments.model, stats, arguments.calibration, sensitivity=True)
        if arguments.general:
            calibrated(arguments, arguments.model, general, arguments.general, sensitivity=True)
        known = {"stats": stats, "general": general if arguments.general else None}
        if arguments.caches:
            sections["caches"] = caches(arguments)
        if arguments.stress:
            keep(STRESSED, of_stress_model(arguments, Path(folder)))
        for name in arguments.tables:
            keep(name, measured(arguments, arguments.model, *TABLES[name], **known))


def kept_tables(arguments: argparse.Namespace) -> dict:
    """The tables of this model that are not measured now, with machine and date of the earlier run beside each."""
    if not arguments.output.exists():
        return {}
    earlier = json.loads(arguments.output.read_text())
    is_ours = lambda table: table["model"] == Path(arguments.model).name  # noqa: E731
    when = f"{earlier['machine']['processor']}, {earlier['machine']['date']}"
    return {name: {"measured": when} | table for name, table in earlier["tables"].items() if is_ours(table)}


def calibrated(arguments: argparse.Namespace, model: str | Path, out: Path, text: str | None, **more: bool) -> None:
    """Statistics of a model on a text."""
    windows = {"samples": arguments.samples, "sequence_length": arguments.sequence_length}
    outlierq.calibrate(model, out=out, text=text, device="cpu", **windows, **more)


def measured(
    arguments: argparse.Namespace, model: str | Path, conditions: dict, only: list[str], **known: Path | None
) -> dict:
    """One table. known: statistics, and those of general text."""
    usual = {"group_size": arguments.group_size, "windows": arguments.windows}
    study = outlierq.study_methods(
        model,
        only=only,
        text=arguments.text,
        window_length=arguments.sequence_length,
        device="cpu",
        **known,
        **usual | conditions,
    )
    for row in study.rows:
        print(row.name, row.bits, row.kl, row.note, flush=True)
    return study.to_dict() | {"model": Path(study.model).name, "text": Path(study.text).name, "statistics": ""}


def of_stress_model(arguments: argparse.Namespace, folder: Path) -> dict:
    """The table per channel of the same function with outlier channels in its inputs."""
    model, stats = folder / "stressed", folder / "stressed-stats"
    quantize(make_plan(stressed(open_checkpoint(arguments.model)), load("dense")), model)
    calibrated(arguments, model, stats, arguments.calibration)
    conditions = {"bits": 4, "group_size": None}
    return measured(arguments, model, conditions, ["rtn", "gptq", *PAIRS, "splitquant"], stats=stats)


def caches(arguments: argparse.Namespace) -> dict:
    """Keys and values in the caches of servers and of papers."""
    usual = {"windows": arguments.windows, "window_length": arguments.cache_length}
    study = outlierq.study_caches(arguments.model, text=arguments.text, device="cpu", **usual)
    for row in study.rows:
        print(row.name, row.bits, row.kl, row.note, flush=True)
    return study.to_dict() | {"model": Path(study.model).name, "text": Path(study.text).name}


def spiked_gauss() -> dict[str, float]:
    """Signal over noise of OliVe and of 4-bit integers with the best clip, on a Gauss with 0.3 % of spikes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    spikes = torch.rand(x.shape, generator=generator) < 0.003
    x[spikes] *= 8 + 12 * torch.rand(int(spikes.sum()), generator=generator)
    scales = x.abs().amax(1, keepdim=True) / 7 * torch.linspace(0.05, 1, 96)[:, None, None]
    integers = [(x / scale).round().clamp(-7, 7) * scale for scale in scales]
    errors = torch.stack([(each - x).square().sum(1) for each in integers]).amin(0).sum()
    scheme = QuantScheme(4, None, kind="outlier-victim", scale_dtype="float32")
    pairs = rtn(x, None, scheme, scale_search="mse").dequantize()
    return {"olive": decibels(x, (pairs - x).square().sum()), "int4, best clip": decibels(x, errors)}


def decibels(x: torch.Tensor, error: torch.Tensor) -> float:
    """Of the power of x over an error."""
    return 10 * float(torch.log10(x.square().sum() / error))


def kl_of(tables: dict, table: str) -> dict[str, float | None]:
    """KL by method of one table; empty where it was not made."""
    return {row["name"]: row["kl"] for row in tables.get(table, {}).get("rows", ())}


def judged(tables: dict, table: str, method: str, rival: str, limit: float) -> dict | None:
    """The ratio of two KL and whether it is what was hoped for; None where one was not measured."""
    name, _, other = rival.partition(" in ")
    ours, theirs = (kl_of(tables, each).get(which) for each, which in ((table, method), (other or table, name)))
    if not ours or not theirs:
        return None
    ratio = ours / theirs
    return {"table": table, "method": method, "rival": rival, "ratio": ratio, "limit": limit, "met": ratio <= limit}


if __name__ == "__main__":
    main()
