"""What a run will do, from headers alone: what each tensor becomes and why, the exact size, memory and time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import Checkpoint, LinearSite, Structure
from outlierq.core.scheme import QuantScheme
from outlierq.export import exporter
from outlierq.export.layout import INDEX_NAME, Layout, OutputTensor, make_layout
from outlierq.recipe import Recipe, parse_size

if TYPE_CHECKING:
    import torch

OUTSIDE = "outside"
FLOATS = ("F64", "F32", "F16", "BF16")
SMALLER_GROUPS = (128, 64, 32)
REPORT_NAME = "outlierq.json"
# Resident memory of the process with torch and transformers imported, before any weight is read (measured: 0.45 GB).
BASE_BYTES = 450_000_000
# Time of a calibrated run as a multiple of its matrix products, measured on SmolLM2-135M with gptq-w4 on 2 CPU cores.
OVERHEAD = 2.5


@dataclass(frozen=True)
class SitePlan:
    """What one linear becomes. scheme None: kept as it is. reason: why it is kept, or why its scheme was adjusted."""

    site: LinearSite
    scheme: QuantScheme | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before work starts.

    small_files: everything but weights, by name, without the report. names: parameter of the model class -> tensor.
    """

    checkpoint: Checkpoint
    skeleton: torch.nn.Module
    structure: Structure
    names: Mapping[str, str]
    recipe: Recipe
    sites: tuple[SitePlan, ...]
    layout: Layout
    small_files: Mapping[str, bytes]

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
        return noted + [f"the override {match!r} matches no linear" for match in unused]

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors, as stored."""
        return sum(t.nbytes for t in self.checkpoint.tensors.values())

    @property
    def output_bytes(self) -> int:
        """Bytes of the output folder without the report: weights, index, config, tokenizer and other files."""
        return self.layout.total_bytes + sum(len(c) for name, c in self.small_files.items() if name != INDEX_NAME)

    @property
    def parameters(self) -> int:
        """Number of logical parameters (a tied tensor counts once)."""
        return sum(prod(t.shape) for t in self.checkpoint.tensors.values())

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
        return exporter(self.recipe.export.format).clients(set(self.schemes.values()))


def make_plan(checkpoint: Checkpoint, recipe: Recipe, *, trust_remote_code: bool = False) -> Plan:
    """Decide everything that headers can decide. RecipeError or SourceError when the recipe cannot be followed."""
    from outlierq.load import build_skeleton, checkpoint_names, find_structure

    if checkpoint.config.get("quantization_config"):
        method = checkpoint.config["quantization_config"].get("quant_method", "something")
        raise SourceError(
            f"{checkpoint.source} is already compressed with {method}", hint="start from the original checkpoint"
        )
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    structure = find_structure(checkpoint, skeleton)
    sites = tuple(plan_site(site, recipe, checkpoint.dtype) for site in structure.sites)
    _check(sites, recipe)
    _check_dtypes(sites, checkpoint)
    layout = make_layout(
        _output_tensors(checkpoint, structure, sites, recipe), parse_size(recipe.export.max_shard_size)
    )
    small = {file.name: file.read() for file in checkpoint.files if file.name != REPORT_NAME}
    small["config.json"] = config_json(checkpoint, structure, sites, recipe)
    if layout.index is not None:
        small[INDEX_NAME] = layout.index
    names = checkpoint_names(checkpoint, skeleton)
    return Plan(checkpoint, skeleton, structure, names, recipe, sites, layout, small)


def plan_site(site: LinearSite, recipe: Recipe, dtype: str) -> SitePlan:
    """The scheme of one linear after the recipe's patterns, the format's limits and the policy on odd widths."""
    wanted = recipe.scheme_for(site.module, dtype)
    if wanted is None:
        return SitePlan(site, None, "ignored by the recipe" if recipe.quantize else "")
    obstacle = exporter(recipe.export.format).obstacle(site, wanted)
    if obstacle:
        return SitePlan(site, None, f"kept in 16 bits: {obstacle}")
    if wanted.group_size is None or site.in_features % wanted.group_size == 0:
        return SitePlan(site, wanted)
    return _indivisible(site, wanted, recipe.quantize.when_indivisible)


def _indivisible(site: LinearSite, wanted: QuantScheme, policy: str) -> SitePlan:
    """What the recipe's policy makes of a width that the group size does not divide."""
    fault = f"{site.in_features} columns are not a multiple of group_size {wanted.group_size}"
    if policy == "keep":
        return SitePlan(site, None, f"kept in 16 bits: {fault}")
    if policy == "error":
        return SitePlan(site, wanted, f"error: {fault}")
    smaller = [g for g in SMALLER_GROUPS if g < wanted.group_size and site.in_features % g == 0]
    group_size = smaller[0] if smaller and policy == "smaller-group" else None
    scheme = QuantScheme(wanted.bits, group_size, wanted.symmetric, wanted.scale_dtype)
    return SitePlan(site, scheme, f"{'per channel' if group_size is None else f'group {group_size}'}: {fault}")


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
    checkpoint: Checkpoint, structure: Structure, sites: tuple[SitePlan, ...], recipe: Recipe
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
                tensors.append(OutputTensor(name, info.dtype, info.shape, unit))
        return tensors

    outside_sites = tuple(n for s in structure.outside_sites for n in (s.weight, s.bias) if n)
    tensors = of(structure.outside_tensors + outside_sites, OUTSIDE)
    for block in structure.blocks:
        tensors += of(block.tensors, unit_name(block.index))
    return tensors


def unit_name(block: int) -> str:
    """The unit of work that writes a block."""
    return f"block-{block:05d}"


def config_json(checkpoint: Checkpoint, structure: Structure, sites: tuple[SitePlan, ...], recipe: Recipe) -> bytes:
    """The source's config with the quantization config added."""
    config: dict[str, Any] = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    if recipe.quantize is not None:
        shared = [slot.removesuffix(".weight") for slot, _ in structure.tied]
        form = exporter(recipe.export.format)
        added = form.quantization_config([(p.site, p.scheme) for p in sites], also_kept=shared)
        if added is not None:
            config["quantization_config"] = added
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Estimate:
    """peak_bytes: resident memory. seconds: wall time. Rough: within a factor of two where it was measured."""

    peak_bytes: int
    seconds: float


def estimate(plan: Plan) -> Estimate:
    """Memory and time of the run, from shapes and a short matrix product on this machine."""
    widest = max((_block_weights(plan, i) for i in range(len(plan.structure.blocks))), default=0)
    outside = sum(plan.checkpoint.tensors[n].nbytes for n in plan.structure.outside_tensors)
    calibration = plan.recipe.calibration
    quantized = sum(s.out_features * s.in_features for s in plan.schemes)
    if calibration is None or not plan.recipe.needs:
        return Estimate(BASE_BYTES + max(outside, widest * 16), 3.0 + quantized / 2e8)
    tokens = calibration.samples * calibration.sequence_length
    blocks = plan.structure.blocks
    hidden = max((s.in_features for b in blocks for s in b.sites), default=0)
    inputs = {(b.index, s.in_features) for b in blocks for s in b.sites}
    hessians = max((sum(k * k for i, k in inputs if i == b.index) for b in blocks), default=0) * 4
    batch = calibration.batch_size * calibration.sequence_length * hidden * 16
    width = min((s.in_features for b in blocks for s in b.sites), default=0)
    peak = BASE_BYTES + max(outside, widest * 16 + hessians * 3) + tokens * width * 2 + batch
    products = 2 * tokens * (quantized + sum(k * k for _, k in inputs))
    solving = 6 * sum(s.out_features * s.in_features**2 for s in plan.schemes)
    passes = 2 if calibration.mode == "sequential" else 1
    return Estimate(peak, 5.0 + OVERHEAD * (passes * products + solving * 4) / _flops())


def _block_weights(plan: Plan, index: int) -> int:
    """Number of weights in one block."""
    return sum(s.out_features * s.in_features for s in plan.structure.blocks[index].sites)


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
