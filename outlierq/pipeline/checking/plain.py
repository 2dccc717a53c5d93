"""Are the tensors that were not quantized what they must be? By themselves, and bit for bit what they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import brief
from outlierq.pipeline.checking.finding import Findings, listed

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.pipeline.checking.source.expected import Expected

CHECK = "source"
# Largest difference of a tensor that was computed again, beside its largest value: a step of its dtype, and some.
COMPUTED = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 1e-4}
# Of a bias that a fold moved: beside its own value, since the scale is told from rounded weights (6 % in 3 bits), and
# beside the largest.
MOVED, MOVED_BESIDE = 0.25, 0.02


def check_plain(plain: Checkpoint, skeleton: Any, names: Mapping[str, str], findings: Findings) -> None:
    """Each tensor by itself: floats where the class has floats, gains that let something through."""
    slots = skeleton.state_dict(keep_vars=True)
    for slot, name in names.items():
        if name in plain.packed or name not in plain.tensors:
            continue
        dtype = plain.tensors[name].dtype
        if slots[slot].is_floating_point() and not dtype.startswith(("F", "BF")):
            findings.fault("tensors", name, f"is stored as {dtype}; the model has floating-point numbers there")
        elif len(plain.tensors[name].shape) == 1 and slot.endswith(".weight") and is_norm(slot):
            _check_gain(plain, skeleton, slot, name, findings)


def is_norm(slot: str) -> bool:
    """Whether a parameter is the gain of a norm, by its name."""
    module = slot.removesuffix(".weight").rpartition(".")[2].lower()
    return "norm" in module or module.startswith("ln")


def _check_gain(plain: Checkpoint, skeleton: Any, slot: str, name: str, findings: Findings) -> None:
    """A norm that lets nothing through, or turns every channel round."""
    gain = plain.read(name).float() + offset_of(skeleton.get_submodule(slot.removesuffix(".weight")))
    if not bool(gain.any()):
        findings.fault("numbers", name, "is the gain of a norm, and 0 in every channel")
    elif bool((gain <= 0).all()):
        findings.fault("numbers", name, "is the gain of a norm, and negative in every channel")


def offset_of(norm: torch.nn.Module) -> float:
    """1 for a class whose gain is 1 + weight, which begins with weights of 0; else 0."""
    try:
        fresh = type(norm)(4)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return 0.0
    weight = getattr(fresh, "weight", None)
    return 1.0 if weight is not None and not bool(weight.any()) else 0.0


def compare_plain(
    plain: Checkpoint,
    expected: Expected,
    findings: Findings,
    *,
    computed: frozenset[str],
    rounded: frozenset[str],
    tuned: Mapping[str, float],
) -> list[str]:
    """Every tensor that was not quantized against what it came from; gives the names of those that differ.

    computed: were rewritten, so that their last bits may depend on the machine. rounded: were quantized and are stored
    dense, which is judged elsewhere. What a fold moved is computed, too. tuned: how far the numbers of a tensor went
    when it was tuned afterwards.
    """
    reference, differing = expected.reference, []
    for name in reference.tensors:
        if name in plain.packed or name in rounded:
            continue
        if name not in plain.tensors:
            if not (plain.config.get("tie_word_embeddings") and name.endswith("lm_head.weight")):
                findings.fault(CHECK, name, "is in the source, but not here")
            continue
        try:
            what = _difference(plain, expected, name, name in computed, tuned.get(name, 0.0))
        except SourceError as error:
            findings.fault(CHECK, name, error.what)
            continue
        if what:
            differing.append(name)
            findings.fault(CHECK, name, what)
    added = [name for name in plain.tensors if name not in reference.tensors and name not in plain.packed]
    if added:
        findings.fault(CHECK, added[0], f"is not in the source ({len(added)} such tensors: {listed(added)})")
    return differing


def _difference(plain: Checkpoint, expected: Expected, name: str, is_rewritten: bool, tuned: float) -> str | None:
    """How a tensor differs from what it must be, or from there by more than `tuned`; None when it does not."""
    import torch

    is_computed = is_rewritten or expected.is_moved(name)

    one, other = plain.read(name), expected.read(name)
    if one.shape != other.shape:
        return f"is {list(one.shape)}, in the source {list(other.shape)}"
    if torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one):
        return None
    apart = (one.float() - other.float()).abs()
    largest = other.float().abs().max().clamp(min=1e-30)
    allowed = COMPUTED.get(str(one.dtype).removeprefix("torch."), 0.0) * largest if is_computed else 0.0 * largest
    if expected.is_moved(name):
        allowed = (MOVED * other.float().abs() + MOVED_BESIDE * largest).clamp(min=allowed.item())
    wrong = apart > allowed + tuned
    if (is_computed or tuned) and not bool(wrong.any()):
        return None
    share = int(wrong.sum())
    meant = "what the recipe makes of the source" if is_computed else "the source, though nothing changed it"
    meant = f"{meant} but by {tuned:.4g} in tuning" if tuned else meant
    return (
        f"differs from {meant}: {share} of {apart.numel()} values, the farthest by {apart.max():.4g} "
        f"({apart.max() / largest:.2g} of the largest)"
    )


def shown(value: Any) -> str:
    """A value of a config, short."""
    return brief(value, 60)
