"""`outlierq verify`: is a checkpoint whole, consistent with its config, and what its source became?

Every fault is collected, none stops the others. Weights are decoded one at a time by the decoders in `load/`, which
share no code with our exporters, so the check is the same for a checkpoint of ours and of another program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.report import Shown
from outlierq.load.packed.described import fits
from outlierq.pipeline.asked.events import Event, Listener, silent

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.core.quant_tensor import QuantTensor

# Zero points follow the mean code of their group: correlation 0.92 and more in every linear of SmolLM2-135M as
# GPTQModel and llm-compressor write it, about 0 when the zero points are those of other groups.
LEAST_CORRELATION = 0.6
# Median distance of mean code and zero point: 0.03 and less there.
USUAL_SHIFT = 0.5
# Too few groups, or zero points that are nearly all alike, say nothing.
FEWEST_GROUPS, LEAST_SPREAD = 16, 0.3
# Mean difference of a group from its source in steps of its scale: up to 1.19 in those checkpoints. A zero point that
# is wrong by 2 gives 2.
LARGEST_SHIFT = 1.6
# Relative error from which a weight is not a rounded form of its source (rounding to 2 bits gives about 0.5).
FOREIGN = 0.8


@dataclass(frozen=True)
class Fault:
    """Something that is wrong. check: which check found it. tensor: where, "" for the checkpoint as a whole."""

    check: str
    tensor: str
    what: str


@dataclass
class Verification(Shown):
    """What was found. errors: relative error of each quantized weight against the source, after scales per row and
    column that a fold may have moved. notes: what could not be checked, and why.
    """

    source: str
    original: str | None
    quantization: str | None = None
    tensors: int = 0
    linears: int = 0
    faults: list[Fault] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether no fault was found."""
        return not self.faults

    def fault(self, check: str, tensor: str, what: str) -> None:
        """Add a fault."""
        self.faults.append(Fault(check, tensor, what))

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {"sound": self.sound, **asdict(self)}


def verify(
    source: str, original: str | None = None, *, trust_remote_code: bool = False, listen: Listener = silent
) -> Verification:
    """Check the checkpoint at `source`, and hold it against the one it was made from when `original` is given."""
    from outlierq.load import open_checkpoint

    found = Verification(source, original)
    reference = None if original is None else _reference(original, trust_remote_code)
    try:
        checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    except SourceError as error:
        found.fault("files", "", error.what)
        return found
    config = checkpoint.config.get("quantization_config") or {}
    found.quantization = config.get("quant_method") or ("gguf" if checkpoint.kind == "gguf" else None)
    found.tensors = len(checkpoint.tensors)
    plain = _decoded(checkpoint, found)
    _check_numbers(checkpoint, found)
    if plain is not None:
        found.linears = len(plain.packed)
        _check_places(plain, config, found)
        _check_weights(plain, reference, config, found, listen)
        if reference is not None:
            _compare_plain(plain, reference, found)
    return found


def _reference(original: str, trust_remote_code: bool) -> Checkpoint:
    """The checkpoint to compare with; SourceError when it cannot be read, which is no fault of the other."""
    from outlierq.load import open_checkpoint, unpacked

    return unpacked(open_checkpoint(original, trust_remote_code=trust_remote_code))


def _decoded(checkpoint: Checkpoint, found: Verification) -> Checkpoint | None:
    """The checkpoint with its packed weights decoded on demand; None when its layout contradicts its config."""
    from outlierq.load import unpacked

    try:
        return unpacked(checkpoint)
    except SourceError as error:
        found.fault("layout", "", error.what)
        return None


def _check_places(plain: Checkpoint, config: Mapping[str, Any], found: Verification) -> None:
    """Every parameter of the model has its tensor, every tensor its place, and config.json tells them right."""
    from outlierq.load import build_skeleton, checkpoint_names, misplaced

    try:
        skeleton = build_skeleton(plain)
        names = checkpoint_names(plain, skeleton)
    except SourceError as error:
        found.fault("tensors", "", error.what)
        return
    for each in misplaced(plain, skeleton, names):
        found.fault(each.check, each.tensor, each.what)
    if config:
        _check_config(plain, skeleton, config, names, found)


def _check_config(
    plain: Checkpoint,
    skeleton: torch.nn.Module,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    found: Verification,
) -> None:
    """What config.json says of each linear is what is stored: packed or plain, with zero points or without."""
    import torch

    packed = plain.packed
    for module, part in skeleton.named_modules():
        tensor = names.get(f"{module}.weight")
        if not isinstance(part, torch.nn.Linear) or tensor is None:
            continue
        stem = tensor.removesuffix(".weight")
        wanted = _is_target(config, module) and not (_kept(config, module) or _kept(config, stem))
        if wanted and tensor not in packed and stem == module:
            found.fault("config", tensor, "is stored plain, but config.json does not say so")
        elif not wanted and tensor in packed:
            found.fault("config", tensor, "is stored quantized, but config.json says that it is not")
    for name, linear in plain.linears.items():
        if linear.symmetric and "weight_zero_point" in linear.members:
            found.fault("config", name, "has stored zero points, but config.json says that it is symmetric")


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether a linear layer is meant to be quantized before exceptions are looked at."""
    if config.get("quant_method") == "compressed-tensors":
        targets = [t for group in (config.get("config_groups") or {}).values() for t in group.get("targets", [])]
        return any(
            fits(t.removeprefix("re:"), module) if t.startswith("re:") else t in ("Linear", module) for t in targets
        )
    if config.get("quant_method") in ("gptq", "awq"):
        # Both mean the linears of the blocks; blocks are numbered.
        inside = any(piece.isdigit() for piece in module.split("."))
        return inside or bool(config.get("lm_head"))
    return True


def _kept(config: Mapping[str, Any], module: str) -> bool:
    """Whether the quantization config names a module as one that is not quantized."""
    method = config.get("quant_method")
    if method == "compressed-tensors":
        entries = config.get("ignore") or []
        return any(fits(e.removeprefix("re:"), module) if e.startswith("re:") else e == module for e in entries)
    if method == "gptq":
        negative = [key.removeprefix("-:") for key in config.get("dynamic") or {} if key.startswith("-:")]
        return any(fits(pattern, module) for pattern in negative)
    skipped = config.get("modules_to_not_convert") or config.get("llm_int8_skip_modules") or []
    return any(entry in module for entry in skipped)


def _check_numbers(checkpoint: Checkpoint, found: Verification) -> None:
    """Every stored float (weights in 16 bits, scales) is finite."""
    from outlierq.export.writer import all_finite

    for name, info in checkpoint.tensors.items():
        if not info.dtype.startswith(("F", "BF")) or info.dtype == "F8_E8M0":
            continue
        try:
            tensor = checkpoint.read(name)
        except SourceError as error:
            found.fault("files", name, error.what)
            continue
        if not all_finite(tensor):
            count = int((~tensor.float().isfinite()).sum())
            found.fault("numbers", name, f"holds {count} of {tensor.numel()} values that are NaN or infinite")


def _check_weights(
    plain: Checkpoint, reference: Checkpoint | None, config: Mapping[str, Any], found: Verification, listen: Listener
) -> None:
    """Decode every quantized weight, look at its zero points, and hold it against the source."""
    packed = plain.packed
    shifted: dict[str, str] = {}
    unsaid: list[str] = []
    for number, name in enumerate(packed):
        listen(Event("verify", number, len(packed), name))
        try:
            weight, quantized = _decode(plain, name, unsaid)
        except SourceError as error:
            found.fault("layout", name, error.what)
            continue
        if not bool(weight.isfinite().all()):
            continue  # said by `_check_numbers`, which names the stored tensor
        if quantized is not None:
            _check_zero_points(name, quantized, config, found)
        if reference is not None and name in reference.tensors:
            _compare_weight(name, weight, quantized, reference, found, shifted)
    if unsaid:
        found.notes.append(f"of {len(unsaid)} weights the codes were not looked at, first: {unsaid[0]}")
    if reference is not None and packed:
        _judge_errors(shifted, found)


def _decode(plain: Checkpoint, name: str, unsaid: list[str]) -> tuple[torch.Tensor, QuantTensor | None]:
    """A weight as float32 numbers, and its codes where they can be told; `unsaid` gets the reason when they cannot."""
    if name in plain.linears:
        try:
            quantized = plain.quantized(name)
            return quantized.dequantize(), quantized
        except SourceError as error:
            reason = error.what
        weight = plain.read(name).float()  # raises when the layout is wrong, and not only the codes out of reach
        unsaid.append(reason)
        return weight, None
    return plain.read(name).float(), None


def _check_zero_points(name: str, quantized: QuantTensor, config: Mapping[str, Any], found: Verification) -> None:
    """A zero point is the code of the weight 0, so it goes up and down with the mean code of its group."""
    import torch

    if quantized.zero_point is None:
        return
    if config.get("sym") is True:
        middle = 1 << (quantized.scheme.bits - 1)
        found.fault("config", name, f"has zero points other than {middle}, but config.json says that it is symmetric")
        return
    rows, groups = quantized.zero_point.shape
    zero = quantized.zero_point.float().flatten()
    if zero.numel() < FEWEST_GROUPS or zero.std() < LEAST_SPREAD:
        return
    mean = quantized.codes.float().view(rows, groups, -1).mean(-1).flatten()
    correlation = torch.corrcoef(torch.stack([mean, zero]))[0, 1].item()
    if not correlation >= LEAST_CORRELATION:
        found.fault(
            "zero points", name, f"its zero points do not follow the mean codes of their groups (r = {correlation:.2f})"
        )
        return
    beside = mean - zero
    noise = beside.std() / beside.numel() ** 0.5
    if beside.median().abs() > USUAL_SHIFT + 3 * noise:
        how = f"its zero points lie {beside.median():+.2f} from the mean codes, so all are wrong by about one"
        found.fault("zero points", name, f"{how} (GPTQ's versions differ by one)")


def _compare_weight(
    name: str,
    weight: torch.Tensor,
    quantized: QuantTensor | None,
    reference: Checkpoint,
    found: Verification,
    shifted: dict[str, str],
) -> None:
    """The error of one weight, and groups that lie beside their source by whole steps."""
    original = reference.read(name).float()
    if original.shape != weight.shape:
        found.fault("source", name, f"is {list(weight.shape)}, in the source {list(original.shape)}")
        return
    fitted = _fitted(weight, original)
    found.errors[name] = ((weight - fitted).norm() / fitted.norm().clamp(min=1e-30)).item()
    if quantized is None or quantized.zero_point is None:
        return
    rows, groups = quantized.zero_point.shape
    shift = (weight - fitted).view(rows, groups, -1).mean(-1) / quantized.scale.float()
    far = shift.abs() > LARGEST_SHIFT
    if bool(far.any()):
        row, group = (int(i) for i in far.nonzero()[0])
        shifted[name] = (
            f"{int(far.sum())} of {far.numel()} groups lie beside their source by whole steps, first row {row} group "
            f"{group} by {shift[row, group]:.1f} (a wrong zero point does that)"
        )


def _fitted(weight: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The original with the scale per column, then per row, that brings it nearest to `weight`.

    A fold (AWQ, SmoothQuant) multiplies columns; the producer that takes it off, its rows.
    """
    tiny = 1e-30
    fitted = original * ((weight * original).sum(0) / (original * original).sum(0).clamp(min=tiny))
    rows = (weight * fitted).sum(1) / (fitted * fitted).sum(1).clamp(min=tiny)
    return fitted * rows[:, None]


def _judge_errors(shifted: Mapping[str, str], found: Verification) -> None:
    """Judge the weights against each other: one that is foreign among others that are not is a fault."""
    if not found.errors:
        found.notes.append("no quantized weight has a counterpart in the source")
        return
    usual = median(found.errors.values())
    if usual > FOREIGN:
        found.notes.append(
            f"the weights are not those of the source with other scales (median error {usual:.2f}): rotated, or of "
            "another model; they were not judged"
        )
        return
    for name, error in found.errors.items():
        if error > FOREIGN:
            found.fault("source", name, f"is not a rounded form of its source: relative error {error:.2f}")
        elif name in shifted:
            found.fault("zero points", name, shifted[name])


def _compare_plain(plain: Checkpoint, reference: Checkpoint, found: Verification) -> None:
    """Tensors that were not quantized: missing ones are faults, changed ones (folded norms) are noted."""
    import torch

    packed, changed = plain.packed, []
    for name in reference.tensors:
        if name in packed:
            continue
        if name not in plain.tensors:
            if not (plain.config.get("tie_word_embeddings") and name.endswith("lm_head.weight")):
                found.fault("source", name, "is in the source, but not here")
            continue
        one, other = plain.read(name), reference.read(name)
        if one.shape != other.shape:
            found.fault("source", name, f"is {list(one.shape)}, in the source {list(other.shape)}")
        elif not torch.equal(one.to(other.dtype), other):
            changed.append(name)
    if changed:
        found.notes.append(f"{len(changed)} unquantized tensors differ from the source, first {changed[0]}")
