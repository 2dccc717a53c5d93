"""What the model of memory knows of a run: its shapes, what is asked, and what it does to need less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.collect import ALL_FIELDS, stored_fields
from outlierq.calibrate.runner import SPILL_BYTES
from outlierq.calibrate.text.files import MOST_BYTES
from outlierq.core.dtypes import DTYPES
from outlierq.core.model import LinearSite, Structure, StudiedModel, largest
from outlierq.load.model.lookup import tables
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.quantize.stage import shares_over_all_rows
from outlierq.registry import COPIES, method

if TYPE_CHECKING:
    from outlierq.pipeline.planning.plan import Plan
    from outlierq.recipe import Calibration


@dataclass(frozen=True)
class Savings:
    """What a run does to need less memory; the defaults are what it does without a ceiling.

    spill_bytes: hidden states above this size are in a mapped file. stats_bytes: of hessians that are collected in one
    pass over the text; a block that has more is run several times, and its statistics wait in a file (None: never).
    most_weights: of a stack that is solved at once (None: all). batch_size: sequences at a time (None: the recipe's).
    """

    spill_bytes: int = SPILL_BYTES
    stats_bytes: int | None = None
    most_weights: int | None = None
    batch_size: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What may change the last bit of a sum, by name; a run continues only with the same."""
        values = {"most_weights": self.most_weights, "batch_size": self.batch_size}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def sentences(self) -> list[str]:
        """What is done beyond the usual, for people."""
        said = []
        if self.spill_bytes == 0:
            said.append("hidden states are kept in a mapped file")
        if self.stats_bytes is not None:
            said.append(
                f"hessians of {self.stats_bytes >> 20} MiB are collected in a pass: a block with more is run several "
                "times"
            )
        if self.most_weights is not None:
            said.append(
                f"stacks of more than {self.most_weights:,} weights are solved some rows at a time (may change last "
                "bits)"
            )
        if self.batch_size is not None:
            count = "one sequence" if self.batch_size == 1 else f"{self.batch_size} sequences"
            said.append(f"{count} at a time (may change last bits)")
        return said


NO_SAVINGS = Savings()


@dataclass(frozen=True)
class Work:
    """What the model of memory knows of a run: shapes, and what is asked.

    stored, elements: bytes and numbers of every tensor. itemsize: bytes of a parameter while its block runs. eager:
    attention keeps its scores. calibration: None when no model is run. fields: statistics that are kept, and whether
    there are any. looked_up: tables of which rows are read when they are needed. unread: what lies outside of
    the blocks and no text runs through. by_rows: other tensors are copied some
    rows at a time. copies, factors: as the method declares them. group: the smallest group size.
    together: all rows of a weight share a number, so that it is solved as a whole. types: scales are those of a type
    of GGUF. permutes: a step looks
    at all statistics of a block together. from_file: statistics are read, not made. writes_stats: they are what is
    wanted, and the final logits. making: what reading a tensor holds beside the tensor, where a recipe rewrites the
    model; those that are not named: nothing. proves: the rewritten model is run beside the original, which is not done
    for a pruned one. learns: blocks learn as a whole, beside the original ones. shards: of the text, each with sums of
    its own until they are merged. ranks: processes that share the work; all said here is of one of them, the lead,
    which needs most.
    """

    structure: Structure
    stored: Mapping[str, int]
    elements: Mapping[str, int]
    itemsize: int
    hidden: int
    heads: int
    eager: bool
    tokenizer_bytes: int
    text_bytes: int
    calibration: Calibration | None
    fields: frozenset[str]
    quantized: frozenset[LinearSite] = frozenset()
    copies: int = COPIES
    factors: bool = False
    looked_up: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    by_rows: bool = False
    group: int | None = None
    together: bool = False
    types: bool = False
    transforms: bool = False
    activations: bool = False
    statistics: bool = False
    cuda: bool = False
    vocabulary: int = 0
    permutes: bool = False
    from_file: bool = False
    writes_stats: bool = False
    making: Mapping[str, int] = field(default_factory=dict)
    proves: bool = False
    learns: bool = False
    shards: int = 1
    ranks: int = 1


def work_of(plan: Plan, resources: Resources = USUAL, *, stats: bool = False, shards: int | None = None) -> Work:
    """What `quantize` has to do. stats: statistics come from a file. shards: of a run that goes on."""
    recipe = plan.recipe
    making = {name: plan.checkpoint.making_bytes(name) for name in plan.checkpoint.tensors}
    needs = recipe.needs if recipe.calibration is not None else frozenset()  # a conversion has no method to ask
    running = bool(needs) and not stats
    known = _known(plan.model, recipe.calibration, resources.device)
    quantizer = method("quantize", recipe.quantize.method) if needs and recipe.quantize else None
    work = Work(
        **known,
        calibration=recipe.calibration if running else None,
        fields=ALL_FIELDS if stats and needs else stored_fields(needs) if needs else frozenset(),
        from_file=stats and bool(needs),
        quantized=frozenset(plan.schemes),
        group=min((s.group_size for s in plan.schemes.values() if s.group_size), default=None),
        together=any(shares_over_all_rows(scheme) for scheme in plan.schemes.values()),
        types=any(scheme.type is not None for scheme in plan.schemes.values()),
        transforms=bool(recipe.group_transforms or recipe.permutations),
        permutes=bool(recipe.permutations),
        activations=any(scheme.activations for scheme in plan.schemes.values()),
        statistics=bool(needs),
        by_rows=plan.checkpoint.reads_rows and plan.format.copies_rows,
        making={name: size for name, size in making.items() if size},
        proves=len(recipe.rewrites) > len(recipe.pruning),
        learns=recipe.learn is not None,
        shards=_shards(recipe.calibration, resources.ranks.size, shards),
        ranks=resources.ranks.size,
    )
    return work if quantizer is None else replace(work, copies=quantizer.copies, factors=quantizer.factors)


def _shards(calibration: Calibration | None, ranks: int, former: int | None) -> int:
    """Into how many parts the text is cut: as asked, as in the run that goes on, or one for each process."""
    return (calibration.shards if calibration else None) or former or ranks


def work_of_calibration(
    model: StudiedModel,
    settings: Calibration,
    fields: frozenset[str],
    resources: Resources = USUAL,
    *,
    shards: int | None = None,
) -> Work:
    """What `calibrate` has to do. shards: of a run that goes on."""
    return Work(
        **_known(model, settings, resources.device),
        calibration=settings,
        fields=fields,
        statistics=True,
        transforms=True,
        writes_stats=True,
        shards=_shards(settings, resources.ranks.size, shards),
        ranks=resources.ranks.size,
    )


def _known(model: StudiedModel, settings: Calibration | None, device: str) -> dict[str, Any]:
    """The fields of `Work` that any run has."""
    checkpoint, skeleton, structure = model.checkpoint, model.skeleton, model.structure
    config = skeleton.config.get_text_config()
    texts = [Path(str(source.path)) for source in settings.text] if settings else []
    files = {file.name: file for file in checkpoint.files}
    tokenizer = files.get("tokenizer.json") or files.get("tokenizer.model")
    return {
        "structure": structure,
        "stored": {name: info.nbytes for name, info in checkpoint.tensors.items()},
        "elements": {name: info.nbytes // DTYPES[info.dtype][1] for name, info in checkpoint.tensors.items()},
        "unread": _unread(model, sees=settings is not None and settings.images is not None),
        "looked_up": frozenset(tables(skeleton, checkpoint, model.names).values()),
        "itemsize": 4 if checkpoint.dtype == "float32" else 2,
        "hidden": largest(config, "hidden_size") or max(s.in_features for s in structure.sites),
        "heads": largest(config, "num_attention_heads", 1),
        "eager": getattr(skeleton.config, "_attn_implementation", "eager") == "eager",
        "tokenizer_bytes": len(tokenizer.read()) if tokenizer else 0,
        "text_bytes": sum(min(path.stat().st_size, MOST_BYTES) for path in texts if path.is_file()),
        "cuda": device.startswith("cuda"),
        "vocabulary": largest(config, "vocab_size"),
    }


def _unread(model: StudiedModel, *, sees: bool) -> frozenset[str]:
    """Tensors of parts that the class does not know, and of towers where there are no images for them (`sees`)."""
    towers = () if sees else tuple(f"{tower}." for tower in model.structure.towers)
    inside = {tensor for slot, tensor in model.names.items() if not slot.startswith(towers)}
    outside = {*model.structure.outside_tensors, *(site.weight for site in model.structure.outside_sites)}
    return frozenset(outside - inside)
