"""What the word-packed formats have in common, and which programs load a format: facts kept as data, with a date."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
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

EXPERTS = ", experts"  # follows the name of a client in what it says of the experts of a mixture
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
    known = {
        "merged": experts.is_merged,
        "read": experts.is_read,
        "mixed": experts.is_mixed,
        "biased": experts.is_biased,
    }
    return _lines(table()["experts"], schemes, known)


@dataclass(frozen=True)
class Mixture:
    """A model with experts, as other programs see it. architecture: its class, as config.json names it.

    is_merged: whether transformers makes the fused module of that class out of experts that are stored apart.
    is_mixed: the experts of one block have several schemes. is_biased: their linears have biases.
    """

    architecture: str
    is_merged: bool
    is_mixed: bool = False
    is_biased: bool = False

    @property
    def is_read(self) -> bool:
        """Whether any program is known to read its experts when they are packed apart."""
        return self.is_merged or any(self.architecture in classes for classes in table()["experts_apart"].values())


def cache_facts(cache: CacheScheme) -> list[str]:
    """The same for the scales of the KV cache."""
    known = {"per": cache.per, "numbers": cache.numbers}
    return [f"{name}: {_first(facts, known)}" for name, facts in table()["kv_cache"].items()]


def with_layers(lines: Sequence[str], sites: Mapping[LinearSite, QuantScheme | None]) -> list[str]:
    """The lines of clients, changed where one merges linears that have different schemes, or does not hold a width.

    sites: every linear with its scheme, None for 16 bits. Experts are left to `expert_facts`.
    """
    table_of = table()["merged"]
    stored_across = next((site for site, scheme in sites.items() if site.transposed and scheme is not None), None)
    if stored_across is not None:
        return [_without_transposed(line, stored_across) if _name(line) in table_of else line for line in lines]
    alone = {site: scheme for site, scheme in sites.items() if site.expert is None}
    said = []
    for line in lines:
        name = _name(line)
        faults = _layer_faults(table_of[name], alone) if name in table_of else []
        said.append(f"{name}: does not load it: {faults[0]}" if faults else line)
    return said


def _without_transposed(line: str, site: LinearSite) -> str:
    """A line that says "loads", changed for weights that are packed as [in, out], which the client does not read."""
    if not line.startswith(f"{_name(line)}: loads"):
        return line
    return f"{_name(line)}: does not load it: {site.module} is a {site.kind}, packed as it is stored, [in, out]"


def _name(line: str) -> str:
    """The client that a line is about."""
    return line.partition(":")[0]


def merged_layers(client: str, sites: Mapping[LinearSite, QuantScheme | None]) -> Iterator[tuple[LinearSite, ...]]:
    """The linears that a client holds as one layer, in the order of `sites`; experts are given alone, as others are.

    client: the first word of its lines, "vLLM".
    """
    groups = [
        layer for name, merged in table()["merged"].items() if name.startswith(client) for layer in merged["layers"]
    ]
    yield from map(tuple, _merged_layers(groups, sites))


def loads(format: str, client: str, schemes: Collection[QuantScheme]) -> bool:
    """Whether a version of a client is known to load these schemes together. client: the first word of its lines."""
    lines = (line.partition(": ") for line in client_facts(format, schemes))
    return any(what.startswith("loads") for name, _, what in lines if name.startswith(client))


def with_class(lines: Sequence[str], architecture: str) -> list[str]:
    """The lines of clients that say "loads", changed where a client has no such class or was not tried with it.

    architecture: the class that config.json names.
    """
    tried, known = table()["classes"]["tried"], table()["classes"]["known"]
    said = []
    for line in lines:
        name, _, what = line.partition(": ")
        if what.startswith("loads"):
            if architecture not in known.get(name.partition(" ")[0], [architecture]):
                line = f"{name}: not tried: it has no class {architecture} of its own"
            elif architecture not in tried.get(name.partition(",")[0], [architecture]):
                line = f"{line}; {architecture} was not tried"
        said.append(line)
    return said


def with_class_names(lines: Sequence[str]) -> list[str]:
    """The lines of clients, changed where one but transformers reads tensors by the names of the source."""
    said = []
    for line in lines:
        name, _, what = line.partition(": ")
        if not name.startswith("transformers") and what.startswith("loads"):
            line = f"{name}: not tried with the names of transformers' class (export.names: class)"
        said.append(line)
    return said


@dataclass(frozen=True)
class PackedFault:
    """Why transformers cannot hold packed weights of a class. is_decoded: the config asks it to decode them while it
    loads, and then it can. remedy: a setting that helps, in words.
    """

    why: str
    is_decoded: bool
    remedy: str = ""


def with_fault(lines: Sequence[str], fault: PackedFault) -> list[str]:
    """The lines of clients, that of transformers changed where its class cannot hold packed weights."""
    said = []
    for line in lines:
        name, _, what = line.partition(": ")
        if name.startswith("transformers") and not what.startswith("does not load"):
            remedy = f"; {fault.remedy}" if fault.remedy else ""
            what = f"does not load it: {fault.why}{remedy}"
            if fault.is_decoded:
                what = f"loads (dequantized at load, as its config asks: {fault.why})"
        said.append(f"{name}: {what}")
    return said


def with_experts_remedy(lines: Sequence[str], remedy: str) -> list[str]:
    """The lines about experts, that of transformers with what helps where it does not load them."""
    is_lost = [line.startswith("transformers") and ": does not load" in line and bool(remedy) for line in lines]
    return [f"{line}; {remedy}" if lost else line for line, lost in zip(lines, is_lost, strict=True)]


def as_whole(lines: Sequence[str]) -> list[str]:
    """The lines of clients without what one says of other linears where it is not known to load the experts as well."""
    parts = [line.partition(": ") for line in lines]
    lost = [name.partition(EXPERTS)[0] for name, _, what in parts if EXPERTS in name and not what.startswith("loads")]
    return [
        line
        for line, (name, _, what) in zip(lines, parts, strict=True)
        if EXPERTS in name or not what.startswith("loads") or not name.startswith(tuple(lost))
    ]


def _layer_faults(merged: Mapping[str, Any], sites: Mapping[LinearSite, QuantScheme | None]) -> list[str]:
    """Why a client that merges linears into one layer cannot load these."""
    layers = list(_merged_layers(merged["layers"], sites))
    faults = []
    for layer in layers:
        if len({sites[site] for site in layer}) > 1:
            which = ", ".join(f"{_leaf(site)} {sites[site] or '16 bits'}" for site in layer)
            faults.append(f"it merges {_named(layer)}, which must share one scheme ({which})")
    for layer in layers:
        scheme = sites[layer[0]]
        if scheme is not None and scheme.activations is None:
            faults += _width_faults(merged, layer, scheme.numbers)
        elif scheme is not None and _leaf(layer[0]) in merged.get("unpacked", {}).get(scheme.numbers, ()):
            leaf = _leaf(layer[0])
            faults.append(f"it unpacks {layer[0].module}, and cannot with quantized inputs; ignore '*.{leaf}'")
    return faults


def _merged_layers(
    groups: Sequence[Sequence[str]], sites: Mapping[LinearSite, QuantScheme | None]
) -> Iterator[list[LinearSite]]:
    """Every linear with those that a client merges it with. groups: of the names of such linears."""
    by_module = {site.module: site for site in sites}
    for module, site in by_module.items():
        parent, _, leaf = module.rpartition(".")
        group = next((group for group in groups if leaf in group), [leaf])
        layer = [by_module[name] for part in group if (name := f"{parent}.{part}" if parent else part) in by_module]
        if layer[0] is site:
            yield layer


def _width_faults(merged: Mapping[str, Any], layer: Sequence[LinearSite], numbers: str) -> list[str]:
    """Columns that fill no words, and widths of a whole layer that a client's only kernel does not take."""
    columns, rows = layer[0].in_features, sum(site.out_features for site in layer)
    word, kernel = (merged.get(key, {}).get(numbers, 1) for key in ("columns", "kernel"))
    have = f"{_named(layer)} ha{'s' if len(layer) == 1 else 've'}"
    if columns % word:
        return [f"{have} {columns} columns, no multiple of {word}, which fill a word"]
    wrong = next(((size, name) for size, name in ((columns, "columns"), (rows, "rows")) if size % kernel), None)
    return [f"{have} {wrong[0]} {wrong[1]}, no multiple of {kernel}, which its kernel takes"] if wrong else []


def _named(layer: Sequence[LinearSite]) -> str:
    """The linears of a layer in words."""
    parent = layer[0].module.rpartition(".")[0]
    return f"{' and '.join(map(_leaf, layer))} of {parent}" if len(layer) > 1 else layer[0].module


def _leaf(site: LinearSite) -> str:
    return site.module.rpartition(".")[2]


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
        "group_size": scheme.group_size,
        "block": kinds.get(block, "other"),
        "block_rows": block and block[0],
        "block_columns": block and block[1],
        "inputs": "none" if inputs is None else inputs.numbers,
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
