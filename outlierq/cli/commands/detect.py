"""Find a model's outliers and say what they will cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq detect ./SmolLM2-135M --stats ./stats\n\n"
    "  outlierq detect ./SmolLM2-135M --stats ./stats -o outliers\n\n"
    "  without statistics, a short calibration runs first:\n\n"
    "  outlierq detect ./Llama-3.1-8B --png ./card/pictures\n\n"
    "  for other programs:\n\n"
    "  outlierq detect ./SmolLM2-135M --stats ./stats --json | jq .outlier_channels"
)


def command(
    model: shared.Model,
    stats: Annotated[
        Path | None,
        typer.Option(help="Statistics of `outlierq calibrate`; without them a short calibration runs (not kept)."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", help="Write REPORT.json and REPORT.html; a folder gets outliers.json and outliers.html."
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write each picture as PNG into this folder.")] = None,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Say which linear inputs are dangerous to quantize and why, from statistics and weights alone."""
    import outlierq

    written: list[Path] = []
    with shared.progress(quiet) as listen:
        report = outlierq.detect(
            model,
            stats=stats,
            out=out,
            png=png,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
            written=written.append,
            told=lambda text: shared.say(text, quiet),
        )
    if as_json:
        shared.print_json(report.to_dict())
    else:
        from outlierq.report.outlier_text import outlier_summary

        shared.show(outlier_summary(report))
    for path in written:
        shared.say(f"written: {path}", quiet)
