"""Do routers choose, and among as many experts as there are?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.model import EXPERT_COUNTS, TOP_K
from outlierq.load.model.experts.fused import router_names
from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint


def check_mixtures(plain: Checkpoint, skeleton: Any, names: Mapping[str, str], findings: Findings) -> None:
    """skeleton, names: the model class, and where its parameters are."""
    for router in sorted(router_names(skeleton)):
        name = names.get(f"{router}.weight", "")
        if name in plain.tensors and name not in plain.packed and not bool(plain.read(name).any()):
            findings.fault("numbers", name, "is a router of zeros: every token gets the same experts")
    for part in _parts(plain.config):
        _check_choice(part, findings)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config and every config in it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _check_choice(config: Mapping[str, Any], findings: Findings) -> None:
    """No token can get more experts than there are."""
    numbers = {key: value for key, value in config.items() if isinstance(value, int)}
    chosen = next((key for key in TOP_K if key in numbers), None)
    count = next((key for key in EXPERT_COUNTS if numbers.get(key)), None)
    if chosen and count and numbers[chosen] > numbers[count]:
        what = f"{chosen} is {numbers[chosen]}, but {count} only {numbers[count]}"
        findings.fault("config", "", what)
