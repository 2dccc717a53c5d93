"""Is every file the one that the run wrote? Sizes and digests are those that the report keeps."""

from __future__ import annotations

from pathlib import Path

from outlierq.core.errors import OutlierqError
from outlierq.core.report import REPORT_NAME, Report
from outlierq.pipeline.checking.finding import Findings

CHECK = "record"


def check_record(path: Path, findings: Findings) -> Report | None:
    """Hold every file of a folder, or beside a GGUF file, against the record in its report, which is given.

    None where there is no report, or none that can be read: that is a fault.
    """
    from outlierq.load import changed_files, report_beside

    try:
        report = report_beside(path)
    except OutlierqError as error:
        findings.fault(CHECK, REPORT_NAME, f"cannot be read: {error.what}")
        return None
    if report is None:
        return None
    if report.record is None:
        findings.note(f"{REPORT_NAME} keeps no digests of the files (it was written by an earlier version)")
    for name, what in changed_files(path, report):
        findings.fault(CHECK, name, what)
    return report
