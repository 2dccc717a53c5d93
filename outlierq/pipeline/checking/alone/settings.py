"""Numbers in config.json and generation_config.json that no model was ever trained or sampled with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.machine.untrusted import brief
from outlierq.core.model import EXPERT_COUNTS, TOP_K
from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

CHECK = "config"
# Largest known eps of a language model's norm: 1e-5 mostly, 1e-3 at most.
EPS = re.compile(r".*(norm|ln|layer).*_eps(ilon)?|.*\.eps(ilon)?|eps(ilon)?")
RANGES: dict[str, tuple[float, float]] = {
    "rope_theta": (100.0, 1e12),
    "partial_rotary_factor": (0.0, 1.0),
    "temperature": (0.0, 2.5),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.2, 5.0),
}
EPS_RANGE = (1e-14, 2e-3)


def check_settings(checkpoint: Checkpoint, findings: Findings) -> None:
    """Each number beside the range of its kind; several at once where the config has parts."""
    for file, config in (
        ("", checkpoint.config),
        ("generation_config.json", file_of(checkpoint, "generation_config.json")),
    ):
        for numbers in _numbers(config or {}):
            _check_choice(numbers, file, findings)
            for key, value in numbers.items():
                least, most = EPS_RANGE if EPS.fullmatch(key) else RANGES.get(key, (value, value))
                if not least <= value <= most:
                    findings.fault(CHECK, file, f"{key} is {brief(value, 40)}; known models have {least:g} to {most:g}")


def _check_choice(numbers: Mapping[str, float], file: str, findings: Findings) -> None:
    """No token can get more experts than there are."""
    chosen = next((key for key in TOP_K if key in numbers), None)
    count = next((key for key in EXPERT_COUNTS if numbers.get(key)), None)
    if chosen and count and numbers[chosen] > numbers[count]:
        findings.fault(CHECK, file, f"{chosen} is {numbers[chosen]}, but {count} only {numbers[count]}")


def file_of(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """A JSON file of the checkpoint; None when it is not there or no object. A GGUF file has none of its own."""
    if checkpoint.kind == "gguf":
        return None
    found = next((file for file in checkpoint.files if file.name == name), None)
    try:
        value = None if found is None else json.loads(found.read())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _numbers(config: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """The numbers of a config by their keys, then those of every config in it, but for what is said of quantization."""
    yield {
        str(key): value
        for key, value in config.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "quantization_config":
            yield from _numbers(value)
