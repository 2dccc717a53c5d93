"""What a run will do, from headers alone: what each tensor becomes and why, the exact size, memory and time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import gcd, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import Checkpoint, LinearSite, Structure
from outlierq.core.scheme import QuantScheme
from outlierq.export import exporter
from outlierq.export.layout import INDEX_NAME, Layout, OutputTensor, make_layout
from outlierq.pipeline.events import return_memory_at_once
from outlierq.pipeline.remodel.rewrite import original_of, rewrite_notes, rewritten
from outlierq.recipe import GroupPolicy, Recipe, parse_size

if TYPE_CHECKING:
    import torch

OUTSIDE = "outside"
FLOATS = ("F64", "F32", "F16", "BF16")
SMALLER_GROUPS = (128, 64, 32)
CACHE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
REPORT_NAME = "outlierq.json"
# Time of a calibrated run as a multiple of its matrix products, measured on SmolLM2-135M with gptq-w4 on 2 CPU cores.
OVERHEAD = 2.5


@dataclass(frozen=True)
class SitePlan:
    """What one linear becomes. scheme None: kept as it is. reason: why it is kept, or why its scheme was adjusted."""

    site: LinearSite
    scheme: QuantScheme | None
    reason: str = ""


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
class Plan:
    """Everything that is decided before work starts.

    small_files: everything but weights, by name, without the report. names: parameter of the model class -> tensor.
    caches: by block index, for blocks whose KV cache gets scales.
    """

    checkpoint: Checkpoint
    skeleton: torch.nn.Module
    structure: Structure
    names: Mapping[str, str]
    recipe: Recipe
    sites: tuple[SitePlan, ...]
    layout: Layout
    small_files: Mapping[str, bytes]
    caches: Mapping[int, CachePlan] = field(default_factory=dict)

    @property
    def schemes(self) -> dict[LinearSite, QuantScheme]:
        """The scheme of every linear that is quantized."""
        return {p.site: p.scheme for p in self.sites if p.scheme is not None}

    @property
    def notes(self) -> list[str]:
        """Every site that cannot follow the recipe, and every override without a site, as a sentence.

        Equal reasons are counted together.
        """
        reasons: dict[str, list[str]] = {}
        for planned in self.sites:
            if planned.reason and not planned.reason.startswith("ignored"):
                reasons.setdefault(planned.reason, []).append(planned.site.module)
        noted = [
            f"{modules[0]}{f' and {len(modules) - 1} more' if len(modules) > 1 else ''}: {reason}"
            for reason, modules in reasons.items()
        ]
        overrides = self.recipe.quantize.overrides if self.recipe.quantize else ()
        modules = [planned.site.module for planned in self.sites]
        unused = [o.match for o in overrides if not any(fnmatchcase(module, o.match) for module in modules)]
        noted = rewrite_notes(self.checkpoint) + noted + self.approximations + [*self.layout.notes] + self._limits
        return noted + [f"the override {match!r} matches no linear" for match in unused]

    @property
    def approximations(self) -> list[str]:
        """What the format rounds beyond what the method decided, by scheme; empty when it holds all codes exactly."""
        form = self.recipe.export.format
        rounds = getattr(exporter(form), "approximation", lambda scheme: None)
        said = {str(scheme): rounds(scheme) for scheme in sorted(set(self.schemes.values()), key=str)}
        return [f"{scheme} is held approximately by {form}: {how}" for scheme, how in said.items() if how]

    @property
    def _limits(self) -> list[str]:
        """What is left out of a run as a whole."""
        from outlierq.load import fused_experts

        said = []
        fused = fused_experts(self.skeleton, self.names) if self.recipe.quantize else []
        if fused:
            said.append(f"{fused[0]} and {len(fused) - 1} more hold all experts at once: kept in 16 bits")
        without = len(self.structure.blocks) - len(self.caches) if self.recipe.kv_cache else 0
        if without:
            said.append(f"kv_cache: {without} blocks have no attention, and get no scales")
        calibration = self.recipe.calibration
        rounded = self.caches or any(scheme.activations for scheme in self.schemes.values())
        if rounded and calibration is not None and calibration.mode == "sequential":
            said.append(
                "calibration.mode sequential: later blocks see the quantized weights of earlier ones, but inputs and "
                "cache in 16 bits"
            )
        return said

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors, as stored."""
        return sum(t.nbytes for t in original_of(self.checkpoint).tensors.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the output folder without the report: weights, index, config, tokenizer and other files."""
        return self.layout.total_bytes + sum(len(c) for name, c in self.small_files.items() if name != INDEX_NAME)

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
        form = exporter(self.recipe.export.format)
        names = {n for s, scheme in self.schemes.items() for n, _, _ in form.tensor_specs(s, scheme)}
        return 8 * sum(self.layout.places[n].tensor.nbytes for n in names) / weights

    @property
    def clients(self) -> list[str]:
        """Which programs load the result, one line each."""
        form, cache = exporter(self.recipe.export.format), self.recipe.kv_cache
        said = form.clients(set(self.schemes.values())) + (form.cache_clients(cache.scheme) if cache else [])
        experts = [self.schemes.get(site) for site in self.structure.sites if site.expert]
        if any(experts):
            unknown = [f"experts: no client was tried with {self.recipe.export.format}; compressed-tensors loads"]
            said += form.expert_clients(set(experts)) if hasattr(form, "expert_clients") else unknown
        return said


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, *, expert_stats: Path | None = None, trust_remote_code: bool = False
) -> Plan:
    """Decide everything that headers can decide. RecipeError or SourceError when the recipe cannot be followed.

    expert_stats: what pruning chooses by; without it a plan that prunes is right in its sizes, but cannot be followed.
    """
    from outlierq.load import build_skeleton, checkpoint_names, find_structure

    if checkpoint.config.get("quantization_config"):
        method = checkpoint.config["quantization_config"].get("quant_method", "something")
        raise SourceError(
            f"{checkpoint.source} is already compressed with {method}",
            hint="start from the original checkpoint; with --format alone it is converted without loss",
        )
    checkpoint = rewritten(checkpoint, recipe, expert_stats=expert_stats, trust_remote_code=trust_remote_code)
    return_memory_at_once()  # each part has weights for a moment, and a deep model would leave the heap full of holes
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    structure = find_structure(checkpoint, skeleton)
    sites = tuple(plan_site(site, recipe, checkpoint.dtype) for site in structure.sites)
    _check(sites, recipe)
    _check_dtypes(sites, checkpoint)
    names = checkpoint_names(checkpoint, skeleton)
    caches = _caches(skeleton, structure, names, recipe)
    return assembled(checkpoint, skeleton, structure, names, sites, recipe, caches)


def assembled(
    checkpoint: Checkpoint,
    skeleton: torch.nn.Module,
    structure: Structure,
    names: Mapping[str, str],
    sites: tuple[SitePlan, ...],
    recipe: Recipe,
    caches: Mapping[int, CachePlan],
) -> Plan:
    """The plan once it is decided what becomes of every linear. RecipeError when the format cannot hold it together."""
    _check_together(sites, recipe)
    tensors = _output_tensors(checkpoint, structure, sites, recipe, caches)
    form = exporter(recipe.export.format, checkpoint.config)
    small = {file.name: file.read() for file in checkpoint.files if file.name != REPORT_NAME}
    if hasattr(form, "make_layout"):
        layout = form.make_layout(tensors, [(p.site, p.scheme) for p in sites if p.scheme is not None], checkpoint)
        small = {name: content for name, content in small.items() if form.keeps_file(name)}
        return Plan(checkpoint, skeleton, structure, names, recipe, sites, layout, small, caches)
    layout = make_layout(tensors, parse_size(recipe.export.max_shard_size))
    small["config.json"] = config_json(checkpoint, structure, sites, recipe)
    if layout.index is not None:
        small[INDEX_NAME] = layout.index
    return Plan(checkpoint, skeleton, structure, names, recipe, sites, layout, small, caches)


def plan_site(site: LinearSite, recipe: Recipe, dtype: str) -> SitePlan:
    """The scheme of one linear after the recipe's patterns, the format's limits and the policy on odd widths."""
    wanted = recipe.scheme_for(site.module, getattr(exporter(recipe.export.format), "SCALE_DTYPE", dtype))
    if wanted is None:
        return SitePlan(site, None, "ignored by the recipe" if recipe.quantize else "")
    if site.kind == "Router":
        return SitePlan(site, None, "kept in 16 bits: it decides which experts see a token")
    form = exporter(recipe.export.format)
    other = form.instead(site, wanted) if hasattr(form, "instead") else None
    if other is not None and not form.obstacle(site, other[0]):
        return _by_policy(site, wanted, *other, recipe.quantize.when_indivisible)
    obstacle = form.obstacle(site, wanted)
    if obstacle:
        return SitePlan(site, None, f"kept in 16 bits: {obstacle}")
    if site.block is None and wanted.activations is not None and not wanted.activations.dynamic:
        return SitePlan(site, None, "kept in 16 bits: outside of the blocks nothing is known of its inputs")
    if wanted.block is not None:
        return _in_blocks(site, wanted, recipe.quantize.when_indivisible)
    if wanted.group_size is None or site.in_features % wanted.group_size == 0:
        return SitePlan(site, wanted)
    return _indivisible(site, wanted, recipe.quantize.when_indivisible)


def _by_policy(site: LinearSite, wanted: QuantScheme, other: QuantScheme, reason: str, policy: GroupPolicy) -> SitePlan:
    """What the recipe's policy makes of a width that the format can hold with another scheme only."""
    fault = reason.partition(": ")[2]
    if policy == "keep":
        return SitePlan(site, None, f"kept in 16 bits: {fault}")
    return SitePlan(site, wanted, f"error: {fault}") if policy == "error" else SitePlan(site, other, reason)


def _indivisible(site: LinearSite, wanted: QuantScheme, policy: str) -> SitePlan:
    """What the recipe's policy makes of a width that the group size does not divide."""
    fault = f"{site.in_features} columns are not a multiple of group_size {wanted.group_size}"
    if policy == "keep":
        return SitePlan(site, None, f"kept in 16 bits: {fault}")
    if policy == "error":
        return SitePlan(site, wanted, f"error: {fault}")
    smaller = [g for g in SMALLER_GROUPS if g < wanted.group_size and site.in_features % g == 0]
    group_size = smaller[0] if smaller and policy == "smaller-group" else None
    scheme = replace(wanted, group_size=group_size)
    return SitePlan(site, scheme, f"{'per channel' if group_size is None else f'group {group_size}'}: {fault}")


def _in_blocks(site: LinearSite, wanted: QuantScheme, policy: str) -> SitePlan:
    """What the policy makes of a shape that the blocks do not divide; clients run no ragged blocks.

    There are no kernels for other blocks either, so "smaller-group" means one scale per channel, too.
    """
    height, width = wanted.block
    if site.out_features % height == 0 and site.in_features % width == 0:
        return SitePlan(site, wanted)
    fault = f"{site.out_features} x {site.in_features} weights are not a multiple of blocks {height} x {width}"
    if policy == "keep":
        return SitePlan(site, None, f"kept in 16 bits: {fault}")
    if policy == "error":
        return SitePlan(site, wanted, f"error: {fault}")
    inputs = None if wanted.activations is None else replace(wanted.activations, per="token")
    return SitePlan(site, replace(wanted, block=None, activations=inputs), f"per channel: {fault}")


def _caches(
    skeleton: torch.nn.Module, structure: Structure, names: Mapping[str, str], recipe: Recipe
) -> dict[int, CachePlan]:
    """The scales of every block's KV cache. RecipeError when no attention, or more than one in a block, is found."""
    from outlierq.load import attention_names, stored_prefix

    if recipe.kv_cache is None:
        return {}
    config = skeleton.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (1,) if recipe.kv_cache.per == "tensor" else (heads, 1, 1)
    caches = {}
    for block in structure.blocks:
        found = attention_names(skeleton.get_submodule(block.name))
        if len(found) > 1:
            raise RecipeError(
                f"{block.name} has {len(found)} attention modules ({', '.join(found)}); cache scales are for one",
                hint="leave kv_cache out for this model",
            )
        if found:
            caches[block.index] = CachePlan(stored_prefix(f"{block.name}.{found[0]}", names), shape)
    if not caches:
        raise RecipeError(
            f"no block of {type(skeleton).__name__} calls transformers' attention interface, so the keys and values "
            "that a cache holds are not known",
            hint="leave kv_cache out for this model",
        )
    return caches


def _check(sites: tuple[SitePlan, ...], recipe: Recipe) -> None:
    """Refuse a plan that the recipe forbids or that would change nothing."""
    errors = [p for p in sites if p.reason.startswith("error: ")]
    if errors:
        raise RecipeError(
            f"{len(errors)} linears cannot follow the recipe, first {errors[0].site.module}: "
            f"{errors[0].reason.removeprefix('error: ')}",
            hint="set quantize.group_size to a divisor, or quantize.when_indivisible to smaller-group",
        )
    if recipe.quantize is not None and all(p.scheme is None for p in sites):
        reasons = sorted({p.reason for p in sites})
        raise RecipeError(
            f"the recipe quantizes none of the {len(sites)} linears: {'; '.join(reasons)}",
            hint="look at quantize.ignore and quantize.overrides, or write export.format: dense",
        )


def _check_together(sites: tuple[SitePlan, ...], recipe: Recipe) -> None:
    """Refuse schemes that the format can hold one by one, but not in one checkpoint."""
    conflict = getattr(exporter(recipe.export.format), "conflict", None)
    fault = conflict({p.scheme for p in sites if p.scheme is not None}) if conflict else None
    if fault:
        widths = gcd(*(p.site.in_features for p in sites if p.scheme is not None))
        common = [size for size in SMALLER_GROUPS if widths % size == 0]
        fitting = f"quantize.group_size={common[0]} fits all of its widths; " if common else ""
        raise RecipeError(fault, hint=f"{fitting}compressed-tensors can hold several schemes")


def _check_dtypes(sites: tuple[SitePlan, ...], checkpoint: Checkpoint) -> None:
    """Refuse to quantize weights that are not plain floating-point numbers, such as codes of another format."""
    for planned in sites:
        info = checkpoint.tensors[planned.site.weight]
        if planned.scheme is not None and info.dtype not in FLOATS:
            raise SourceError(
                f"{info.name} is stored as {info.dtype}; only {', '.join(FLOATS)} weights can be quantized",
                hint="start from the original checkpoint, or add the layer to quantize.ignore",
            )


def _output_tensors(
    checkpoint: Checkpoint,
    structure: Structure,
    sites: tuple[SitePlan, ...],
    recipe: Recipe,
    caches: Mapping[int, CachePlan],
) -> list[OutputTensor]:
    """Every tensor to be written, in file order: what is outside of the blocks first, then block by block."""
    form = exporter(recipe.export.format)
    replaced = {p.site.weight: p for p in sites if p.scheme is not None}

    def of(names: tuple[str, ...], unit: str) -> list[OutputTensor]:
        tensors = []
        for name in names:
            if name in replaced:
                planned = replaced[name]
                specs = form.tensor_specs(planned.site, planned.scheme)
                tensors += [OutputTensor(n, dtype, shape, unit) for n, dtype, shape in specs]
            else:
                info = checkpoint.tensors[name]
                spec = form.plain_spec(info) if hasattr(form, "plain_spec") else (name, info.dtype, info.shape)
                tensors.append(OutputTensor(*spec, unit))
        return tensors

    outside_sites = tuple(n for s in structure.outside_sites for n in (s.weight, s.bias) if n)
    tensors = of(structure.outside_tensors + outside_sites, OUTSIDE)
    scale_dtype = CACHE_DTYPES[checkpoint.dtype] if caches else ""
    for block in structure.blocks:
        unit = unit_name(block.index)
        tensors += of(block.tensors, unit)
        if block.index in caches:
            cache = caches[block.index]
            tensors += [OutputTensor(name, scale_dtype, cache.shape, unit) for name in cache.names]
    return tensors


def unit_name(block: int) -> str:
    """The unit of work that writes a block."""
    return f"block-{block:05d}"


def config_json(checkpoint: Checkpoint, structure: Structure, sites: tuple[SitePlan, ...], recipe: Recipe) -> bytes:
    """The source's config with the quantization config added."""
    config: dict[str, Any] = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if recipe.quantize is not None or recipe.kv_cache is not None:
        shared = [slot.removesuffix(".weight") for slot, _ in structure.tied]
        form = exporter(recipe.export.format)
        cache = {"cache": recipe.kv_cache.scheme} if recipe.kv_cache else {}  # not every format has one
        added = form.quantization_config([(p.site, p.scheme) for p in sites], also_kept=shared, **cache)
        if added is not None:
            config["quantization_config"] = added
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Estimate:
    """peak_bytes: resident memory, an upper bound. seconds: wall time, within a factor of two where it was measured."""

    peak_bytes: int
    seconds: float


def estimate(plan: Plan) -> Estimate:
    """Memory of the run without a ceiling, from shapes; time, from a short matrix product on this machine, too."""
    from outlierq.pipeline.planning.memory import BASE_BYTES, NO_SAVINGS, peaks, work_of

    peak = max(peaks(work_of(plan), NO_SAVINGS).values())
    # Without a ceiling the allocator keeps some of what is freed.
    return Estimate(peak + (peak - BASE_BYTES) // 4, _seconds(plan))


def _seconds(plan: Plan) -> float:
    """Wall time of the run."""
    calibration = plan.recipe.calibration
    if calibration is None or not plan.recipe.needs:
        return 3.0 + sum(s.out_features * s.in_features for s in plan.schemes) / 2e8
    tokens = calibration.samples * calibration.sequence_length
    inputs = {(b.index, s.expert, s.in_features) for b in plan.structure.blocks for s in b.sites}
    share = _share_of_experts(plan)
    products = 2 * tokens * sum(s.out_features * s.in_features * (share if s.expert else 1) for s in plan.schemes)
    products += 2 * tokens * sum(k * k * (share if expert else 1) for _, expert, k in inputs)
    solving = 6 * sum(s.out_features * s.in_features**2 for s in plan.schemes)
    passes = 2 if calibration.mode == "sequential" else 1
    return 5.0 + OVERHEAD * (passes * products + solving * 4) / _flops()


def _share_of_experts(plan: Plan) -> float:
    """Which share of the tokens an expert gets on average; 1 when every expert sees all of them."""
    config, calibration = plan.skeleton.config.get_text_config(), plan.recipe.calibration
    experts = max((len({s.expert for s in block.sites if s.expert}) for block in plan.structure.blocks), default=0)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen and not calibration.all_experts else 1.0


def _flops() -> float:
    """Products per second of a bfloat16 matrix product on this machine, from 50 ms of them."""
    import time

    import torch

    a = torch.ones(512, 512, dtype=torch.bfloat16)
    a @ a
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.05:
        a @ a
        count += 1
    return count * 2 * 512**3 / (time.perf_counter() - started)
