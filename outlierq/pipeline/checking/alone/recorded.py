"""Does config.json say what the report's recipe and rows say? The report is of the run, config.json for the clients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.report import STORED
from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint
    from outlierq.core.report import Report

CHECK = "report"


def check_recorded(
    plain: Checkpoint, config: Mapping[str, Any], names: Mapping[str, str], report: Report, findings: Findings
) -> None:
    """plain: the decoded checkpoint. names: parameter -> stored tensor."""
    lost = list(_stored_plain(plain, names, report))
    lost = [] if config.get("quant_method") is None and not plain.packed else lost
    if lost and len(lost) < len(report.rows):
        findings.fault(CHECK, lost[0], f"was quantized by the run, but is stored plain ({len(lost)} such linears)")
    said = report.settings.get("quantize") or {}
    # Linears that kept the codes of the source have inputs of their own.
    is_of_recipe = not said.get("overrides") and all(row.method != STORED for row in report.rows)
    if config.get("quant_method") == "compressed-tensors" and is_of_recipe:
        for what in _of_inputs(said.get("activations"), config):
            findings.fault(CHECK, "", what)
    cache = report.settings.get("kv_cache") or {}
    is_stored = bool(cache) and cache.get("numbers", "fp8") == "fp8"
    if is_stored != bool(config.get("kv_cache_scheme")) and config:
        findings.fault(CHECK, "", "the recipe and config.json differ in whether the KV cache is quantized")


def _stored_plain(plain: Checkpoint, names: Mapping[str, str], report: Report) -> Iterator[str]:
    """Linears of the report without codes: neither alone, nor in the tensors that hold all experts of a block."""
    stacks = [name for name, info in plain.tensors.items() if len(info.shape) == 3]
    with_codes = {name.rpartition(".")[0] for name in stacks if name in plain.packed}
    with_codes -= {name.rpartition(".")[0] for name in stacks if name not in plain.packed}
    for row in report.rows:
        name = f"{row.site}.weight"
        if names.get(name, name) not in plain.packed and re.sub(r"\.\d+\.[^.]+$", "", row.site) not in with_codes:
            yield row.site


def _of_inputs(recipe: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Iterator[str]:
    """How inputs are rounded, in every config group."""
    for group in (config.get("config_groups") or {}).values():
        said = (group or {}).get("input_activations")
        if bool(said) != bool(recipe):
            yield f"the recipe quantizes {'inputs' if recipe else 'no inputs'}, but config.json says otherwise"
        elif said and recipe:
            pairs = {"num_bits": "bits", "type": "kind", "dynamic": "dynamic", "strategy": "per"}
            if said.get("strategy") == "tensor_group":  # a unit from calibration, and scales of groups at run time
                said = {**said, "strategy": "group", "dynamic": False}
            for key, own in pairs.items():
                if key in said and said[key] != recipe.get(own):
                    yield f"config.json says of inputs {key} {said[key]}, the recipe {recipe.get(own)}"
