"""A result that is one file, `-o model.gguf`: made as a folder beside it, and put in place when all is verified.

Its report stands beside it, under the name of the file and `.outlierq.json`: other files of the folder are none of its.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from outlierq.core.errors import OutputError
from outlierq.core.machine.record import signed
from outlierq.core.report import REPORT_NAME, Report, report_of_file
from outlierq.export import format_type
from outlierq.export.writer import disk_error, sync_folder, write_small

SUFFIX = ".gguf"


def file_of(out: Path, format: str) -> Path | None:
    """The file that a result becomes; None where it is a folder, whatever its name. OutputError when it exists."""
    if out.suffix != SUFFIX or format_type(format).container != SUFFIX.removeprefix("."):
        return None
    for place in (out, report_of_file(out)):
        if place.exists():
            raise OutputError(f"{place} exists already", hint="choose another name; nothing is overwritten")
    return out


def folder_for(file: Path) -> Path:
    """Where the result is made."""
    return file.with_name(f"{file.name}.folder")


def put_in_place(folder: Path, file: Path, report: Report) -> Report:
    """Move the weights and the report of a finished folder, and remove it with all that is inside the file as well."""
    record = dict(report.record or {})
    weights = next(name for name in record["files"] if name.endswith(SUFFIX))
    record["files"] = {file.name: record["files"][weights]}
    report = signed(replace(report, out=str(file)), record)
    try:
        write_small(folder, {REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()})
        (folder / REPORT_NAME).rename(report_of_file(file))
        (folder / weights).rename(file)
        sync_folder(file.parent)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    except OSError as error:
        raise disk_error(error, file, 0) from error
    return report
