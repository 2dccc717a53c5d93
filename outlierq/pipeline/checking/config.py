"""Does config.json describe the source's model? Compared as transformers understands both, key by key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import brief
from outlierq.core.model import HARMLESS_KEYS
from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint, Frame

CHECK = "config"
# Keys of GGUF metadata that tell the types of the weights.
OF_TYPES = ("general.file_type", "general.quantization_version")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def compare_config(checkpoint: Checkpoint, expected: Checkpoint, findings: Findings) -> None:
    """Every key that changes the function: rotary settings, eps, activation, heads, positions, token ids, ..."""
    from outlierq.load import skeleton_config

    if checkpoint.frame is not None and expected.frame is not None and checkpoint.studied() is not None:
        _compare_frames(checkpoint.frame, expected.frame, findings)
        return
    try:
        ours, theirs = (dict(_leaves(skeleton_config(each).to_dict())) for each in (checkpoint, expected))
    except SourceError as error:
        findings.note(f"config.json was not compared: {error.what}")
        return
    for path in sorted(ours.keys() | theirs.keys()):
        key = path.rpartition(".")[2]
        one, other = ours.get(path), theirs.get(path)
        if HARMLESS_KEYS.fullmatch(key) or _equal(one, other):
            continue
        if checkpoint.kind == "gguf" and (key in TOKENS or one is None or other is None):
            continue  # its metadata has no place for some of them
        if (
            key == "tie_word_embeddings"
            and other
            and any(name.endswith("lm_head.weight") for name in checkpoint.tensors)
        ):
            continue  # a rotation unties the head; what is stored of it is compared as a tensor
        findings.fault(CHECK, "", f"{path} is {brief(one, 60)}, in the source {brief(other, 60)}")
    named, meant = checkpoint.config.get("architectures"), expected.config.get("architectures")
    if checkpoint.kind == expected.kind and meant and named != meant:
        findings.fault(CHECK, "", f"architectures is {brief(named, 60)}, in the source {brief(meant, 60)}")
    if checkpoint.kind == expected.kind:
        _compare_generation(checkpoint, expected, findings)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no object, by its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not HARMLESS_KEYS.fullmatch(str(key)):
                yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _compare_frames(frame: Frame, source: Frame, findings: Findings) -> None:
    """Every key of the metadata but those that tell the types of the weights, and the shape of every tensor."""
    for key in sorted(frame.keys.keys() | source.keys.keys()):
        if key not in OF_TYPES and frame.keys.get(key) != source.keys.get(key):
            findings.fault(CHECK, "", f"the metadata {key} is not that of the source")
    for tensor in frame.tensors:
        meant = source.by_name.get(tensor.name)
        if meant is not None and meant.shape != tensor.shape:
            findings.fault(CHECK, tensor.name, f"has shape {list(tensor.shape)}, in the source {list(meant.shape)}")


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same number, or the same otherwise. Metadata of GGUF holds float32."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)]
    if all(numbers):
        return one == other or math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _compare_generation(checkpoint: Checkpoint, expected: Checkpoint, findings: Findings) -> None:
    """generation_config.json: where a text ends, and how tokens are drawn."""
    name = "generation_config.json"
    ours, theirs = (_file(each, name) for each in (checkpoint, expected))
    if theirs is None or ours == theirs:
        return
    if ours is None:
        findings.fault(CHECK, name, "is in the source, but not here")
        return
    for key in sorted(ours.keys() | theirs.keys()):
        if not HARMLESS_KEYS.fullmatch(key) and ours.get(key) != theirs.get(key):
            what = f"{key} is {brief(ours.get(key), 60)}, in the source {brief(theirs.get(key), 60)}"
            findings.fault(CHECK, name, what)


def _file(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """A JSON file of the checkpoint; None when it is not there or no object."""
    file = next((each for each in checkpoint.files if each.name == name), None)
    try:
        value = None if file is None else json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
