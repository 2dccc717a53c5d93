"""What a run has written, looked at once more before it gets its name: does its config say what its files hold?"""

from __future__ import annotations

from pathlib import Path

from outlierq.core.errors import OutputError
from outlierq.core.model import Checkpoint
from outlierq.pipeline.checking.declared import check_class, check_declared
from outlierq.pipeline.checking.finding import Findings


def check_written(folder: Path, source: Checkpoint) -> None:
    """OutputError when a matrix is stored otherwise than config.json says, by the class outlierq builds or by the one
    that `architectures` names. source: what was compressed; its code may run where that was allowed. A folder without
    config.json (GGUF) says nothing of the kind.
    """
    from outlierq.load import build_skeleton, checkpoint_names, described, open_checkpoint, unpacked

    if not (folder / "config.json").is_file():
        return
    checkpoint = open_checkpoint(str(folder), trust_remote_code=source.trust_remote_code)
    config = described(checkpoint)
    if not config:
        return
    plain = unpacked(checkpoint)
    skeleton = build_skeleton(plain)
    findings = Findings()
    check_declared(plain, config, skeleton, checkpoint_names(plain, skeleton), findings)
    check_class(plain, config, findings)
    wrong = [fault for fault in findings.faults if fault.check == "config" and fault.tensor]
    if wrong:
        raise OutputError(
            f"{len(wrong)} matrices are stored otherwise than config.json says, first {wrong[0].tensor}: "
            f"{wrong[0].what}",
            hint="this is a fault of outlierq; please report it. The output was not put in place",
        )
