"""What the word-packed formats have in common, and which programs load a format: facts kept as data, with a date."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutputError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme

if TYPE_CHECKING:
    import torch

Fact = Mapping[str, Any]

KERNEL_BLOCK = (128, 128)  # the only block that vLLM's kernels know


@cache
def table() -> dict[str, Any]:
    """The content of data/clients.json: per format and client version a list of facts, the first that fits counts.

    A fact says `what` the client does `when` the named properties of a scheme (`_properties`, and those of all schemes
    together in `_lines`) have one of the listed values.
    """
    known: dict[str, Any] = json.loads((resources.files("outlierq") / "data" / "clients.json").read_text("utf-8"))
    return known


def client_facts(format: str, schemes: Collection[QuantScheme]) -> list[str]:
    """One line per client: what it does with these schemes in the format, "not tried" where the table says nothing."""
    facts = table()["formats"].get(format)
    return [f"no client was tried with {format}"] if facts is None else _lines(facts, schemes)


def expert_facts(schemes: Collection[QuantScheme | None], experts: Mixture) -> list[str]:
    """The same for the experts of a mixture in compressed-tensors. schemes: of all their linears, None for 16 bits."""
    return _lines(table()["experts"], schemes, {"merged": experts.is_merged, "read": experts.is_read})


@dataclass(frozen=True)
class Mixture:
    """A model with experts, as other programs see it. architecture: its class, as config.json names it.

    is_merged: whether transformers makes the fused module of that class out of experts that are stored apart.
    """

    architecture: str
    is_merged: bool

    @property
    def is_read(self) -> bool:
        """Whether any program is known to read its experts when they are packed apart."""
        return self.is_merged or any(self.architecture in classes for classes in table()["experts_apart"].values())


def cache_facts(cache: CacheScheme) -> list[str]:
    """The same for the scales of the KV cache."""
    known = {"per": cache.per}
    return [f"{name}: {_first(facts, known)}" for name, facts in table()["kv_cache"].items()]


def with_layers(lines: Sequence[str], sites: Mapping[LinearSite, QuantScheme | None]) -> list[str]:
    """The lines of clients, changed where one merges linears that have different schemes, or does not hold a width.

    sites: every linear with its scheme, None for 16 bits. Experts are left to `expert_facts`.
    """
    table_of = table()["merged"]
    alone = {site: scheme for site, scheme in sites.items() if site.expert is None}
    said = []
    for line in lines:
        name = line.partition(":")[0]
        faults = _layer_faults(table_of[name], alone) if name in table_of else []
        said.append(f"{name}: does not load it: {faults[0]}" if faults else line)
    return said


def with_fault(lines: Sequence[str], why: str, decoded: bool) -> list[str]:
    """The lines of clients, that of transformers changed where its class cannot hold packed weights.

    decoded: the config asks it to decode them while it loads, and then it can.
    """
    said = []
    for line in lines:
        name, _, what = line.partition(": ")
        if name.startswith("transformers") and not what.startswith("does not load"):
            what = f"loads (dequantized at load, as its config asks: {why})" if decoded else f"does not load it: {why}"
        said.append(f"{name}: {what}")
    return said


def _layer_faults(merged: Mapping[str, Any], sites: Mapping[LinearSite, QuantScheme | None]) -> list[str]:
    """Why a client that merges linears into one layer cannot load these."""
    by_module = {site.module: scheme for site, scheme in sites.items()}
    faults = []
    for module in by_module:
        parent, _, leaf = module.rpartition(".")
        together = next((group for group in merged["layers"] if group[0] == leaf), None)
        members = {part: by_module[f"{parent}.{part}"] for part in together or () if f"{parent}.{part}" in by_module}
        if len(set(members.values())) > 1:
            which = ", ".join(f"{part} {scheme or '16 bits'}" for part, scheme in members.items())
            faults.append(f"it merges {' and '.join(members)} of {parent}, which must share one scheme ({which})")
    for site, scheme in sites.items():
        if scheme is None or scheme.numbers not in merged["columns"] or scheme.activations is not None:
            continue
        columns = merged["columns"][scheme.numbers]
        if site.in_features % columns:
            faults.append(f"{site.module} has {site.in_features} columns, no multiple of {columns}, which fill a word")
    return faults


def _lines(
    clients: Mapping[str, Sequence[Fact]],
    schemes: Collection[QuantScheme | None],
    known: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """One line per client with what it does with each scheme, without repetition; "loads" only where that is all.

    known: what else a fact may ask of.
    """
    quantized = [scheme for scheme in schemes if scheme is not None]
    together = {
        **known,
        "count": len(schemes),
        "several": len(schemes) > 1,
        "some_asymmetric": any(not scheme.symmetric for scheme in quantized),
    }
    lines = []
    for name, facts in clients.items():
        said = {}
        for scheme in sorted(quantized, key=str):
            said[_first(facts, together | _properties(scheme)) or f"{scheme}: not tried"] = True
        notable = [what for what in said if what != "loads"]
        if not quantized:  # only the cache is quantized, or nothing
            notable = [_first(facts, together) or "loads"]
        lines.append(f"{name}: {'; '.join(notable) or 'loads'}")
    return lines


def _first(facts: Sequence[Fact], known: Mapping[str, Any]) -> str | None:
    """What the first fact says whose conditions all hold, None when there is none."""
    for fact in facts:
        conditions = fact.get("when", {}).items()
        if all(known.get(key) in (value if isinstance(value, list) else [value]) for key, value in conditions):
            return str(fact["what"]).format_map(known)
    return None


def _properties(scheme: QuantScheme) -> dict[str, Any]:
    """What a fact may ask of a scheme."""
    inputs, block = scheme.activations, scheme.block
    kinds = {None: "none", KERNEL_BLOCK: "128 x 128"}
    return {
        "kind": scheme.kind,
        "numbers": scheme.numbers,
        "bits": scheme.bits,
        "symmetric": scheme.symmetric,
        "per_channel": scheme.group_size is None,
        "block": kinds.get(block, "other"),
        "block_rows": block and block[0],
        "block_columns": block and block[1],
        "inputs": "none" if inputs is None else "fp8" if inputs.kind == "float" else f"int{inputs.bits}",
        "dynamic": inputs and inputs.dynamic,
    }


def one_scheme(format: str, values: Collection[object], key: str) -> str | None:
    """Why a format whose config says `key` once for the whole model cannot hold these `values` of it, or None."""
    if len(values) < 2:
        return None
    shown = ", ".join(sorted("channel" if value is None else str(value) for value in values))
    return f"{format} has one {key} for the whole model, and this plan has {shown}"


def byte_codes(site: LinearSite, quantized: QuantTensor) -> torch.Tensor:
    """Codes [out, in] of one byte: int8 where symmetric, uint8 with zero points, E4M3 of floats.

    OutputError when the weight has outlier columns, for which a format has no place.
    """
    import torch

    if quantized.outlier_columns is not None:
        raise OutputError(f"{site.module}: this format has no place for outlier columns")
    if quantized.scheme.kind == "float":
        return quantized.codes
    return quantized.codes.to(torch.int8 if quantized.scheme.symmetric else torch.uint8)


def unsigned_zero_points(quantized: QuantTensor) -> torch.Tensor:
    """Uint8 [out, groups]: those of a symmetric weight, whose codes are stored plus 2^(bits - 1), are 2^(bits - 1)."""
    import torch

    if quantized.zero_point is not None:
        return quantized.zero_point.to(torch.uint8)
    return torch.full_like(quantized.scale, 1 << (quantized.scheme.bits - 1), dtype=torch.uint8)
