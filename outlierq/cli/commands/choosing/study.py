"""Comparisons of methods, of calibration texts, and of caches, on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared
from outlierq.cli.help import Command, Group

app = typer.Typer(
    cls=Group,
    help="Compare methods, calibration texts, or caches, on one model.",
    no_args_is_help=True,
    epilog="Examples:\n\n  outlierq calibrate ./SmolLM2-135M -o stats\n\n"
    "  outlierq study methods ./SmolLM2-135M --stats stats -o methods.md",
)
METHODS = (
    "Examples:\n\n  outlierq study methods ./SmolLM2-135M --stats stats\n\n"
    "  outlierq study methods ./SmolLM2-135M --stats stats --only gptq --only olive --bits 4 --group-size channel\n\n"
    "  outlierq study methods ./SmolLM2-135M --stats stats --inputs int4 -o w4a4.json"
)
WRITE = 'Example:\n\n  outlierq study write ./SmolLM2-135M "sparsegpt 2:4" --stats stats -o pruned'
CALIBRATION = (
    "Examples:\n\n  outlierq study calibration ./SmolLM2-135M --text mix --text nonsense\n\n"
    "  outlierq study calibration ./SmolLM2-135M --text chats.txt --text code.txt --text news.txt --json"
)

CACHE = (
    "Examples:\n\n  outlierq study cache ./SmolLM2-135M\n\n"
    "  outlierq study cache ./SmolLM2-135M --only int8 --only int4 --only kivi-2 --json"
)

General = Annotated[
    Path | None,
    typer.Option(help="Other statistics, of general text: d-pruner keeps what both texts need."),
]


@app.command("methods", cls=Command, epilog=METHODS)
@shared.translated
def methods(
    model: shared.Model,
    stats: Annotated[Path, typer.Option(help="Statistics of `outlierq calibrate`, which all methods share.")],
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of the weights.")] = 4,
    group_size: shared.GroupSize = "128",
    inputs: Annotated[
        str, typer.Option(help="Inputs of the linears: 16, int8, int4; or nvfp4, mxfp4, weights too.")
    ] = "16",
    only: Annotated[
        list[str] | None, typer.Option(help="A method by its name in the table; default all. May be repeated.")
    ] = None,
    general: General = None,
    text: shared.Text = None,
    windows: shared.Windows = 24,
    window_length: shared.WindowLength = 512,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the table: JSON, or a page if the name ends in .md.")
    ] = None,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Every method that fits, with the bits it spends, its errors, its cost, and which programs load what it makes."""
    import outlierq

    with shared.progress(quiet) as listen:
        study = outlierq.study_methods(
            model,
            stats=stats,
            bits=bits,
            group_size=_columns(group_size),
            inputs=inputs,
            only=only or (),
            general=general,
            text=text,
            windows=windows or None,
            window_length=window_length,
            out=out,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
        )
    if as_json:
        shared.print_json(study.to_dict())
        return
    from outlierq.report.study_text import methods as table

    shared.show(table(study))


@app.command("calibration", cls=Command, epilog=CALIBRATION)
@shared.translated
def calibration(
    model: shared.Model,
    text: Annotated[
        list[str], typer.Option(help="A text file, `mix`, `embedded`, or `nonsense` (random signs). Give at least two.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Windows of each text.")] = 32,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of the weights that are rounded on each text.")] = 4,
    group_size: shared.GroupSize = "128",
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """How much it matters on which text a model is calibrated: one calibration each, judged on all others."""
    import outlierq

    with shared.progress(quiet) as listen:
        study = outlierq.study_calibration(
            model,
            text,
            samples=samples,
            sequence_length=sequence_length,
            bits=bits,
            group_size=_columns(group_size),
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
        )
    if as_json:
        shared.print_json(study.to_dict())
        return
    from outlierq.report.study_text import calibration as table

    shared.show(table(study))


@app.command("cache", cls=Command, epilog=CACHE)
@shared.translated
def cache(
    model: shared.Model,
    only: Annotated[
        list[str] | None, typer.Option(help="A cache by its name in the table; default all. May be repeated.")
    ] = None,
    text: shared.Text = None,
    windows: shared.Windows = 24,
    window_length: shared.WindowLength = 512,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the table in MODEL's outlierq.json, for its page and its card.")
    ] = False,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """What keys and values in fewer bits cost: in the caches of servers and of papers, and the flag that follows."""
    import outlierq

    with shared.progress(quiet) as listen:
        study = outlierq.study_caches(
            model,
            only=only or (),
            text=text,
            windows=windows or None,
            window_length=window_length,
            record=record,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
        )
    if as_json:
        shared.print_json(study.to_dict())
        return
    from outlierq.report.study_text import caches as table

    shared.show(table(study))


@app.command("write", cls=Command, epilog=WRITE)
@shared.translated
def write(
    model: shared.Model,
    method: Annotated[str, typer.Argument(help="A method by its name in the table of `study methods`.")],
    stats: Annotated[Path, typer.Option(help="Statistics of `outlierq calibrate`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the checkpoint.")],
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of the weights, where the method rounds.")] = 4,
    group_size: shared.GroupSize = "128",
    general: General = None,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    quiet: shared.Quiet = False,
) -> None:
    """Write the model that a method is judged by, as a plain checkpoint: pruned, or rounded and decoded; no smaller."""
    import outlierq

    with shared.progress(quiet) as listen:
        report = outlierq.study_write(
            model,
            method,
            stats=stats,
            out=out,
            bits=bits,
            group_size=_columns(group_size),
            general=general,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
        )
    shared.say(f"written and verified: {report.out}", quiet)


def _columns(text: str) -> int | None:
    """A number of columns, or None for the word `channel`."""
    if text == "channel":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no number of columns, and not `channel`", param_hint="--group-size")
    return int(text)
