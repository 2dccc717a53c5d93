"""How fast this machine multiplies packed weights."""

from __future__ import annotations

from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n  outlierq bench\n\n  outlierq bench --shape 14336x4096 --shape 4096x14336 --tokens 1,16\n\n"
    "  outlierq bench --kind w8a8 --json"
)


def command(
    shape: Annotated[
        list[str] | None, typer.Option(metavar="OUTxIN", help="Shape of a weight; default 4096x4096. May be repeated.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens in a call, separated by commas.")] = "1,4,16,64,256",
    kind: Annotated[list[str] | None, typer.Option(help="w4, w8 or w8a8; default all. May be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the least time of all is shown.")] = 7,
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Time packed products beside the 16-bit one and the machine's own limits, measured on the spot."""
    from outlierq.pipeline import bench

    kinds = kind or list(bench.KINDS)
    for name in kinds:
        if name not in bench.KINDS:
            raise typer.BadParameter(f"{name!r}; choose {', '.join(bench.KINDS)}", param_hint="--kind")
    shapes = [_numbers(text, "x", "--shape", 2) for text in shape or ["4096x4096"]]
    if any(number % 32 for pair in shapes for number in pair):
        raise typer.BadParameter("both numbers must be multiples of 32", param_hint="--shape")
    if "w4" in kinds and any(columns % 128 for _, columns in shapes):
        raise typer.BadParameter("w4 has groups of 128 inputs; OUTxIN needs a multiple of 128", param_hint="--shape")
    counts = _numbers(tokens, ",", "--tokens")
    where = shared.choose_device(device)
    with shared.progress(quiet) as listen:
        ceilings, timings = bench.measure(shapes, counts, kinds, device=where, rounds=rounds, listen=listen)
    machine = bench.machine(where)
    if as_json:
        rows = [timing.to_dict() for timing in timings]
        shared.print_json({"machine": machine, "ceilings": vars(ceilings), "timings": rows})
        return
    from outlierq.report.bench_text import bench as table

    shared.show(table(ceilings, timings, machine))


def _numbers(text: str, separator: str, option: str, count: int | None = None) -> tuple[int, ...]:
    """Positive whole numbers of a text like "4096x4096" or "1,4,16"."""
    parts = text.split(separator)
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or count not in (None, len(parts)):
        raise typer.BadParameter(f"{text!r} is not {'OUTxIN' if count else 'a list of numbers'}", param_hint=option)
    return tuple(int(part) for part in parts)
