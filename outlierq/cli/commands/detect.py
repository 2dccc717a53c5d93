"""Find a model's outliers and say what they will cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq.core.outliers import OutlierReport

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq detect ./SmolLM2-135M --stats ./stats\n\n"
    "  outlierq detect ./SmolLM2-135M --stats ./stats -o outliers     (outliers.json and outliers.html)\n\n"
    "  outlierq detect ./Llama-3.1-8B --png ./card/pictures           (a short calibration runs first)\n\n"
    "  outlierq detect ./SmolLM2-135M --stats ./stats --json | jq .outlier_channels"
)
NAME = "outliers"


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
    from outlierq.pipeline.detect import detect
    from outlierq.pipeline.resources import Resources

    if out is not None or png is not None:
        from outlierq.core.machine.installed import needs_extra

        needs_extra("vl_convert")
    pictures = None if png is None else png / "picture.png"
    shared.refuse_unwritable(*(report_paths(out) if out else ()), pictures)
    checkpoint = shared.open_model(model, revision, trust_remote_code)
    # With statistics nothing runs on a device, and looking for one costs time.
    chosen = shared.choose_device(device if stats is None or device not in ("auto", "cpu") else "cpu")
    if stats is None:
        shared.say("no --stats: running a short calibration on the embedded text first; it is not kept", quiet)
    with shared.progress(quiet) as listen:
        report = detect(checkpoint, stats=stats, resources=Resources(chosen, listen))
    written = [*_write(report, out), *_pictures(report, png)]
    if as_json:
        shared.print_json(report.to_dict())
    else:
        from outlierq.report.outlier_text import outlier_summary

        shared.show(outlier_summary(report))
    for path in written:
        shared.say(f"written: {path}", quiet)


def report_paths(out: str) -> tuple[Path, Path]:
    """(JSON, HTML): `out` with these endings, or `outliers` in it when it is a folder."""
    path = shared.out_path(out)
    if out.endswith("/") or path.is_dir():
        path = path / NAME
    elif path.suffix in (".json", ".html"):
        path = path.with_suffix("")
    return path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.html")


def _write(report: OutlierReport, out: str | None) -> list[Path]:
    """The report for machines and for people."""
    if out is None:
        return []
    from outlierq.pipeline.detect import write_json
    from outlierq.report.outlier_page import write_page

    data, page = report_paths(out)
    write_json(report, data)
    write_page(report, page)
    return [data, page]


def _pictures(report: OutlierReport, folder: Path | None) -> list[Path]:
    """Every picture of the page."""
    if folder is None:
        return []
    from outlierq.report.outlier_page import write_pictures

    return write_pictures(report, folder)
