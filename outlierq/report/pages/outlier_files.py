"""The files of an outlier report: JSON for machines, one HTML page for people, pictures for a card."""

from __future__ import annotations

import os
from pathlib import Path

from outlierq.core.machine.installed import needs_extra
from outlierq.core.measured.outliers import OutlierReport
from outlierq.pipeline.asked.request import folder_of, refuse_unwritable
from outlierq.pipeline.detect import write_json

NAME = "outliers"


def check_places(out: str | os.PathLike[str] | None, png: Path | None) -> None:
    """OutlierqError before any work when these files cannot be written, or the library that draws them is missing."""
    if png is not None:
        needs_extra("vl_convert")
    refuse_unwritable(*(report_paths(out) if out else ()), None if png is None else png / "picture.png")


def write_files(report: OutlierReport, out: str | os.PathLike[str] | None, png: Path | None) -> list[Path]:
    """Write what is asked for; every file that was written."""
    from outlierq.report.pages.outlier_page import write_page, write_pictures

    written: list[Path] = []
    if out is not None:
        data, page = report_paths(out)
        write_json(report, data)
        write_page(report, page)
        written += [data, page]
    return written if png is None else [*written, *write_pictures(report, png)]


def report_paths(out: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(JSON, HTML): `out` with these endings, or `outliers` in it when it is a folder."""
    path = folder_of(out)
    if os.fspath(out).endswith("/") or path.is_dir():
        path = path / NAME
    elif path.suffix in (".json", ".html"):
        path = path.with_suffix("")
    return path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.html")
