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
    kind: Annotated[
        list[str] | None,
        typer.Option(help="w4, w8 or w8a8, the default; w4-g64, w4-g32, w4-asymmetric. May be repeated."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the least time of all is shown.")] = 7,
    device: shared.Device = "auto",
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Time packed products beside the 16-bit one and the machine's own limits, measured on the spot."""
    import outlierq

    shapes = [_shape(text) for text in shape or ["4096x4096"]]
    with shared.progress(quiet) as listen:
        measured = outlierq.bench(
            shapes,
            _numbers(tokens, ",", "--tokens"),
            kind or None,
            rounds=rounds,
            device=device,
            progress=listen,
        )
    if as_json:
        shared.print_json(measured.to_dict())
        return
    from outlierq.report.bench_text import bench as table

    shared.show(table(measured))


def _shape(text: str) -> tuple[int, int]:
    """The numbers of a text like "4096x4096"."""
    rows, columns = _numbers(text, "x", "--shape", 2)
    return rows, columns


def _numbers(text: str, separator: str, option: str, count: int | None = None) -> tuple[int, ...]:
    """Positive whole numbers of a text like "4096x4096" or "1,4,16"."""
    parts = text.split(separator)
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts) or count not in (None, len(parts)):
        raise typer.BadParameter(f"{text!r} is not {'OUTxIN' if count else 'a list of numbers'}", param_hint=option)
    return tuple(int(part) for part in parts)
