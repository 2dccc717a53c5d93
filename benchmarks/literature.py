"""The methods of the outlier literature on one model, at the bits that each spends: docs/literature.md's tables.

    python benchmarks/literature.py MODEL --calibration text.txt --text other.txt

Quality only: figures do not depend on how busy the machine is, CPU seconds little.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from record import write_results

import outlierq

ROUNDING = ["rtn", "gptq", "gptq, then learned rounding", "gptaq", "awq, gptq", "adadim, gptq"]
BRANCHES = ["low rank 8, by output", "low rank 32, by output", "svdquant, rank 32"]
# Table -> what differs from the usual conditions, and who takes part (all, where the list is empty).
LEARNED = ["klt, gptq", "spinquant, gptq", "ostquant, gptq"]
ROTATED = ["rotate, gptq", "rotate from weights, gptq", *LEARNED]
TABLES = {
    "4 bits": ({"bits": 4}, []),
    "3 bits": ({"bits": 3}, [*ROUNDING, *BRANCHES]),
    "4 bits per channel": ({"bits": 4, "group_size": None}, ["rtn", "gptq", "olive", "splitquant", "adadim"]),
    "4-bit weights and inputs": ({"bits": 4, "inputs": "int4"}, ["rtn", "gptq", *ROTATED, *BRANCHES]),
}
# Table, method, rival, and the largest ratio of their KL that was hoped for.
HOPES = [
    ("4-bit weights and inputs", "rotate from weights, gptq", "rotate, gptq", 0.85),
    ("4-bit weights and inputs", "klt, gptq", "rotate, gptq", 0.85),
    ("4-bit weights and inputs", "spinquant, gptq", "rotate, gptq", 0.85),
    ("4-bit weights and inputs", "ostquant, gptq", "rotate, gptq", 0.85),
    ("4 bits", "gptaq", "gptq", 1.0),
    ("3 bits", "gptaq", "gptq", 1.0),
    ("3 bits", "gptq, then learned rounding", "gptq", 0.8),
    ("4-bit weights and inputs", "low rank 32, by output", "gptq", 0.8),
    ("4-bit weights and inputs", "svdquant, rank 32", "gptq", 0.8),
    ("4 bits per channel", "olive", "rtn", 0.5),
]


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
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "literature.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder, "stats")
        length = {"sequence_length": arguments.sequence_length}
        outlierq.calibrate(
            arguments.model, out=stats, text=arguments.calibration, samples=arguments.samples, device="cpu", **length
        )
        tables = {name: measured(arguments, stats, *TABLES[name]) for name in arguments.tables}
    sections = {"tables": tables, "hopes": [each for hope in HOPES if (each := judged(tables, *hope))]}
    write_results(arguments.output, sections)


def measured(arguments: argparse.Namespace, stats: Path, conditions: dict, only: list[str]) -> dict:
    """One table."""
    usual = {"group_size": arguments.group_size, "windows": arguments.windows}
    study = outlierq.study_methods(
        arguments.model,
        stats=stats,
        only=only,
        text=arguments.text,
        window_length=arguments.sequence_length,
        device="cpu",
        **usual | conditions,
    )
    for row in study.rows:
        print(row.name, row.bits, row.kl, row.note, flush=True)
    return study.to_dict() | {"model": Path(study.model).name, "text": Path(study.text).name, "statistics": ""}


def judged(tables: dict, table: str, method: str, rival: str, limit: float) -> dict | None:
    """The ratio of two KL and whether it is what was hoped for; None where one was not measured."""
    kl = {row["name"]: row["kl"] for row in tables.get(table, {}).get("rows", ())}
    if not kl.get(method) or not kl.get(rival):
        return None
    ratio = kl[method] / kl[rival]
    return {"table": table, "method": method, "rival": rival, "ratio": ratio, "limit": limit, "met": ratio <= limit}


if __name__ == "__main__":
    main()
