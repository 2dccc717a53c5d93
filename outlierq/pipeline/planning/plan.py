"""What a run will do, from headers alone: what each tensor becomes and why, the exact size, memory and time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from outlierq.core.model import Checkpoint, LinearSite, Structure, StudiedModel
from outlierq.core.notes import counted_together
from outlierq.core.report import REPORT_NAME, Shown
from outlierq.core.scheme import QuantScheme
from outlierq.core.windows import limit_of
from outlierq.export import Format, format_type
from outlierq.export.clients import (
    PackedFault,
    as_whole,
    cache_facts,
    with_class,
    with_class_names,
    with_experts_remedy,
    with_fault,
    with_layers,
)
from outlierq.export.declared import stacks
from outlierq.export.layout import DTYPE_BYTES, INDEX_NAME, Layout
from outlierq.pipeline.planning.mixture import architecture, mixture
from outlierq.pipeline.planning.share import quantized_share, share_note
from outlierq.pipeline.remodel.rewrite import original_of, rewrite_notes, source_notes
from outlierq.recipe import Recipe
from outlierq.recipe.patterns import EXPRESSION, HEAD, matches, names_all

OUTSIDE = "outside"
EXTRA_KEPT = "kept as stored: the model class has no such part, so nothing is known of its inputs"
# The tensor of all experts of a block in a GGUF file.
EXPERTS = re.compile(r"_exps\.")
# Names of files that a note lists.
SHOWN = 12


@dataclass(frozen=True)
class SitePlan:
    """What one linear becomes. scheme None: kept as it is. reason: why it is kept, or why its scheme was adjusted.
    is_taken_over: the codes and scales of the source stay as they are.
    """

    site: LinearSite
    scheme: QuantScheme | None
    reason: str = ""
    is_taken_over: bool = False


@dataclass(frozen=True)
class CachePlan:
    """The scales of one block's KV cache. prefix: the attention module as the checkpoint spells it. shape: of each."""

    prefix: str
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, str]:
        """Tensor names of the scales of keys and values."""
        return f"{self.prefix}.k_scale", f"{self.prefix}.v_scale"


@dataclass(frozen=True)
class PlanRow:
    """One line of a plan: sites that are treated alike. bytes: of their weights, as stored before and after."""

    sites: str
    count: int
    treatment: str
    source_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Estimate:
    """peak_bytes: resident memory, an upper bound. seconds: wall time, within a factor of two; None: unknown.

    waiting: how many times longer that is than on the same machine with nothing else to do.
    """

    peak_bytes: int
    seconds: float | None
    waiting: float = 1.0

    @property
    def alone(self) -> float | None:
        """Seconds on this machine with nothing else to do."""
        return self.seconds and self.seconds / self.waiting


@dataclass(frozen=True)
class Plan(Shown):
    """Everything that is decided before work starts.

    model: what is compressed, as the recipe's rewrites leave it. small_files: everything but weights, by name, without
    the report. caches: by block index, for blocks whose KV cache gets scales. together: linears of experts of which
    none is quantized, so that they stay in the tensor that the source has for all of them; they are no sites.
    expected: what the run will cost, and savings: what is done to stay below a ceiling of memory, both None where
    nobody asked. load_fault: why transformers cannot hold packed weights of this class, and what helps. experts_remedy:
    a setting with which it loads the model, where it does not load experts that are packed apart. decided: what a
    calibration before the plan has decided, in words. alike: for the index of a block an earlier result that has it as
    it would become here, from the same statistics.
    """

    model: StudiedModel
    recipe: Recipe
    sites: tuple[SitePlan, ...]
    layout: Layout
    small_files: Mapping[str, bytes | Path]
    caches: Mapping[int, CachePlan] = field(default_factory=dict)
    together: tuple[SitePlan, ...] = ()
    expected: Estimate | None = None
    savings: tuple[str, ...] | None = None
    load_fault: PackedFault | None = None
    experts_remedy: str = ""
    decided: tuple[str, ...] = ()
    alike: Mapping[int, Path] = field(default_factory=dict)

    @cached_property
    def format(self) -> Format:
        """The format of the output, made for this model."""
        return format_type(self.recipe.export.format).of(self.checkpoint)

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that is compressed."""
        return self.model.checkpoint

    @property
    def in_own_names(self) -> bool:
        """Whether tensors have the names of a GGUF file, whose frame the result gets."""
        frame = self.checkpoint.frame
        return frame is not None and frame.own_names

    @property
    def structure(self) -> Structure:
        """Blocks, linears and other tensors of the model."""
        return self.model.structure

    @cached_property
    def schemes(self) -> dict[LinearSite, QuantScheme]:
        """The scheme of every linear that is quantized."""
        return {p.site: p.scheme for p in self.sites if p.scheme is not None}

    @cached_property
    def taken_over(self) -> frozenset[LinearSite]:
        """Linears whose codes are those of the source."""
        return frozenset(p.site for p in self.sites if p.is_taken_over)

    @property
    def files(self) -> frozenset[str]:
        """The names of all files of the result."""
        return frozenset({*self.small_files, *self.layout.sizes, REPORT_NAME})

    @property
    def notes(self) -> list[str]:
        """Every site that cannot follow the recipe, and every pattern without a site, as a sentence."""
        reasons = ((planned.site.module, planned.reason) for planned in self.sites)
        noted = counted_together((name, why) for name, why in reasons if why and not why.startswith("ignored"))
        share = share_note(self.quantized_share) if self.schemes else []
        made = [
            *self.decided,
            *share,
            *self._together_noted,
            *source_notes(self.checkpoint),
            *rewrite_notes(self.checkpoint),
        ]
        limits = [*self.approximations, *self.layout.notes, *self._limits, *self._patterns_noted]
        return [*made, *noted, *limits, *left_behind_notes(self.checkpoint.left_behind)]

    @property
    def _patterns_noted(self) -> list[str]:
        """Patterns of the recipe that change nothing, or are not globs; one for the output head may change nothing,
        since many models share its matrix with the embeddings."""
        quantize = self.recipe.quantize
        if quantize is None:
            return []
        modules = [planned.site.module for planned in (*self.sites, *self.together)]
        said = []
        for kind, pattern in [
            *(("ignore", p) for p in quantize.ignore),
            *(("override", o.match) for o in quantize.overrides),
        ]:
            fitting = [module for module in modules if matches(module, pattern)]
            if fitting and pattern.startswith(EXPRESSION) and not names_all(pattern, fitting):
                count = "1 linear" if len(fitting) == 1 else f"{len(fitting)} linears"
                said.append(f"the {kind} {pattern!r} is a regular expression for {count}; as a glob it matches nothing")
            if not fitting and not (kind == "ignore" and matches(HEAD, pattern)):
                said.append(f"the {kind} {pattern!r} matches no linear")
            elif fitting and kind == "override" and all(map(quantize.ignores, fitting)):
                said.append(f"the override {pattern!r} changes nothing: quantize.ignore keeps all that it matches")
        return said

    @property
    def approximations(self) -> list[str]:
        """What the format rounds beyond what the method decided, by scheme; empty when it holds all codes exactly."""
        schemes = sorted(set(self.schemes.values()), key=str)
        said = {str(scheme): self.format.approximation(scheme) for scheme in schemes}
        return [f"{scheme} is held approximately by {self.format.name}: {how}" for scheme, how in said.items() if how]

    @property
    def _limits(self) -> list[str]:
        """What is left out of a run as a whole."""
        said = (
            self._fused_noted
            + self._sharing_noted
            + [
                f"{part}.* ({len(names)} tensors, {self._share(names):.1%} of the parameters): {EXTRA_KEPT}"
                for part, names in self.extra.items()
            ]
        )
        twice = [slot for slot, _ in self.structure.tied if slot in self.checkpoint.tensors]
        if twice:
            said.append(f"{', '.join(twice)}: stored twice with the same values, which are written once")
        without = len(self.structure.blocks) - len(self.caches) if self.recipe.stored_cache else 0
        if without:
            said.append(f"kv_cache: {without} blocks have no attention, and get no scales")
        said += self._windows_noted
        share = self.recipe.quantize.keep_share if self.recipe.quantize else None
        if share is not None:
            said.append(
                f"quantize.keep_share: layers with up to {share:.0%} of these weights get FP8 or keep 16 bits instead, "
                "and the result is larger by that; a calibration before the run decides which"
            )
        calibration = self.recipe.calibration
        rounded = self.caches or any(scheme.activations for scheme in self.schemes.values())
        if rounded and calibration is not None and calibration.mode == "sequential":
            exact = "but inputs and cache" if calibration.inputs == "exact" else "and rounded inputs, but a cache"
            said.append(
                "calibration.mode sequential: later blocks see the quantized weights of earlier ones, "
                f"{exact} in 16 bits"
            )
        return said

    @property
    def _windows_noted(self) -> list[str]:
        """Windows of text that are longer than the model's positions: what runs over them will refuse them."""
        positions = limit_of(self.model.skeleton, "max_position_embeddings")
        calibration, gate = self.recipe.calibration, self.recipe.gate
        lengths = {}
        if calibration is not None and self.recipe.needs:
            lengths["calibration.sequence_length"] = calibration.sequence_length
        if gate is not None and gate.limits.on_text:
            lengths["gate.window_length"] = gate.window_length
        return [
            f"windows of {length} tokens exceed the model's {positions} positions, and text is not run in them: "
            f"-s {setting}={positions}"
            for setting, length in lengths.items()
            if positions is not None and length > positions
        ]

    @property
    def _sharing_noted(self) -> list[str]:
        """Experts that are one matrix of a GGUF file under its own names, so that they are rounded as one."""
        stacked = [site.weight for site in self.schemes if self.in_own_names and EXPERTS.search(site.weight)]
        if not stacked or not self.recipe.needs:
            return []
        more = f" and {len(stacked) - 1} more" if stacked[1:] else ""
        knows_sums_only = self.recipe.needs == {"sum_sq"}
        how = "share one importance, the sum of theirs" if knows_sums_only else "are rounded without statistics"
        return [
            f"{stacked[0]}{more}: the experts of a block {how}, since the file has them in one tensor; with the "
            "Hugging Face model and --like each has its own"
        ]

    def _share(self, names: Sequence[str]) -> float:
        """How many of all parameters are in these tensors."""
        return sum(prod(self.checkpoint.tensors[name].shape) for name in names) / self.parameters

    @cached_property
    def _modules_together(self) -> dict[str, str]:
        """Module of experts that stay in one tensor -> why."""
        return {str(planned.site.expert).rpartition(".")[0]: planned.reason for planned in self.together}

    @property
    def _together_noted(self) -> list[str]:
        """Which experts stay in one tensor, and why."""
        modules = self._modules_together if self.recipe.quantize is not None else {}
        count = f" ({len(modules)} such mixtures)" if len(modules) > 1 else ""
        return [f"{module} stays in one tensor{count}: {reason}" for module, reason in list(modules.items())[:1]]

    @property
    def _fused_noted(self) -> list[str]:
        """Which other weights have three dimensions."""
        if self.recipe.quantize is None:
            return []
        held = stacks(self.model.skeleton, self.model.names)
        fused = [t for module, tensors in held.items() if module not in self._modules_together for t in tensors]
        more = f" and {len(fused) - 1} more" if len(fused) > 1 else ""
        what = "kept in 16 bits: a weight of three dimensions that no linear layer holds, and nothing declares how"
        return [f"{fused[0]}{more}: {what} it is used"] if fused else []

    @cached_property
    def quantized_share(self) -> float:
        """Share of the weights of linear layers that is quantized, 0..1; towers, routers and the head do not count."""
        return quantized_share(self.model, self.schemes)

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors, as stored."""
        source = original_of(self.checkpoint)
        return sum(source.stored_bytes(name) for name in source.tensors)

    @property
    def output_bytes(self) -> int:
        """Bytes of the output folder without the report: weights, index, config, tokenizer and other files."""
        files = (content for name, content in self.small_files.items() if name != INDEX_NAME)
        return self.layout.total_bytes + sum(c.stat().st_size if isinstance(c, Path) else len(c) for c in files)

    @property
    def parameters(self) -> int:
        """Number of logical parameters (a tied tensor counts once)."""
        return sum(prod(t.shape) for t in original_of(self.checkpoint).tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all output tensors per logical parameter."""
        return 8 * sum(p.tensor.nbytes for p in self.layout.places.values()) / self.parameters

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Bits per weight of the quantized linears alone; None when there is none."""
        weights = sum(s.out_features * s.in_features for s in self.schemes)
        if not weights:
            return None
        names = {n for s, scheme in self.schemes.items() for n, _, _ in self.format.tensor_specs(s, scheme)}
        return 8 * sum(self.layout.places[n].tensor.nbytes for n in names) / weights

    @property
    def clients(self) -> list[str]:
        """Which programs load the result, one line each."""
        cache = self.recipe.kv_cache
        said = self.format.clients(set(self.schemes.values()))
        said += cache_facts(cache.scheme) if cache else []
        said = with_fault(said, self.load_fault) if self.load_fault else said
        said = with_layers(said, {planned.site: planned.scheme for planned in self.sites})
        experts = {site: self.schemes.get(site) for site in self.structure.sites if site.expert}
        if any(experts.values()):
            of_experts = self.format.expert_clients(set(experts.values()), mixture(self.model, experts))
            said += with_experts_remedy(of_experts, self.experts_remedy)
        said = as_whole(with_class(said, architecture(self.model)))
        return with_class_names(said) if self.recipe.export.names == "class" else said

    @property
    def rows(self) -> list[PlanRow]:
        """Tensors that are treated alike: linears by kind, all experts of a block together, and everything else."""
        rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
        left = dict(self.checkpoint.tensors)
        for planned in self.sites:
            before = self.checkpoint.stored_bytes(left.pop(planned.site.weight).name)
            treatment = planned.reason or "kept" if planned.scheme is None else str(planned.scheme)
            sizes = before, before if planned.scheme is None else self._written_bytes(planned.site, planned.scheme)
            rows.setdefault((self._short_name(planned.site), treatment), []).append(sizes)
        for part, names in self.extra.items():
            rows[f"{part}.*", EXTRA_KEPT] = [(size, size) for size in map(self.checkpoint.stored_bytes, names)]
            left = {name: info for name, info in left.items() if name not in names}
        others = sum(map(self.checkpoint.stored_bytes, left))
        listed = [
            PlanRow(sites, len(sizes), treatment, sum(before for before, _ in sizes), sum(after for _, after in sizes))
            for (sites, treatment), sizes in rows.items()
        ]
        return [*listed, PlanRow("embeddings, norms, biases", len(left), "as stored", others, others)]

    @property
    def extra(self) -> dict[str, list[str]]:
        """Stored tensors that the model class does not know, by the part that they are of: blocks that predict further
        tokens ("mtp", "model.layers.61"), or towers that a class for text leaves out."""
        known = set(self.model.names.values())
        ways = {way for name in known for way in beginnings(name)}
        parts: dict[str, list[str]] = {}
        for name in self.structure.outside_once:
            part = next((way for way in beginnings(name) if way not in ways), None)
            if part is not None:
                parts.setdefault(part, []).append(name)
        return {part: names for part, names in parts.items() if any(map(self._is_matrix, names))}

    def _is_matrix(self, name: str) -> bool:
        """Whether a tensor is the weight of a linear or of an embedding, and not a table that is computed anew."""
        return name.endswith(".weight") and len(self.checkpoint.tensors[name].shape) > 1

    def _written_bytes(self, site: LinearSite, scheme: QuantScheme) -> int:
        """Bytes of a quantized linear with its scales and zero points."""
        specs = self.format.tensor_specs(site, scheme)
        return sum(prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in specs)

    def _short_name(self, site: LinearSite) -> str:
        """The module inside its block; one name for the same linear of all experts, and for all of a tower."""
        if site.tower is not None:
            return f"{site.tower}.*"
        inside = "" if site.block is None else f"{self.structure.blocks[site.block].name}."
        short = site.module.removeprefix(inside)
        if site.expert is None:
            return short
        experts, _, number = site.expert.removeprefix(inside).rpartition(".")
        return short.replace(f"{experts}.{number}.", f"{experts}.*.")

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        expected = self.expected
        values = {
            "model": self.checkpoint.source,
            "recipe": self.recipe.name,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "weight_files": self.layout.sizes,
            "bits_per_weight": self.bits_per_weight,
            "quantized_bits_per_weight": self.quantized_bits_per_weight,
            "quantized_share": self.quantized_share,
            "estimated_peak_bytes": expected and expected.peak_bytes,
            "estimated_seconds": expected and expected.seconds,
            "estimated_seconds_alone": expected and expected.alone,
            "sites": [
                {"module": p.site.module, "scheme": str(p.scheme) if p.scheme else None, "reason": p.reason}
                for p in self.sites
            ],
            "exact": not self.approximations,
            "notes": self.notes,
            "clients": self.clients,
        }
        return values if self.savings is None else values | {"max_memory": list(self.savings)}


def left_behind_notes(names: Sequence[str]) -> list[str]:
    """What lies beside the weights and is not carried into the result, as sentences."""
    adapters = [name for name in names if name.startswith("adapter")]
    others = [name for name in names if name not in adapters]
    said = []
    if adapters:
        said.append(f"an adapter beside the weights is left out ({', '.join(adapters)}); merge it first to keep it")
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        said.append(f"left behind, as no part of a model: {', '.join(others[:SHOWN])}{more}")
    return said


def beginnings(name: str) -> list[str]:
    """The names of the modules around a tensor, outermost first."""
    pieces = name.split(".")
    return [".".join(pieces[:count]) for count in range(1, len(pieces))]


def unit_name(block: int) -> str:
    """The unit of work that writes a block."""
    return f"block-{block:05d}"
