"""`outlierq verify`: is a checkpoint whole, consistent with its config, and what its source became?

Every fault is collected, none stops the others. Weights are decoded one at a time by the decoders in `load/`, which
share no code with our exporters, so the check is the same for a checkpoint of ours and of another program. What each
check looks at stands in `checking/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError, SourceError
from outlierq.core.report import REPORT_NAME, Shown
from outlierq.pipeline.asked.events import Event, Listener, silent
from outlierq.pipeline.asked.request import is_gguf
from outlierq.pipeline.checking.alone.whole import Kin, check_files, check_tensors
from outlierq.pipeline.checking.codes import codes_of_rows
from outlierq.pipeline.checking.config import compare_config
from outlierq.pipeline.checking.declared import check_class, check_declared
from outlierq.pipeline.checking.finding import Fault, Findings
from outlierq.pipeline.checking.plain import check_plain
from outlierq.pipeline.checking.record import check_record

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.report import Report
    from outlierq.pipeline.checking.source.against import Comparison
    from outlierq.pipeline.checking.tokens import Tokens

__all__ = ["Fault", "Verification", "verify"]


@dataclass
class Verification(Shown, Findings):
    """What was found. errors: relative error of each quantized weight against what the recipe's folds and rotations
    make of the source. notes: what could not be checked, and why.
    """

    source: str
    original: str | None
    quantization: str | None = None
    tensors: int = 0
    linears: int = 0
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {"sound": self.sound, **asdict(self)}


def verify(
    source: str, original: str | None = None, *, trust_remote_code: bool = False, listen: Listener = silent
) -> Verification:
    """Check the checkpoint at `source`, and hold it against the one it was made from when `original` is given.

    source: a folder, a Hub id or a GGUF file, or the folder that `quantize` wrote a GGUF file into.
    """
    from outlierq.load import described

    verification = Verification(source=source, original=original)
    reference = None if original is None else _reference(original, trust_remote_code)
    file = _gguf_in(Path(source))
    report = check_record(Path(source), verification) if Path(source).exists() else None
    try:
        checkpoint = _opened(str(file or source), trust_remote_code, verification)
    except SourceError as error:
        verification.fault("files", "", error.what)
        return verification
    if report is None and not Path(source).exists():
        report = check_record(checkpoint.path, verification)
    config = described(checkpoint) or {}
    verification.quantization = config.get("quant_method") or ("gguf" if checkpoint.kind == "gguf" else None)
    verification.tensors = len(checkpoint.tensors)
    plain = _decoded(checkpoint, verification)
    _check_stored(checkpoint, verification)
    doubts = Findings()
    check_files(checkpoint, verification, doubts)
    if plain is not None:
        verification.linears = len(plain.packed)
        studied = _check_places(plain, verification) if plain.studied() is None else None
        _check_config(checkpoint, plain, config, studied, verification)
        check_tensors(checkpoint, plain, config, report, studied, verification)
        tokens = _check_tokens(checkpoint, studied, verification)
        if reference is not None and plain.studied() is not None and reference.studied() is None:
            verification.note(f"not compared with {original}, which has other names")
            reference = None
        comparison = None if reference is None else _comparison(plain, reference, report, studied, verification)
        _check_weights(plain, comparison, config, verification, doubts if comparison is None else Findings(), listen)
        if comparison is not None and reference is not None:
            _compare(plain, comparison, reference, tokens, verification)
    is_vouched = report is not None and report.record is not None and not verification.of("record")
    if is_vouched:
        verification.notes += [f"{doubt.tensor} {doubt.what}; it is as the run wrote it" for doubt in doubts.faults]
    else:
        verification.faults += doubts.faults
    return verification


def _gguf_in(folder: Path) -> Path | None:
    """The only GGUF file of a folder that `quantize` wrote one into; None for any other."""
    if not folder.is_dir() or (folder / "config.json").exists() or not (folder / REPORT_NAME).is_file():
        return None
    files = sorted(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _reference(original: str, trust_remote_code: bool) -> Checkpoint:
    """The checkpoint to compare with; SourceError when it cannot be read, which is no fault of the other."""
    from outlierq.load import served

    return served(_opened(original, trust_remote_code, Findings()))


def _opened(source: str, trust_remote_code: bool, findings: Findings) -> Checkpoint:
    """The checkpoint; a GGUF file that transformers cannot read, under its own names. SourceError for damaged ones."""
    from outlierq.load import FramedCheckpoint, open_checkpoint

    try:
        return open_checkpoint(source, trust_remote_code=trust_remote_code)
    except SourceError as error:
        if not is_gguf(Path(source)):
            raise
        checkpoint = FramedCheckpoint(Path(source), source=source)
        findings.note(f"checked under the names of the file, without config and tokenizer: {error.what}")
        return checkpoint.decoding(checkpoint.decodable)


def _decoded(checkpoint: Checkpoint, findings: Findings) -> Checkpoint | None:
    """The checkpoint with its packed weights decoded on demand; None when its layout contradicts its config."""
    from outlierq.load import unpacked

    try:
        return unpacked(checkpoint)
    except SourceError as error:
        findings.fault("layout", "", error.what)
        return None


def _check_places(plain: Checkpoint, findings: Findings) -> tuple[Any, dict[str, str]] | None:
    """Every parameter of the model has its tensor, every tensor its place, and config.json tells them right.

    Gives the model class and the stored tensor of each parameter; None when they do not fit together.
    """
    from outlierq.load import build_skeleton, checkpoint_names, misplaced

    try:
        skeleton = build_skeleton(plain)
        names = checkpoint_names(plain, skeleton)
    except SourceError as error:
        findings.fault("tensors", "", error.what)
        return None
    for each in misplaced(plain, skeleton, names):
        findings.fault(each.check, each.tensor, each.what)
    return skeleton, names


def _check_config(
    checkpoint: Checkpoint,
    plain: Checkpoint,
    config: Mapping[str, Any],
    studied: tuple[Any, dict[str, str]] | None,
    findings: Findings,
) -> None:
    """What config.json says of each matrix, of inputs and of the cache is what is stored."""
    from outlierq.pipeline.checking.scales import check_members

    skeleton, names = studied or (None, {})
    if skeleton is not None:
        check_plain(plain, skeleton, names, findings)
    if config:
        try:
            declared = Findings()
            check_declared(plain, config, skeleton, names, declared)
            if skeleton is not None:
                check_class(plain, config, declared)
            findings.faults += dict.fromkeys(declared.faults)
            check_members(checkpoint, config, findings)
        except SourceError as error:  # a pattern that cannot be followed
            findings.fault("config", "", error.what)


def _check_tokens(
    checkpoint: Checkpoint, studied: tuple[Any, dict[str, str]] | None, findings: Findings
) -> Tokens | None:
    """The tokenizer, held against the model."""
    from outlierq.pipeline.checking.tokens import check_tokens

    return None if studied is None else check_tokens(checkpoint, studied[0], findings)


def _check_stored(checkpoint: Checkpoint, findings: Findings) -> None:
    """Every stored float (weights in 16 bits, scales) is finite, and scales are what scales can be."""
    from outlierq.export.writer import all_finite
    from outlierq.pipeline.checking.scales import Signs, check_stored

    signs = Signs()
    for name, info in checkpoint.tensors.items():
        if not info.dtype.startswith(("F", "BF")) or info.dtype == "F8_E8M0":
            continue
        try:
            tensor = checkpoint.read(name)
        except SourceError as error:
            findings.fault("files", name, error.what)
            continue
        if not all_finite(tensor):
            count = int((~tensor.float().isfinite()).sum())
            findings.fault("numbers", name, f"holds {count} of {tensor.numel()} values that are NaN or infinite")
        else:
            check_stored(name, tensor, signs, findings)
    signs.judge(findings)


def _comparison(
    plain: Checkpoint,
    reference: Checkpoint,
    report: Report | None,
    studied: tuple[Any, dict[str, str]] | None,
    findings: Findings,
) -> Comparison | None:
    """How the checkpoint is held against its source; None when a recipe's rewrites cannot be repeated on it."""
    from outlierq.pipeline.checking.source.against import Comparison, lost_turns

    lost = lost_turns(plain, report)
    if lost:
        findings.note(f"weights are not held against the source: {lost}")
        return None
    try:
        return Comparison.of(plain, reference, report, studied[1] if studied else {}, findings)
    except OutlierqError as error:
        findings.fault("source", "", f"what the recipe does cannot be done to this source: {error.what}")
        return None


def _check_weights(
    plain: Checkpoint,
    comparison: Comparison | None,
    config: Mapping[str, Any],
    findings: Findings,
    doubts: Findings,
    listen: Listener,
) -> None:
    """Decode every quantized weight, look at its codes, and hold it against the source.

    doubts: get what may also be the model's own, such as a size that strays among its kin.
    """
    from outlierq.pipeline.checking.scales import check_codes, check_values

    unsaid: list[str] = []
    kin = Kin()
    packed = list(plain.packed)
    names = packed + ([] if comparison is None else comparison.dense)
    for number, name in enumerate(names):
        listen(Event("verify", number, len(names), name))
        try:
            weight, quantized = _decode(plain, name, unsaid)
            if not bool(weight.isfinite().all()):
                continue  # said by `_check_stored`, which names the stored tensor
            if quantized is not None:
                check_codes(name, quantized, config, findings)
            check_values(name, weight, findings)
            kin.add(name, weight, quantized, findings)
            if comparison is not None:
                comparison.weight(name, weight, quantized)
        except SourceError as error:
            findings.fault("layout", name, error.what)
    kin.judge(plain, findings, doubts)
    if unsaid:
        findings.note(f"of {len(unsaid)} weights the codes were not looked at, first: {unsaid[0]}")


def _compare(
    plain: Checkpoint,
    comparison: Comparison,
    reference: Checkpoint,
    tokens: Tokens | None,
    verification: Verification,
) -> None:
    """Everything beside the quantized weights against the source."""
    from outlierq.pipeline.checking.tokens import compare_tokens

    comparison.finish()
    verification.errors = comparison.errors
    if plain.packed and not comparison.errors:
        verification.note("no quantized weight has a counterpart in the source")
    compare_config(plain, comparison.expected.reference, verification)
    compare_tokens(tokens, reference, verification)


def _decode(plain: Checkpoint, name: str, unsaid: list[str]) -> tuple[torch.Tensor, QuantTensor | None]:
    """A weight as float32 numbers, and its codes where they can be told; `unsaid` gets the reason when they cannot."""
    if name in plain.linears:
        try:
            quantized = plain.quantized(name)
            return quantized.dequantize(), quantized
        except SourceError as error:
            reason = error.what
        weight = plain.read(name).float()  # raises when the layout is wrong, and not only the codes out of reach
        codes = codes_of_rows(plain, name)
        if codes is None:
            unsaid.append(reason)
        return weight, codes
    return plain.read(name).float(), None
