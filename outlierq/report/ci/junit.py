"""A gate as JUnit XML: one test case per limit, for CI servers that show such files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from outlierq.core.machine.printable import printable

if TYPE_CHECKING:
    from outlierq.core.limits import GateRow


def junit_xml(rows: Sequence[GateRow], model: str, seconds: float) -> bytes:
    """UTF-8 bytes of the file. model: what was judged; seconds: wall time of the measurement."""
    failures = sum(not row.passed for row in rows)
    attributes = {"name": "outlierq gate", "tests": str(len(rows)), "failures": str(failures), "time": f"{seconds:.3f}"}
    root = ElementTree.Element("testsuites", attributes)
    suite = ElementTree.SubElement(root, "testsuite", attributes | {"errors": "0", "skipped": "0"})
    for row in rows:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": f"outlierq.{printable(model)}", "name": printable(row.name)}
        )
        measured = f"{row.value:.6g} {row.relation} {row.limit:g}"
        if row.passed:
            ElementTree.SubElement(case, "system-out").text = measured
        else:
            failure = {"type": "limit", "message": f"not kept: {measured}"}
            ElementTree.SubElement(case, "failure", failure).text = printable(str(row))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"
