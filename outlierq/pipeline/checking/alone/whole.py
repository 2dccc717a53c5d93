"""Everything that is looked at without the source, in the order in which `verify` meets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.pipeline.checking.alone.gains import check_gains
from outlierq.pipeline.checking.alone.inputs import check_inputs
from outlierq.pipeline.checking.alone.layout import check_layout
from outlierq.pipeline.checking.alone.prompts import check_prompts
from outlierq.pipeline.checking.alone.reach import Reach
from outlierq.pipeline.checking.alone.recorded import check_recorded
from outlierq.pipeline.checking.alone.settings import check_settings
from outlierq.pipeline.checking.alone.shards import check_shards
from outlierq.pipeline.checking.alone.sizes import Sizes
from outlierq.pipeline.checking.alone.superblocks import check_file
from outlierq.pipeline.checking.alone.tables import check_tables
from outlierq.pipeline.checking.alone.vocabulary import check_vocabulary
from outlierq.pipeline.checking.alone.zero_points import ZeroPoints
from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.report import Report


def check_files(checkpoint: Checkpoint, findings: Findings, doubts: Findings) -> None:
    """Files beside the weights: settings, tokenizer, templates, the index. doubts: what may also be the model's own."""
    check_settings(checkpoint, findings)
    check_vocabulary(checkpoint, findings)
    check_prompts(checkpoint, doubts)
    if checkpoint.kind == "gguf":
        check_file(Path(checkpoint.path), findings)
    check_shards(Path(checkpoint.path), checkpoint, findings)


def check_tensors(
    stored: Checkpoint,
    plain: Checkpoint,
    config: Mapping[str, Any],
    report: Report | None,
    studied: tuple[Any, Mapping[str, str]] | None,
    findings: Findings,
) -> None:
    """Headers and small tensors. studied: the model class, and where its parameters are."""
    try:
        check_layout(stored, plain.linears, config, findings)
        if studied is not None:
            check_inputs(stored, plain, *studied, findings)
            check_gains(plain, *studied, findings)
            check_tables(plain, *studied, findings)
    except SourceError as error:
        findings.fault("layout", "", error.what)
    if report is not None:
        check_recorded(plain, config, studied[1] if studied else {}, report, findings)


@dataclass
class Kin:
    """What weights are told by those beside them: added one at a time, judged when all were seen."""

    sizes: Sizes = field(default_factory=Sizes)
    reach: Reach = field(default_factory=Reach)
    zero_points: ZeroPoints = field(default_factory=ZeroPoints)

    def add(self, name: str, weight: torch.Tensor, quantized: QuantTensor | None, findings: Findings) -> None:
        """A quantized weight, float32 [out, in]."""
        self.sizes.add(name, weight, _constant(quantized))
        if quantized is not None:
            self.reach.add(name, quantized, findings)
            self.zero_points.add(name, quantized, findings)

    def judge(self, plain: Checkpoint, findings: Findings, doubts: Findings) -> None:
        """Everything, once the tensors that are not quantized were added, too. doubts: what kin alone tells."""
        for name, info in plain.tensors.items():
            if name not in plain.packed and info.dtype in ("F32", "F16", "BF16") and 0 < len(info.shape) < 3:
                try:
                    tensor = plain.read(name).float()
                except SourceError:
                    continue  # said where it was read first
                if bool(tensor.isfinite().all()):
                    self.sizes.add(name, tensor)
        self.sizes.judge(plain.packed, doubts)
        self.reach.judge(doubts)
        self.zero_points.judge(doubts)


def _constant(quantized: QuantTensor | None) -> torch.Tensor | None:
    """[out] rows with a group of one value, whose size says nothing of their kin."""
    if quantized is None or quantized.scheme.block is not None:
        return None
    codes = quantized.codes.float().view(len(quantized.codes), quantized.scale.shape[1], -1)
    return (codes.amax(-1) == codes.amin(-1)).any(1)
