"""What becomes of each tensor and why, decided from headers alone: `make_plan`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import gcd
from pathlib import Path

from outlierq.core.dtypes import STORED_AS, WEIGHT_DTYPES
from outlierq.core.errors import OutlierqError, RecipeError, SourceError
from outlierq.core.machine.heap import return_memory_at_once
from outlierq.core.model import EMBEDDING, FLOAT32, Checkpoint, LinearSite, StudiedModel, sizes
from outlierq.core.report import REPORT_NAME
from outlierq.core.scheme import QuantScheme
from outlierq.evaluate.generation import check_writes
from outlierq.export import Format, format_type
from outlierq.export.clients import PackedFault
from outlierq.export.declared import kept_modules
from outlierq.export.layout import INDEX_NAME, OutputTensor
from outlierq.load.packed.described import without_description
from outlierq.load.source.carried import without_places
from outlierq.pipeline.planning.alike import SMALLER_GROUPS, alike_experts, alike_linears
from outlierq.pipeline.planning.embeddings import with_embeddings
from outlierq.pipeline.planning.extra import with_extra_blocks
from outlierq.pipeline.planning.loadable import loadable_experts
from outlierq.pipeline.planning.mixture import mixture
from outlierq.pipeline.planning.plan import OUTSIDE, CachePlan, Plan, SitePlan, unit_name
from outlierq.pipeline.remodel.rewrite import rewritten
from outlierq.recipe import GroupPolicy, Quantize, Recipe, load, parse_size

HEAD_KEPT = "kept in 16 bits: the output head is quantized when an override names it, or quantize.ignore is empty"
IGNORED = "ignored by the recipe"
TOWER_KEPT = (
    "kept in 16 bits: it is no part of the language model; an override that names it, or an empty quantize.ignore, "
    "quantizes it"
)

COMPRESSED = "compressed-tensors"
CLASS_NAMES = "export.names: class writes what it loads"
CODES_KEPT = "left alone: it keeps the codes and scales of the source, bit for bit"
CONFIG_NAME = "config.json"


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, *, expert_stats: Path | None = None, turns: Path | None = None
) -> Plan:
    """Decide everything that headers can decide. RecipeError or SourceError when the recipe cannot be followed.

    expert_stats: what pruning chooses by, and turns: what a step that turns the model was given to see; without them a
    plan is right in its sizes, but cannot be followed.
    """
    from outlierq.load import served

    source = served(_decoding(checkpoint, recipe))

    def planned(other: Recipe) -> Plan:
        return _planned(rewritten(source, other, expert_stats=expert_stats, turns=turns), other)

    return _with_experts_remedy(_with_names_remedy(planned(recipe), planned), planned)


def _with_names_remedy(plan: Plan, planned: Callable[[Recipe], Plan]) -> Plan:
    """The plan with the names of the class as what helps, where transformers loads nothing but that."""
    recipe = plan.recipe
    if plan.load_fault is None or plan.load_fault.is_decoded or recipe.export.names == "class":
        return plan
    renamed = recipe.model_copy(update={"export": recipe.export.model_copy(update={"names": "class"})})
    other = planned(renamed).load_fault
    if other is not None and not other.is_decoded:
        return plan
    return replace(plan, load_fault=replace(plan.load_fault, remedy=CLASS_NAMES))


def _with_experts_remedy(plan: Plan, planned: Callable[[Recipe], Plan]) -> Plan:
    """The plan with kept experts as what helps, where others read them apart, and transformers in one tensor only."""
    quantize = plan.recipe.quantize
    experts = [site for site in plan.schemes if site.expert is not None]
    if quantize is None or not experts or plan.format.name != COMPRESSED or mixture(plan.model, {}).is_merged:
        return plan
    kept = list(dict.fromkeys(f"*.{str(site.expert).split('.')[-2]}.*" for site in experts))
    ignore = [*quantize.ignore, *kept]
    other = planned(plan.recipe.model_copy(update={"quantize": quantize.model_copy(update={"ignore": ignore})}))
    if other.load_fault is not None and not other.load_fault.is_decoded:
        return plan
    remedy = f"`--set 'quantize.ignore={json.dumps(ignore)}'` keeps them in 16 bits, and that it loads"
    return replace(plan, experts_remedy=remedy)


def _planned(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """The plan for a checkpoint as the recipe's rewrites leave it."""
    from outlierq.load import FramedCheckpoint, refuse_other_model, refuse_rounds

    return_memory_at_once()  # each part has weights for a moment, and a deep model would leave the heap full of holes
    model, sites, together = _as_stored(*_decided(checkpoint, recipe), recipe)
    refuse_other_model(model)
    if recipe.needs and not isinstance(checkpoint, FramedCheckpoint):  # which never runs
        refuse_rounds(model)
    if recipe.needs and recipe.calibration is not None and recipe.calibration.own_share:
        check_writes(model.skeleton)
    _check(sites, recipe)
    _check_dtypes(sites, checkpoint)
    return _with_one_scheme(assembled(model, sites, recipe, _caches(model, recipe), together))


def _with_one_scheme(plan: Plan) -> Plan:
    """The plan with one scheme, where transformers can load the weights then: it decodes with one.

    Linears of odd widths are kept, or get the group size that divides all widths, as do all others: whichever makes the
    smaller result. The plan itself where that is not needed, or does not help.
    """
    odd = {p.site: p.reason.partition(": ")[2] for p in plan.sites if p.scheme is not None and p.reason}
    if plan.load_fault is None or plan.load_fault.is_decoded or not odd or plan.recipe.quantize is None:
        return plan
    because = "and transformers, which decodes the weights of this class as it loads them, does so with one scheme"
    kept = tuple(
        SitePlan(p.site, None, f"kept in 16 bits: {odd[p.site]}, {because}") if p.site in odd else p for p in plan.sites
    )
    alike = alike_linears(plan.sites, plan.recipe.quantize.when_indivisible, because)
    others = [assembled(plan.model, sites, plan.recipe, plan.caches, plan.together) for sites in (kept, alike) if sites]
    decoded = [other for other in others if other.load_fault is not None and other.load_fault.is_decoded]
    return min(decoded, key=lambda other: other.output_bytes, default=plan)


def _decoding(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """A GGUF file under its own names with those packed tensors decoded that the recipe rounds anew, no others."""
    from outlierq.load import FramedCheckpoint

    if not isinstance(checkpoint, FramedCheckpoint):
        return checkpoint
    _, sites = _decided(checkpoint, recipe)
    rounded = {p.site.weight for p in sites if p.scheme is not None}
    return checkpoint.decoding(rounded.intersection(checkpoint.packed))


def _decided(checkpoint: Checkpoint, recipe: Recipe) -> tuple[StudiedModel, tuple[SitePlan, ...]]:
    """The model, and what becomes of each of its linears."""
    from outlierq.load import study

    model = with_extra_blocks(with_embeddings(study(checkpoint), recipe), recipe)
    format = format_type(recipe.export.format).of(checkpoint)
    sites = [plan_site(site, recipe, format, model) for site in model.structure.sites]
    if recipe.quantize is not None:
        is_read = format.stacks_experts or format.joins_experts
        sites = sites if is_read else loadable_experts(sites, model, recipe.quantize, partial(_holds_experts, model))
        sites = alike_experts(sites, recipe.quantize.when_indivisible)
        sites = [_taken_over(p, recipe, format, checkpoint) for p in sites]
    return model, tuple(sites)


def _holds_experts(model: StudiedModel, name: str, settings: Sequence[str]) -> bool:
    """Whether a shipped recipe quantizes every expert of a model."""
    recipe = load(name, list(settings))
    try:
        format = format_type(recipe.export.format).of(model.checkpoint)
    except OutlierqError:  # it is written for other models, or its library is not there
        return False
    experts = [site for site in model.structure.sites if site.expert is not None]
    return all(plan_site(site, recipe, format, model).scheme is not None for site in experts)


def _taken_over(planned: SitePlan, recipe: Recipe, format: Format, checkpoint: Checkpoint) -> SitePlan:
    """A linear that the recipe leaves alone, with the codes that the source has, where the format declares all of them
    and nothing else in the recipe changes weights.
    """
    site, scheme = planned.site, checkpoint.code_scheme(planned.site.weight)
    meant = recipe.scheme_for(site.module, checkpoint.dtype, tower=site.tower)
    if scheme is None or meant is not None or recipe.transform or format.name != COMPRESSED:
        return planned
    if site.tower is not None or format.obstacle(site, scheme):
        return planned
    return SitePlan(site, scheme, CODES_KEPT, is_taken_over=True)


def _as_stored(
    model: StudiedModel, sites: tuple[SitePlan, ...], recipe: Recipe
) -> tuple[StudiedModel, tuple[SitePlan, ...], tuple[SitePlan, ...]]:
    """The same with experts in fused tensors again where none of them is quantized: so their class loads them.

    Those are given, too.
    """
    from outlierq.load import experts_together, fused_pieces, replaced_experts

    if format_type(recipe.export.format).stacks_experts:
        return model, sites, ()
    pieces = fused_pieces(model.checkpoint)
    is_plain = recipe.export.format == "dense" or all(p.scheme is None for p in sites)
    apart = () if is_plain else replaced_experts(model.skeleton)
    of = [(p, pieces[p.site.weight].module) for p in sites if p.site.expert is not None and p.site.weight in pieces]
    staying = {module for p, module in of if p.scheme or str(p.site.expert).rpartition(".")[0] in apart}
    together = tuple(p for p, module in of if module not in staying)
    if not together:
        return model, sites, ()
    kept = {module for _, module in of} - staying
    return *_decided(experts_together(model.checkpoint, kept), recipe), together


def assembled(
    model: StudiedModel,
    sites: tuple[SitePlan, ...],
    recipe: Recipe,
    caches: Mapping[int, CachePlan],
    together: tuple[SitePlan, ...] = (),
) -> Plan:
    """The plan once it is decided what becomes of every linear. RecipeError when the format cannot hold it together."""
    from outlierq.load import packed_fault

    checkpoint = model.checkpoint
    format = format_type(recipe.export.format).of(checkpoint)
    _check_together(sites, format)
    tensors = _output_tensors(model, sites, format, caches)
    schemes = {p.site: p.scheme for p in sites if p.scheme is not None}
    mix = None if recipe.quantize is None else recipe.quantize.mix
    layout = format.make_layout(tensors, schemes, checkpoint, parse_size(recipe.export.max_shard_size), mix)
    written = layout.places.keys()
    packed = [site.weight for site in schemes if site.weight not in written]
    is_fp8 = all(scheme.kind == "float" and scheme.bits == 8 for scheme in schemes.values())
    can_decode = format.dense_key(set(schemes.values()))
    is_run = format.name == COMPRESSED  # by transformers, not by a plug-in with kernels of its own
    added = [name for name in written if name not in checkpoint.tensors] if is_run else []
    fault = packed_fault(model, [site.weight for site in schemes], packed, added, is_fp8=is_fp8)
    dense_key = can_decode if fault is not None and fault.loads_dense else None
    carried = [file for file in checkpoint.files if file.name != REPORT_NAME and format.keeps_file(file.name)]
    small = {file.name: file.held() for file in carried}
    if format.keeps_file(CONFIG_NAME):
        small[CONFIG_NAME] = config_json(model, sites, recipe, format, dense_key=dense_key)
    if layout.index is not None:
        small[INDEX_NAME] = layout.index
    said = None if fault is None else PackedFault(fault.why, dense_key is not None)
    return Plan(model, recipe, sites, layout, small, caches, together, load_fault=said)


def plan_site(site: LinearSite, recipe: Recipe, format: Format, model: StudiedModel) -> SitePlan:
    """The scheme of one linear after the recipe's patterns, the format's limits and the policy on odd widths."""
    quantize = recipe.quantize
    if quantize is None:
        return SitePlan(site, None)
    type = _type_of(site, quantize, format, model)
    scale_dtype = format.scale_dtype or model.checkpoint.dtype
    scheme = recipe.scheme_for(site.module, scale_dtype, tower=site.tower, type=type)
    if scheme is None:
        return SitePlan(site, None, _why_kept(site, quantize))
    if site.kind == "Router":
        return SitePlan(site, None, "kept in 16 bits: it decides which experts see a token")
    if site.kind == FLOAT32:
        return SitePlan(site, None, "kept: its class computes it in float32")
    other = format.instead(site, scheme)
    if other is not None and not format.obstacle(site, other[0]):
        return _by_policy(site, scheme, *other, quantize.when_indivisible)
    obstacle = format.obstacle(site, scheme)
    if obstacle:
        return SitePlan(site, None, f"kept in 16 bits: {obstacle}")
    if site.block is None and scheme.activations is not None and not scheme.activations.dynamic:
        return SitePlan(site, None, "kept in 16 bits: outside of the blocks nothing is known of its inputs")
    if scheme.block is not None:
        return _in_blocks(site, scheme, scheme.block, quantize.when_indivisible)
    if scheme.group_size is None or site.in_features % scheme.group_size == 0:
        return SitePlan(site, scheme)
    return _indivisible(site, scheme, scheme.group_size, quantize.when_indivisible)


def _type_of(site: LinearSite, quantize: Quantize, format: Format, model: StudiedModel) -> str | None:
    """The type of GGUF that the recipe's mix gives a linear, or the key for it a table of embeddings; None without."""
    if site.kind == EMBEDDING and quantize.embeddings is not None:
        return quantize.embeddings
    is_mixed = quantize.mix is not None and site.kind not in ("Router", FLOAT32) and site.tower is None
    return format.type_in_mix(str(quantize.mix), site, model) if is_mixed else None


def _why_kept(site: LinearSite, quantize: Quantize) -> str:
    """Why the recipe keeps a linear."""
    if not quantize.protects(site.module, site.tower):
        return IGNORED
    return HEAD_KEPT if site.tower is None else TOWER_KEPT


def _by_policy(site: LinearSite, scheme: QuantScheme, other: QuantScheme, reason: str, policy: GroupPolicy) -> SitePlan:
    """What the recipe's policy makes of a width that the format can hold with another scheme only."""
    fault = reason.partition(": ")[2]
    if policy == "keep":
        return SitePlan(site, None, f"kept in 16 bits: {fault}")
    return SitePlan(site, scheme, f"error: {fault}") if policy == "error" else SitePlan(site, other, reason)


def _indivisible(site: LinearSite, scheme: QuantScheme, size: int, policy: GroupPolicy) -> SitePlan:
    """What the recipe's policy makes of a width that the group size does not divide."""
    fault = f"{site.in_features} columns are not a multiple of group_size {size}"
    if policy == "keep":
        return SitePlan(site, None, f"kept in 16 bits: {fault}")
    if policy == "error":
        return SitePlan(site, scheme, f"error: {fault}")
    smaller = [g for g in SMALLER_GROUPS if g < size and site.in_features % g == 0]
    group_size = smaller[0] if smaller and policy == "smaller-group" else None
    scheme = replace(scheme, group_size=group_size)
    return SitePlan(site, scheme, f"{'per channel' if group_size is None else f'group {group_size}'}: {fault}")


def _in_blocks(site: LinearSite, scheme: QuantScheme, block: tuple[int, int], policy: GroupPolicy) -> SitePlan:
    """What the policy makes of a shape that the blocks do not divide; clients run no ragged blocks.

    There are no kernels for other blocks either, so "smaller-group" means one scale per channel, too.
    """
    height, width = block
    if site.out_features % height == 0 and site.in_features % width == 0:
        return SitePlan(site, scheme)
    fault = f"{site.out_features} x {site.in_features} weights are not a multiple of blocks {height} x {width}"
    if policy == "keep":
        return SitePlan(site, None, f"kept in 16 bits: {fault}")
    if policy == "error":
        return SitePlan(site, scheme, f"error: {fault}")
    inputs = None if scheme.activations is None else replace(scheme.activations, per="token")
    return SitePlan(site, replace(scheme, block=None, activations=inputs), f"per channel: {fault}")


def _caches(model: StudiedModel, recipe: Recipe) -> dict[int, CachePlan]:
    """The scales of every block's KV cache. RecipeError when no attention, or more than one in a block, is found."""
    from outlierq.load import attention_names, stored_prefix

    if recipe.stored_cache is None:
        return {}
    config = model.skeleton.config.get_text_config()
    heads = sizes(config, "num_key_value_heads") or sizes(config, "num_attention_heads")
    if recipe.stored_cache.per == "head" and len(heads) != 1:
        raise RecipeError(
            f"layers have {' and '.join(map(str, heads)) or 'no'} key-value heads; scales per head need one number",
            hint="set kv_cache.per to tensor",
        )
    shape = (1,) if recipe.stored_cache.per == "tensor" else (heads[0], 1, 1)
    caches = {}
    for block in model.structure.blocks:
        attentions = attention_names(model.skeleton.get_submodule(block.name))
        if len(attentions) > 1:
            raise RecipeError(
                f"{block.name} has {len(attentions)} attention modules ({', '.join(attentions)}); "
                "cache scales are for one",
                hint="leave kv_cache out for this model",
            )
        if attentions:
            caches[block.index] = CachePlan(stored_prefix(f"{block.name}.{attentions[0]}", model.names), shape)
    if not caches:
        raise RecipeError(
            f"no block of {type(model.skeleton).__name__} calls transformers' attention interface, so the keys and "
            "values that a cache holds are not known",
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
            hint=_what_would_be_quantized(sites, reasons),
        )


def _what_would_be_quantized(sites: tuple[SitePlan, ...], reasons: list[str]) -> str:
    """What to do where a recipe keeps all linears, by the reasons."""
    if IGNORED in reasons:
        return "look at quantize.ignore and quantize.overrides, or write export.format: dense"
    if any(p.site.transposed for p in sites):
        return "`-r rtn-w8` and `-r gptq-w4` pack such layers, and transformers decodes them while it loads"
    return "`-r rtn-w8 --set export.format=dense` writes rounded weights of any layer, in 16 bits"


def _check_together(sites: tuple[SitePlan, ...], format: Format) -> None:
    """Refuse schemes that the format can hold one by one, but not in one checkpoint."""
    _check_stacks(sites, format)
    fault = format.conflict({p.scheme for p in sites if p.scheme is not None})
    if fault:
        widths = gcd(*(p.site.in_features for p in sites if p.scheme is not None))
        common = [size for size in SMALLER_GROUPS if widths % size == 0]
        fitting = f"quantize.group_size={common[0]} fits all of its widths; " if common else ""
        raise RecipeError(fault, hint=f"{fitting}compressed-tensors can hold several schemes")


def _check_stacks(sites: tuple[SitePlan, ...], format: Format) -> None:
    """Refuse experts of which some are quantized and others not, where the format has them in one tensor."""
    by_module: dict[str, list[SitePlan]] = {}
    for planned in sites:
        piece = format.stacked(planned.site.weight)
        if piece is not None:
            by_module.setdefault(piece.module, []).append(planned)
    for module, parts in by_module.items():
        kept = [p.site.module for p in parts if p.scheme is None]
        if kept and len(kept) < len(parts):
            raise RecipeError(
                f"{format.name} has all experts of {module} in one tensor, and the recipe keeps {len(kept)} of their "
                f"{len(parts)} linears in 16 bits, first {kept[0]}",
                hint="quantize all experts of a block, or none",
            )


def _check_dtypes(sites: tuple[SitePlan, ...], checkpoint: Checkpoint) -> None:
    """Refuse to quantize weights that are not plain floating-point numbers, such as codes of another format."""
    for planned in sites:
        info = checkpoint.tensors[planned.site.weight]
        if planned.scheme is not None and info.dtype not in WEIGHT_DTYPES:
            raise SourceError(
                f"{info.name} is stored as {info.dtype}; only {', '.join(WEIGHT_DTYPES)} weights can be quantized",
                hint="start from the original checkpoint, or add the layer to quantize.ignore",
            )


def _output_tensors(
    model: StudiedModel, sites: tuple[SitePlan, ...], format: Format, caches: Mapping[int, CachePlan]
) -> list[OutputTensor]:
    """Every tensor to be written, in file order: what is outside of the blocks first, then block by block."""
    checkpoint, structure = model.checkpoint, model.structure
    replaced = {p.site.weight: (p.site, p.scheme) for p in sites if p.scheme is not None}

    def of(names: tuple[str, ...], unit: str) -> list[OutputTensor]:
        tensors = []
        for name in names:
            if name in replaced:
                specs = format.tensor_specs(*replaced[name])
                tensors += [OutputTensor(n, dtype, shape, unit) for n, dtype, shape in specs]
            else:
                tensors += [OutputTensor(*spec, unit) for spec in format.plain_specs(checkpoint.tensors[name])]
        return tensors

    outside_sites = tuple(n for s in structure.outside_sites for n in (s.weight, s.bias) if n)
    tensors = of(structure.outside_once + outside_sites, OUTSIDE)
    scale_dtype = STORED_AS[checkpoint.dtype] if caches else ""
    for block in structure.blocks:
        unit = unit_name(block.index)
        tensors += of(block.tensors, unit)
        if block.index in caches:
            cache = caches[block.index]
            tensors += [OutputTensor(name, scale_dtype, cache.shape, unit) for name in cache.names]
    return _together(tensors) if format.stacks_experts else list(dict.fromkeys(tensors))


def _together(tensors: list[OutputTensor]) -> list[OutputTensor]:
    """The tensors, those of one name as one with all of their rows. RecipeError when their rows differ."""
    whole: dict[str, OutputTensor] = {}
    for tensor in tensors:
        before = whole.get(tensor.name, replace(tensor, shape=(0, *tensor.shape[1:])))
        if (before.dtype, before.shape[1:], before.unit) != (tensor.dtype, tensor.shape[1:], tensor.unit):
            raise RecipeError(
                f"the experts of {tensor.name} would be stored in several ways, and one tensor holds all of them",
                hint="let patterns of quantize.ignore and quantize.overrides fit all experts of a block",
            )
        whole[tensor.name] = replace(tensor, shape=(before.shape[0] + tensor.shape[0], *tensor.shape[1:]))
    return list(whole.values())


def config_json(
    model: StudiedModel, sites: tuple[SitePlan, ...], recipe: Recipe, format: Format, *, dense_key: str | None
) -> bytes:
    """The source's config with the quantization config added. dense_key: of `Format.dense_key`, where it is needed."""
    config = without_description(without_places(model.checkpoint.config))
    if recipe.quantize is not None or recipe.stored_cache is not None:
        cache = recipe.stored_cache.scheme if recipe.stored_cache else None
        decided = [(p.site, p.scheme) for p in sites]
        added = format.quantization_config(decided, kept=kept_modules(model, decided), cache=cache)
        if added is not None:
            config["quantization_config"] = added | ({dense_key: True} if dense_key else {})
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
